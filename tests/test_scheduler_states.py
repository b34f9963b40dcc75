"""The scheduler alone: every message in every state of a request."""

import logging
from collections.abc import Callable

import pytest

from clo.gpu_worker.sequence import NEXT, Sequence, State
from clo.runtime.wire.errors import PromptTooLong
from clo.runtime.wire.messages import NO_STATS, Allocate, Allocated, Denied, Done, Refused, Run, Sampling
from tests.fake_engine import BLOCK_TOKENS, SLOTS, UNITS
from tests.scheduler_world import BLOCKS, World, done

# ------------------------------------------------------------------------ every message in every state


def to_waiting(world: World) -> int:
    for _ in range(SLOTS):
        world.add(prompt=2, max_tokens=8)
    return world.add(prompt=5, max_tokens=6, first=30)


def to_allocating(world: World) -> int:
    return world.add(prompt=5, max_tokens=6, first=30)


def to_queued(world: World) -> int:
    """Allocating: the store has it in its queue behind another one that holds all blocks."""
    world.add(prompt=30, max_tokens=BLOCKS * BLOCK_TOKENS - 30)
    number = world.add(prompt=5, max_tokens=6, first=30)
    world.store_works()
    world.store_answers()
    assert world.pool.waiting == 1
    return number


def to_granted(world: World) -> int:
    """Allocating: the answer is on its way."""
    number = to_allocating(world)
    world.store_works()
    assert world.answers
    return number


def to_prefilling(world: World) -> int:
    number = to_granted(world)
    world.store_answers()
    return number


def to_second_in_prefill(world: World) -> int:
    """Prefilling: behind another one."""
    world.add(prompt=7, max_tokens=2)
    number = to_prefilling(world)
    world.advance()
    return number


def to_half_prefilled(world: World) -> int:
    """Prefilling: with units in the device's queue."""
    number = to_prefilling(world)
    world.advance(2)
    assert 0 < world.engine.log.count("unit") < UNITS
    return number


def to_decoding(world: World) -> int:
    """Decoding: its first token and a step are on their way."""
    number = to_prefilling(world)
    world.until(lambda: "start" in world.engine.log, work=1)
    world.advance()
    return number


def to_decoding_with_tokens(world: World) -> int:
    """Decoding: tokens have come, more are on their way."""
    number = to_decoding(world)
    world.until(lambda: len(world.tokens(number)) == 2, work=1)
    return number


def to_draining(world: World) -> int:
    """The last step is launched, its tokens are on their way."""
    number = to_decoding(world)
    world.until(lambda: world.state(number) is not State.DECODING, work=1)
    return number


def to_released_by_the_end(world: World) -> int:
    """The last token has come, the device has not come to the end of its queue."""
    number = to_draining(world)
    world.until(lambda: world.state(number) is not State.DRAINING, work=1)
    return number


def to_releasing(world: World) -> int:
    """Cancelled in mid-decode with steps on their way."""
    number = to_decoding_with_tokens(world)
    world.abort(number)
    return number


def to_gone(world: World) -> int:
    number = to_allocating(world)
    world.serve()
    return number


REACHED: dict[Callable[[World], int], State] = {
    to_waiting: State.WAITING,
    to_allocating: State.ALLOCATING,
    to_queued: State.ALLOCATING,
    to_granted: State.ALLOCATING,
    to_prefilling: State.PREFILLING,
    to_second_in_prefill: State.PREFILLING,
    to_half_prefilled: State.PREFILLING,
    to_decoding: State.DECODING,
    to_decoding_with_tokens: State.DECODING,
    to_draining: State.DRAINING,
    to_released_by_the_end: State.RELEASING,
    to_releasing: State.RELEASING,
    to_gone: State.GONE,
}
in_every_state = pytest.mark.parametrize("reach", REACHED, ids=[reach.__name__ for reach in REACHED])
WHOLE = ("length", [31, 32, 33, 34, 35, 36])


def reached(reach: Callable[[World], int]) -> tuple[World, int]:
    world = World()
    number = reach(world)
    world.check()
    assert world.state(number) is REACHED[reach]
    return world, number


@in_every_state
def test_a_request_goes_on_from_every_state(reach: Callable[[World], int]) -> None:
    world, number = reached(reach)
    world.serve()
    reason, tokens = done(world, number)
    if reach is to_releasing:
        assert reason == "cancelled" and tokens == WHOLE[1][: len(tokens)]
    else:
        assert (reason, tokens) == WHOLE
    world.check_over()


@in_every_state
def test_abort(reach: Callable[[World], int]) -> None:
    """The request ends with the tokens that were reported; one that has ended is left alone."""
    world, number = reached(reach)
    before = world.tokens(number)
    ended = reach in (to_released_by_the_end, to_gone)
    world.abort(number)
    world.check()
    assert world.state(number) in (State.RELEASING, State.GONE)
    if reach is to_waiting:
        assert world.end(number) == Done(number, "cancelled", NO_STATS)
    world.abort(number)  # the second time nothing happens
    world.check()
    world.serve()
    assert done(world, number) == (WHOLE if ended else ("cancelled", before))
    assert world.freed.count(number) == (reach is not to_waiting)
    world.check_over()


@in_every_state
def test_abort_with_the_store_ahead_of_the_device(reach: Callable[[World], int]) -> None:
    """The store answers at once; the device completes one piece of work at a time."""
    world, number = reached(reach)
    world.abort(number)
    for _ in range(100):
        world.store_works()
        world.store_answers()
        world.advance()
        world.engine.finish(1)
    assert world.end(number) is not None
    world.serve()
    world.check_over()


@in_every_state
@pytest.mark.parametrize(
    "answer", ["granted again", "denied a commit", "denied a free", "denied what nobody read"]
)
def test_answers_that_are_about_nothing_change_nothing(
    reach: Callable[[World], int], answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong in the store must not take slot or blocks of a request that runs."""
    world, number = reached(reach)
    if answer == "granted again":
        if REACHED[reach] is State.ALLOCATING:
            return  # that is the answer it waits for
        world.scheduler.granted(Allocated(number, [0] * 12))
    else:
        message = {
            "denied a commit": Denied("Commit", number, "protocol", "It is wrong."),
            "denied a free": Denied("Free", number, "protocol", "It is wrong."),
            "denied what nobody read": Denied("", -1, "protocol", "It is wrong."),
        }[answer]
        with caplog.at_level(logging.ERROR):
            world.scheduler.denied(message)
        assert caplog.messages == [f"The KV store denied {message.answers}: It is wrong."]
    world.check()
    assert world.state(number) is REACHED[reach]
    world.serve()
    reason, _ = done(world, number)
    assert reason == ("cancelled" if reach is to_releasing else "length")
    world.check_over()


@in_every_state
def test_a_denied_allocation(reach: Callable[[World], int]) -> None:
    """One that waits for blocks is refused and gives its slot back; it is too late for any other."""
    world, number = reached(reach)
    world.asked[:] = [m for m in world.asked if not (isinstance(m, Allocate) and m.sequence == number)]
    world.answers[:] = [answer for answer in world.answers if answer.sequence != number]
    world.pool.free(0, number) if REACHED[reach] is State.ALLOCATING else None
    world.scheduler.denied(Denied("Allocate", number, PromptTooLong.code, "Never."))
    world.check()
    if REACHED[reach] is State.ALLOCATING:
        assert world.end(number) == Refused(number, PromptTooLong.code, "Never.")
        assert world.state(number) is State.GONE
    else:
        assert world.state(number) is REACHED[reach]
    world.serve()
    if REACHED[reach] is not State.ALLOCATING:
        assert done(world, number)[0] == ("cancelled" if reach is to_releasing else "length")
    world.check_over()


@in_every_state
def test_another_request(reach: Callable[[World], int]) -> None:
    world, number = reached(reach)
    other = world.add(prompt=4, max_tokens=3, first=500)
    world.check()
    world.serve()
    assert done(world, other) == ("length", [501, 502, 503])
    assert done(world, number)[1] == WHOLE[1][: len(world.tokens(number))]
    world.check_over()


def test_messages_about_unknown_sequences_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    number = to_decoding(world)
    world.abort(77)
    world.scheduler.granted(Allocated(77, [1]))
    with caplog.at_level(logging.ERROR):
        world.scheduler.denied(Denied("Allocate", 77, "protocol", "It is wrong."))
    world.check()
    world.serve()
    assert done(world, number) == WHOLE
    world.check_over()


def test_an_answer_that_crosses_an_abort_is_too_late() -> None:
    """The store has granted blocks before it hears that they are not wanted."""
    world, number = reached(to_granted)
    world.abort(number)
    world.store_answers()
    assert world.state(number) is State.RELEASING and world.scheduler.running == 0
    world.serve()
    assert done(world, number) == ("cancelled", [])
    world.check_over()


def test_a_withdrawn_request_lets_those_behind_it_pass() -> None:
    world, number = reached(to_queued)
    behind = world.add(prompt=1, max_tokens=1)
    world.abort(number)
    world.abort(0)
    world.serve()
    assert done(world, behind) == ("length", [1])
    world.check_over()


def test_a_prefill_that_is_cancelled_leaves_nothing_on_its_way_to_the_arena() -> None:
    world, number = reached(to_half_prefilled)
    joined = world.engine.joined
    world.abort(number)
    assert world.engine.joined == joined + 1
    units = world.engine.log.count("unit")
    world.serve()
    assert world.engine.log.count("unit") == units
    world.check_over()


# --------------------------------------------------------------------------------------- the states


@pytest.mark.parametrize("state", State)
def test_a_sequence_moves_on_legal_ways_only(state: State) -> None:
    for following in State:
        sequence = Sequence(Run(3, [1, 2], Sampling(max_tokens=4), 0, [], None), 0)
        sequence.state = state
        if following in NEXT[state]:
            sequence.move(following)
            assert sequence.state is following
        else:
            with pytest.raises(
                RuntimeError, match=f"Sequence 3 cannot go from {state.name} to {following.name}"
            ):
                sequence.move(following)
            assert sequence.state is state


@pytest.mark.parametrize("damage", ["slot lost", "slot twice", "not listed", "wrong list", "wrong slot"])
def test_check_integrity_finds_damage(damage: str) -> None:
    world, number = reached(to_decoding)
    scheduler = world.scheduler
    sequence = scheduler._sequences[number]
    match damage:
        case "slot lost":
            scheduler._free_slots.pop()
        case "slot twice":
            scheduler._free_slots.append(sequence.slot)
        case "not listed":
            scheduler._decoding.clear()
        case "wrong list":
            scheduler._prompts.add(sequence)
        case "wrong slot":
            scheduler._decoding[sequence.slot + 1] = scheduler._decoding.pop(sequence.slot)
    with pytest.raises(AssertionError):
        scheduler.check_integrity()
