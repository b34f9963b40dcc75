"""The scheduler alone: turns. Clients take them for slots and blocks, prompts and steps on the device."""

from types import SimpleNamespace

import pytest

from clo.gpu_worker import shares
from clo.gpu_worker.sequence import State
from clo.gpu_worker.shares import LATELY_S
from clo.runtime.wire.messages import Allocate, Done, Free
from tests.fake_engine import BLOCK_TOKENS, MAX_TOKENS, SLOTS, UNITS
from tests.scheduler_world import BLOCKS, World, done


def test_clients_take_turns_for_slots() -> None:
    """Whoever sends many requests delays others by one of them; those of one client keep their order."""
    world = World()
    for _ in range(SLOTS + 4):
        world.add(2, 1, client=1)
    late = [world.add(2, 1, client=2), world.add(2, 1, client=3), world.add(2, 1, client=2)]
    served: list[int] = []
    for _ in range(200):
        for message in world.asked:
            if isinstance(message, Allocate):
                served.append(message.sequence)
        world.store_works()
        world.store_answers()
        world.scheduler.advance()
        world.engine.finish()
        world.scheduler.check_integrity()
    assert served[:SLOTS] == list(range(SLOTS))
    assert served[SLOTS:] == [late[0], SLOTS, late[1], late[2], SLOTS + 1, SLOTS + 2, SLOTS + 3]


def allocated(world: World) -> list[int]:
    return [message.sequence for message in world.asked if isinstance(message, Allocate)]


def test_one_client_leaves_a_slot_and_blocks_to_those_who_have_asked_lately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once they have been quiet for a while it gets the last slot, too."""
    now = 1000.0
    monkeypatch.setattr(shares, "time", SimpleNamespace(monotonic=lambda: now))
    world = World()
    world.add(2, 1, client=1)
    world.serve()
    greedy = [world.add(2, 14, client=2) for _ in range(SLOTS + 1)]
    assert allocated(world) == greedy[: SLOTS - 1]
    short = world.add(2, 1, client=1)
    assert allocated(world) == [*greedy[: SLOTS - 1], short]
    world.store_works()
    world.store_answers()
    world.until(
        lambda: any(isinstance(report, Done) and report.sequence == short for report in world.reports)
    )
    world.scheduler.check_integrity()
    assert allocated(world) == [], "the slot is kept for another short one"
    now += LATELY_S + 1
    world.advance()
    assert allocated(world) == [greedy[SLOTS - 1]]
    world.serve()
    world.check_over()


def test_blocks_are_left_to_others_but_a_client_that_holds_none_gets_all() -> None:
    world = World()
    assert BLOCKS - BLOCKS // 16 - 1 == 9
    world.add(2, 1, client=1)
    half = [world.add(5 * BLOCK_TOKENS - 2, 2, client=2) for _ in range(2)]
    assert half[1] not in allocated(world), "both would hold all blocks"
    short = world.add(2, 1, client=1)
    assert short in allocated(world)
    world.serve()
    everything = world.add(BLOCKS * BLOCK_TOKENS - 2, 2, client=2)
    assert everything in allocated(world)
    world.serve()
    world.check_over()


def test_a_client_that_is_alone_gets_all_slots() -> None:
    world = World()
    numbers = [world.add(2, 1, client=1) for _ in range(SLOTS + 1)]
    assert allocated(world) == numbers[:SLOTS]
    world.serve()
    world.check_over()


def test_two_steps_are_on_their_way_and_no_more() -> None:
    world = World()
    world.add(prompt=2, max_tokens=20)
    world.store_works()
    world.store_answers()
    world.until(lambda: "start" in world.engine.log)
    world.advance(5)
    assert world.engine.log == ["unit"] * UNITS + ["start", "step"]
    assert world.scheduler.advance() is False, "all waits for the device"
    world.engine.finish()
    assert world.scheduler.advance() is True
    world.advance(5)
    assert world.engine.log.count("step") == 3
    assert world.scheduler.advance() is False
    world.serve()
    world.check_over()


def prompt_beside_decoding(tokens: int | None) -> tuple[World, int]:
    """A sequence decodes when a prompt comes to it; also how much the engine had done until then."""
    world = World(tokens=tokens)
    world.add(prompt=2, max_tokens=20)
    world.store_works()
    world.store_answers()
    world.until(lambda: "step" in world.engine.log)
    world.add(prompt=3, max_tokens=2)
    world.store_works()
    world.store_answers()
    return world, len(world.engine.log)


@pytest.mark.parametrize(("tokens", "units"), [(1, 1), (2, 2), (3, 3), (None, 1)])
def test_prefill_takes_turns_with_decoding(
    tokens: int | None, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit has the work of a token. By itself the scheduler gives a prompt the time of a step, and a unit
    takes as long as a step."""
    monkeypatch.setattr("tests.fake_engine.UNITS", 6)
    world, start = prompt_beside_decoding(tokens)
    world.until(lambda: world.engine.log[start:].count("unit") == 6)
    since, most = 0, 0  # units since the last step
    for name in world.engine.log[start:]:
        since = 0 if name == "step" else since + (name == "unit")
        most = max(most, since)
    assert most == units
    world.serve()
    world.check_over()


def test_no_step_comes_before_what_is_owed_to_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device takes only a few units ahead, and the host has to come back for the others."""
    monkeypatch.setattr("tests.fake_engine.UNITS", 40)
    world, start = prompt_beside_decoding(1000)
    world.until(lambda: world.engine.log[start:].count("unit") == 40, work=1)
    names = world.engine.log[start:]
    first, last = names.index("unit"), len(names) - 1 - names[::-1].index("unit")
    assert "step" not in names[first + 1 : last]
    world.serve()
    world.check_over()


def test_the_host_launches_a_few_units_of_prefill_ahead_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.fake_engine.UNITS", 60)
    world = World()
    world.add(prompt=24, max_tokens=2)
    world.store_works()
    world.store_answers()
    world.advance(20)
    assert world.engine.log == ["unit"] * 2, "nothing is known yet of how long they take"
    assert world.scheduler.advance() is False
    world.engine.finish()
    world.advance(20)
    assert world.engine.log == ["unit"] * (2 + 8), "30 ms would hold more, but that is enough"
    assert world.scheduler.advance() is False
    world.engine.finish(1)
    world.advance(20)
    assert world.engine.log == ["unit"] * (2 + 8 + 1)
    monkeypatch.setattr("tests.fake_engine.SECONDS", 0.01)
    for _ in range(20):  # until the measurements are those of slow units
        world.engine.finish(1)
        world.advance(1)
    count = len(world.engine.log)
    world.engine.finish()
    world.advance(20)
    assert len(world.engine.log) == count + 3, "units of 10 ms, and 30 ms ahead"
    world.serve()
    world.check_over()


def test_short_prompts_are_computed_together() -> None:
    world = World()
    world.engine.prompt_graphs.longest = 8
    numbers = [world.add(prompt=prompt, max_tokens=3, first=100 * prompt) for prompt in (5, 3, 9)]
    world.serve()
    assert world.engine.together == [[0, 1]] and set(world.engine.units) == {2}
    assert [done(world, number)[1] for number in numbers] == [
        [100 * prompt + i for i in (1, 2, 3)] for prompt in (5, 3, 9)
    ]
    world.check_over()


def test_no_more_short_prompts_go_between_two_steps_than_the_pace_allows() -> None:
    """The least graph has the work of 4 x 3 tokens in one layer, and two prompts need the next one."""
    world = World(tokens=12)
    world.engine.prompt_graphs.longest = 4
    world.add(prompt=9, max_tokens=12)
    world.store_works()
    world.store_answers()
    world.until(lambda: "step" in world.engine.log)
    for _ in range(2):
        world.add(prompt=4, max_tokens=2)
    world.store_works()
    world.store_answers()
    world.until(lambda: len(world.engine.together) == 2)
    assert world.engine.together == [[1], [2]]
    log = world.engine.log[world.engine.log.index("short") :]
    assert "step" in log[: log.index("short", 1)]
    world.serve()
    world.check_over()


def test_a_prompt_does_not_wait_for_a_much_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fake_engine.UNITS", 20)
    world = World()
    world.add(prompt=20, max_tokens=2)
    world.store_works()
    world.store_answers()
    world.advance(1)
    world.add(prompt=4, max_tokens=1)
    world.store_works()
    world.store_answers()
    world.serve()
    units = world.engine.units
    shorter = [place for place, slot in enumerate(units) if slot == 1]
    assert max(shorter) < 20 * 2 + 4, "every second unit was its own"
    longer = [slot for slot in units[min(shorter) : max(shorter)] if slot == 0]
    assert len(longer) >= 18, "and the other one went on meanwhile"
    world.check_over()


def test_a_prompt_for_which_there_is_no_memory_waits_for_the_longer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.fake_engine.UNITS", 5)
    world = World()
    for prompt in (MAX_TOKENS // 4 + 2, MAX_TOKENS // 4 + 1):
        world.add(prompt=prompt, max_tokens=1)
    world.store_works()
    world.store_answers()
    world.serve()
    assert world.engine.units == [0] * 5 + [1] * 5
    world.check_over()


def test_no_prefill_is_put_behind_the_steps_that_fill_the_queue() -> None:
    """It would stand before the next step, whose turn has not come. Beside a prompt the queue is longer by a
    step, so that a host that is delayed while it launches units does not delay the streams."""
    world = World()
    world.add(prompt=2, max_tokens=30)
    world.store_works()
    world.store_answers()
    world.until(lambda: "step" in world.engine.log)
    world.advance(2)
    assert world.scheduler.advance() is False
    world.add(prompt=3, max_tokens=2)
    world.store_works()
    world.store_answers()
    steps = world.engine.log.count("step")
    world.advance(1)
    before = list(world.engine.log)
    assert before.count("step") == steps + 1 and before[-1] == "step"
    assert world.scheduler.advance() is False and world.engine.log == before
    world.serve()
    world.check_over()


def test_advance_says_whether_it_did_anything() -> None:
    """Else a worker would sleep with work to do, or never."""
    world = World()
    for number in range(4):
        world.add(prompt=2, max_tokens=3 + number)
    seen = set()
    for turn in range(300):
        world.store_works()
        world.store_answers()
        if turn % 4 == 0:
            world.engine.finish(1)
        before = len(world.engine.log), len(world.reports)
        moved = world.scheduler.advance()
        assert moved is (before != (len(world.engine.log), len(world.reports)))
        seen.add(moved)
    assert seen == {True, False}
    world.serve()
    world.check_over()


def test_a_slot_waits_for_the_device_before_it_is_taken_again() -> None:
    """Blocks and slot of an ended sequence, whose last step has not left the device."""
    world = World()
    first = world.add(prompt=2, max_tokens=10)
    others = [world.add(prompt=2, max_tokens=10) for _ in range(SLOTS - 1)]
    waiting = world.add(prompt=2, max_tokens=2, first=70)
    world.store_works()
    world.store_answers()
    world.until(lambda: len(world.engine.lengths) == SLOTS)
    world.advance(3)
    world.abort(first)
    assert world.state(first) is State.RELEASING
    world.advance(3)
    assert world.state(waiting) is State.WAITING and world.end(first) is None
    assert Free(first) not in world.asked
    world.engine.finish()
    world.advance()
    assert world.state(first) is State.GONE and world.state(waiting) is State.ALLOCATING
    assert Free(first) in world.asked
    for number in others:
        world.abort(number)
    world.serve()
    assert done(world, waiting) == ("length", [71, 72])
    world.check_over()
