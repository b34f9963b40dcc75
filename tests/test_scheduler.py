"""The scheduler alone: every message in every state, with the engine of ``tests.fake_engine``."""

import logging
import random
from collections import deque
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from clo.gpu_worker import shares
from clo.gpu_worker.constraint import Constraints, Publish
from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.outputs import StepHandle
from clo.gpu_worker.pacing import Pacing
from clo.gpu_worker.scheduler import PROGRESS_SECONDS, Scheduler
from clo.gpu_worker.sequence import NEXT, Sequence, State
from clo.gpu_worker.shares import LATELY_S
from clo.kvstore.pool import BlockPool, Growth
from clo.runtime.wire.errors import PromptTooLong
from clo.runtime.wire.messages import (
    NO_STATS,
    Abort,
    Allocate,
    Allocated,
    Commit,
    Denied,
    Done,
    Free,
    Freed,
    FromWorker,
    Grow,
    Grown,
    Prefilled,
    PromptScored,
    Refused,
    Run,
    Sampling,
    Stepped,
    ToStore,
)
from tests.fake_engine import BLOCK_TOKENS, MAX_TOKENS, SLOTS, UNIT_FLOPS, UNITS, FakeEngine

BLOCKS = 10
END = 1000  # an end token; no other token is as large but those of `ending`


class FakeConstraint:
    """Lets through the numbers of a grammar such as "5 6 7", one after the other; at "!" it cannot go on. It
    works only when ``work`` is called."""

    def __init__(self, grammar: str) -> None:
        self._left = deque(grammar.split())
        self._waiting: list[tuple[int, Publish] | None] = [None]
        self.mask, self.complete, self.error = np.zeros(0, np.int32), False, ""

    @property
    def done(self) -> bool:
        return not self._waiting

    def wait(self) -> None:
        self.work()

    def advance(self, token: int, length: int, publish: Publish) -> None:
        assert self.done and str(token) == self._left.popleft(), "tokens come in order, each once"
        self._waiting.append((length, publish))

    def work(self) -> None:
        while self._waiting:
            waiting = self._waiting.pop()
            if not self._left:
                self.complete = True
            elif self._left[0] == "!":
                self.error = "too\n hard."
            else:
                self.mask = np.array([int(self._left[0])])
                if waiting is not None:
                    waiting[1](self.mask, waiting[0])


class FakeConstraints:
    missing = ""

    def __init__(self) -> None:
        self.made: list[FakeConstraint] = []

    def begin(self, grammar: str, answer: list[int]) -> FakeConstraint:
        self.made.append(FakeConstraint(" ".join(grammar.split()[len(answer) :])))
        return self.made[-1]

    def work(self) -> None:
        for constraint in self.made:
            constraint.work()


class World:
    """A scheduler between a router that collects reports and a store whose messages a test delivers."""

    def __init__(self, drift_check: Any = None, tokens: int | None = None, group: object = None) -> None:
        self.engine = FakeEngine(group)
        self.pool = BlockPool(BLOCKS, BLOCK_TOKENS)
        self.reports: list[FromWorker] = []
        self.asked: list[ToStore] = []  # on its way to the store
        self.answers: list[Allocated | Grown | Freed | Denied] = []  # on their way from it
        self.freed: list[int] = []
        self.runs: dict[int, Run] = {}
        self.constraints = FakeConstraints()
        self.scheduler = Scheduler(
            cast(Engine, self.engine),
            MAX_TOKENS,
            BLOCKS,
            Pacing(tokens, UNIT_FLOPS),
            self.reports.append,
            self.asked.append,
            cast(DriftCheck, drift_check),
            cast(Constraints, self.constraints),
        )

    # -------------------------------------------------------------------------------- what happens

    def add(
        self,
        prompt: int,
        max_tokens: int,
        *,
        first: int = 0,
        forced: list[int] | None = None,
        client: int = 0,
        answer: tuple[int, ...] = (),
        **sampling: Any,
    ) -> int:
        """A request of ``prompt`` tokens that end with token ``first``, so that it generates first + 1, ...,
        of which another worker has generated ``answer``; returns its number."""
        number = len(self.runs)
        tokens = [first] * prompt + [*answer]
        asked = Sampling(temperature=0.0, max_tokens=max_tokens, **sampling)
        self.runs[number] = run = Run(number, tokens, asked, 100 + number, [END], forced, client, len(answer))
        self.scheduler.add(run)
        return number

    def abort(self, number: int) -> None:
        self.scheduler.abort(Abort(number))

    def store_works(self, messages: int | None = None) -> None:
        """The store takes up the messages that wait for it, or the first few."""
        count = len(self.asked) if messages is None else messages
        now, self.asked[:] = self.asked[:count], self.asked[count:]
        for message in now:
            freed: list[Freed] = []
            match message:
                case Allocate():
                    try:
                        self.pool.allocate(
                            0,
                            message.sequence,
                            message.blocks,
                            message.prompt,
                            message.own,
                            most=message.most,
                        )
                    except PromptTooLong as error:
                        self.answers.append(Denied("Allocate", message.sequence, error.code, str(error)))
                case Grow():
                    self.pool.grow(0, message.sequence, message.blocks)
                case Commit():
                    self.pool.commit(0, message.sequence, message.start, message.tokens)
                case Free():
                    self.freed.append(message.sequence)
                    freed = [Freed(message.sequence, self.pool.free(0, message.sequence))]
                case _:
                    raise AssertionError(message)
            for grant in self.pool.grants():
                if isinstance(grant, Growth):
                    self.answers.append(Grown(grant.sequence, grant.blocks))
                else:
                    self.answers.append(Allocated(grant.sequence, grant.blocks, grant.cached))
            self.answers += freed
            self.pool.check_integrity()

    def store_answers(self, count: int | None = None) -> None:
        """The scheduler hears what the store has answered, or the first few of it."""
        count = len(self.answers) if count is None else count
        now, self.answers[:] = self.answers[:count], self.answers[count:]
        for answer in now:
            match answer:
                case Allocated():
                    self.scheduler.granted(answer)
                case Grown():
                    self.scheduler.grown(answer)
                case Freed():
                    self.scheduler.freed()
                case Denied():
                    self.scheduler.denied(answer)

    def serve(self) -> None:
        """Store and device do at once whatever they are asked; until all is over."""
        for _ in range(1000):
            self.store_works()
            self.store_answers()
            self.engine.finish()
            self.constraints.work()
            self.check()
            if not (self.scheduler.busy or self.asked or self.answers):
                return
            self.scheduler.advance()
        raise AssertionError("it does not end")

    def until(self, condition: Callable[[], object], work: int | None = None) -> None:
        """Rounds in which the device completes ``work`` pieces of work, or all, until something is so."""
        for _ in range(1000):
            if condition():
                return
            self.engine.finish(work)
            self.advance()
            if any(isinstance(message, Grow) for message in self.asked):
                self.store_works()
                self.store_answers()
        raise AssertionError("it does not come to that")

    def advance(self, times: int = 1) -> None:
        """Rounds in which the device does nothing."""
        for _ in range(times):
            self.scheduler.advance()
            self.check()

    # ----------------------------------------------------------------------------- what can be seen

    def state(self, number: int) -> State:
        sequence = self.scheduler._sequences.get(number)
        return State.GONE if sequence is None else sequence.state

    def tokens(self, number: int) -> list[int]:
        """The tokens reported for a request."""
        steps = [step for report in self.reports if isinstance(report, Stepped) for step in report.steps]
        return [step.token for step in steps if step.sequence == number]

    def end(self, number: int) -> Done | Refused | None:
        """How a request ended, after which nothing may be heard of it."""
        end: Done | Refused | None = None
        for report in self.reports:
            if isinstance(report, Stepped):
                about = [step.sequence for step in report.steps]
                assert report.steps and len(about) == len(set(about))
            else:
                assert isinstance(report, Prefilled | PromptScored | Done | Refused)
                about = [report.sequence]
            if number in about:
                assert end is None, f"{report} after {end}"
                if isinstance(report, Done | Refused):
                    end = report
        return end

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.running + self.scheduler.waiting <= len(self.runs)

    def check_over(self) -> None:
        """All is given back, and once; as many sequences as there are slots can run again."""
        scheduler, pool = self.scheduler, self.pool
        assert not (scheduler.busy or scheduler.running or scheduler.waiting or self.engine.owner)
        assert (pool.free_blocks, pool.sequences, pool.waiting) == (BLOCKS, 0, 0)
        for number in self.runs:
            assert self.end(number) is not None, number
        new = [self.add(2, 3, client=client) for client in range(SLOTS)]
        self.store_works()
        self.store_answers()
        assert scheduler.running == SLOTS, "each of them has a slot and blocks"
        self.serve()
        assert all(self.tokens(number) == [1, 2, 3] for number in new)


def done(world: World, number: int) -> tuple[str, list[int]]:
    """Reason and tokens of a request that ended without an error."""
    end = world.end(number)
    assert isinstance(end, Done)
    return end.reason, world.tokens(number)


def sizes(world: World) -> list[tuple[int, int]]:
    """The sequences for which blocks were asked, and how many."""
    return [(message.sequence, message.blocks) for message in world.asked if isinstance(message, Allocate)]


# ------------------------------------------------------------------------------------ whole requests


def test_a_request_from_its_prompt_to_its_last_token() -> None:
    world = World()
    number = world.add(prompt=6, max_tokens=5, first=10)
    assert sizes(world) == [(number, 3)], "blocks for the prompt and all that may follow"
    assert (world.scheduler.waiting, world.scheduler.running, world.scheduler.busy) == (1, 0, False)
    world.serve()
    assert done(world, number) == ("length", [11, 12, 13, 14, 15])
    end = world.end(number)
    assert isinstance(end, Done)
    assert (end.cache.steps, end.cache.kv_bytes) == (4, 10), "one step for each token but the first"
    assert Prefilled(number, 6, 6) in world.reports
    assert world.engine.activated == [(world.runs[number].sampling, world.runs[number].seed)]
    assert world.freed == [number]
    assert (world.scheduler.steps, world.scheduler.generated) == (4, 5)
    world.check_over()


@pytest.mark.parametrize("group", [None, "others"])
@pytest.mark.parametrize("prompt", [1, 3, 4, 5])
def test_commits_say_what_stands_in_the_blocks(prompt: int, group: str | None) -> None:
    """The prompt at once, then each block when it is full, or one step later where other ranks store rows of
    it; the store holds the tokens in order."""
    world, behind = World(group=group), int(group is not None)
    number = world.add(prompt, max_tokens=13, first=10)
    held: list[int] = []
    ends: list[int] = []  # of the commits
    world.store_works()
    for _ in range(30):
        world.store_answers()
        world.engine.finish()
        world.scheduler.advance()
        world.asked[:] = [message for message in world.asked if not isinstance(message, Free)]
        for message in world.asked:
            if isinstance(message, Grow):
                continue
            assert isinstance(message, Commit) and message.tokens
            ends.append(message.start + len(message.tokens))
        world.store_works()
        known = [10] * prompt + world.tokens(number)
        held = [token for block in world.pool.describe(0, number)[1] for token in block]
        assert held == known[: len(held)]
        assert not world.tokens(number) or len(held) > len(known) - 1 - BLOCK_TOKENS - behind
    assert len(world.tokens(number)) == 13 and world.end(number) is not None
    assert held[:prompt] == [10] * prompt and len(held) > prompt
    full = [end for end in range(prompt + 1, prompt + 13 - behind) if end % BLOCK_TOKENS == 0]
    assert ends == [prompt, *full]


@pytest.mark.parametrize("answered", [1, 3, 4])
def test_an_answer_that_another_worker_began_goes_on(answered: int) -> None:
    """All that was asked is of the whole answer: its length, forced tokens, what its penalties count, and its
    grammar."""
    world = World()
    known, rest = tuple(range(11, 11 + answered)), list(range(11 + answered, 16))
    plain = world.add(prompt=6, max_tokens=5, first=10, answer=known)
    forced = world.add(prompt=6, max_tokens=5, first=10, answer=known, forced=[11, 12, 13, 14, 90])
    counted = world.add(prompt=6, max_tokens=5, first=10, answer=known, presence_penalty=0.5)
    assert sizes(world) == [(number, 3) for number in (plain, forced, counted)], "no more blocks than before"
    world.serve()
    assert done(world, plain) == done(world, counted) == ("length", rest)
    assert done(world, forced) == ("length", [11, 12, 13, 14, 90][answered:])
    assert [each[1:] for each in world.engine.adjusted] == [([10] * 6, [END], [*known])]
    grammar = world.add(6, 9, first=10, answer=known, grammar="11 12 13 14 15")
    world.serve()
    assert done(world, grammar) == ("stop", rest)
    complete = world.add(6, 9, first=10, answer=known, grammar=" ".join(map(str, known)))
    world.serve()
    assert done(world, complete) == ("stop", []), "nothing was left but to say so"
    world.check_over()


def test_max_tokens_of_one_takes_no_step() -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=1)
    world.serve()
    assert done(world, number) == ("length", [1])
    assert "step" not in world.engine.log
    world.check_over()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_token_stops_with_a_step_on_its_way(ignore_eos: bool) -> None:
    """What that step brings is dropped, and the slot is free only when it is over."""
    world = World()
    number = world.add(prompt=3, max_tokens=6, first=END - 3, ignore_eos=ignore_eos)
    world.serve()
    tokens = list(range(END - 2, END + 4))
    assert done(world, number) == (("length", tokens) if ignore_eos else ("stop", tokens[:3]))
    world.check_over()


def test_an_end_token_as_the_first_and_as_the_last() -> None:
    world = World()
    first = world.add(prompt=3, max_tokens=6, first=END - 1)
    last = world.add(prompt=3, max_tokens=3, first=END - 3)
    world.serve()
    assert done(world, first) == ("stop", [END])
    assert done(world, last) == ("stop", [END - 2, END - 1, END])
    world.check_over()


def test_forced_tokens_are_fed_before_the_step_that_reads_them() -> None:
    """They are reported in place of the drawn ones, with what the model thought of them; no end token ends
    them."""
    world = World()
    forced = [50, END, 7, 7, 90]
    number = world.add(prompt=5, max_tokens=5, first=10, forced=forced, logprobs=2)
    world.serve()
    assert done(world, number) == ("length", forced)
    steps = [step for report in world.reports if isinstance(report, Stepped) for step in report.steps]
    predicted = [step.logprob.logprob for step in steps if step.logprob is not None]
    assert predicted == [11, 51, END + 1, 8, 8], "each follows from the forced token before"
    assert all(step.logprob is not None and step.logprob.token == step.token for step in steps)
    assert all(step.logprob is not None and len(step.logprob.top) == 2 for step in steps)
    world.check_over()


def test_logprobs_are_those_of_their_own_step() -> None:
    """The logits' buffer is overwritten by the step that is launched before the tokens arrive."""
    world = World()
    asked = world.add(prompt=2, max_tokens=8, first=100, logprobs=0)
    other = world.add(prompt=2, max_tokens=8, first=200)
    world.serve()
    steps = [step for report in world.reports if isinstance(report, Stepped) for step in report.steps]
    assert [step.logprob.logprob for step in steps if step.logprob is not None] == list(range(101, 109))
    assert all(step.logprob is None for step in steps if step.sequence == other)
    assert done(world, asked)[1] == list(range(101, 109))


@pytest.mark.parametrize("prompt", [0, MAX_TOKENS - 4, 10 * MAX_TOKENS])
def test_a_request_that_can_never_run_is_refused_at_once(prompt: int) -> None:
    world = World()
    number = world.add(prompt, max_tokens=5)
    end = world.end(number)
    text = f"{prompt + 5} tokens with the prompt; the longest sequence is {MAX_TOKENS}."
    assert end == Refused(number, PromptTooLong.code, text)
    assert world.asked == []
    world.check_over()


def test_the_longest_request_is_not_refused() -> None:
    world = World()
    number = world.add(MAX_TOKENS - 5, max_tokens=5)
    assert world.state(number) is State.ALLOCATING
    assert sizes(world) == [(number, MAX_TOKENS // BLOCK_TOKENS)]


def test_one_that_the_store_can_never_hold_is_refused_and_its_slot_goes_to_the_next() -> None:
    world = World()
    numbers = [world.add(prompt=30, max_tokens=BLOCKS * BLOCK_TOKENS - 29) for _ in range(SLOTS)]
    behind = world.add(prompt=3, max_tokens=2)
    world.store_works()
    world.store_answers()
    for number in numbers:
        end = world.end(number)
        assert isinstance(end, Refused) and end.code == PromptTooLong.code and "--kv-size" in end.text
    world.serve()
    assert done(world, behind) == ("length", [1, 2])
    assert world.freed == [behind], "what was denied is not freed"
    world.check_over()


def test_more_requests_than_slots_and_blocks_are_served_in_their_order() -> None:
    world = World()
    numbers = [world.add(prompt=9, max_tokens=5, first=100 * n) for n in range(9)]  # 4 blocks each
    assert world.scheduler.waiting == 9
    assert sizes(world) == [(number, 4) for number in numbers[:SLOTS]]
    ends = []
    for _ in range(1000):
        world.store_works()
        world.store_answers()
        assert world.scheduler.running <= 2, "two of them fill the store"
        world.engine.finish(1)
        world.advance()
        ends = [report.sequence for report in world.reports if isinstance(report, Done)]
        if len(ends) == len(numbers):
            break
    assert ends == numbers
    world.serve()
    assert all(done(world, n)[1] == [100 * n + i for i in range(1, 6)] for n in numbers)
    world.check_over()


# -------------------------------------------------------------------------- the device and the host


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


@pytest.mark.parametrize(("tokens", "units"), [(1, 1), (2, 2), (3, 3), (None, 1)])
def test_prefill_takes_turns_with_decoding(
    tokens: int | None, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit has the work of a token. By itself the scheduler gives a prompt the time of a step, and a unit
    takes as long as a step."""
    monkeypatch.setattr("tests.fake_engine.UNITS", 6)
    world = World(tokens=tokens)
    world.add(prompt=2, max_tokens=20)
    world.store_works()
    world.store_answers()
    world.until(lambda: "step" in world.engine.log)
    world.add(prompt=3, max_tokens=2)
    world.store_works()
    world.store_answers()
    start = len(world.engine.log)
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
    world = World(tokens=1000)
    world.add(prompt=2, max_tokens=20)
    world.store_works()
    world.store_answers()
    world.until(lambda: "step" in world.engine.log)
    world.add(prompt=3, max_tokens=2)
    world.store_works()
    world.store_answers()
    start = len(world.engine.log)
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


def test_the_progress_of_a_long_prefill_is_reported_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fake_engine.UNITS", 8)
    clock = count(1000.0, PROGRESS_SECONDS / 2)  # a unit takes half the time between two reports
    monkeypatch.setattr("clo.gpu_worker.scheduler.time.monotonic", lambda: next(clock))
    world = World()
    number = world.add(prompt=16, max_tokens=1)
    world.serve()
    progress = [report for report in world.reports if isinstance(report, Prefilled)]
    assert progress == [Prefilled(number, done, 16) for done in (2, 6, 10, 14, 16)]
    world.check_over()


def test_the_tokens_of_a_batch_are_reported_together() -> None:
    world = World()
    numbers = [world.add(prompt=2, max_tokens=9, first=100 * n) for n in range(3)]
    world.serve()
    full = [r for r in world.reports if isinstance(r, Stepped) and len(r.steps) == 3]
    assert len(full) >= 3
    assert all([step.sequence for step in report.steps] == numbers for report in full)


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


def test_a_drift_check_hears_of_every_step() -> None:
    class Recorder:
        """Lengths of the steps by slot, and the handles."""

        def __init__(self) -> None:
            self.lengths: list[dict[int, int]] = []
            self.handles: list[StepHandle] = []

        def before(self, lengths: dict[int, int]) -> None:
            assert len(self.lengths) == len(self.handles)
            self.lengths.append(dict(lengths))

        def after(self, handle: StepHandle) -> None:
            self.handles.append(handle)

    recorder = Recorder()
    world = World(recorder)
    world.add(prompt=3, max_tokens=4)
    world.serve()
    assert recorder.lengths == [{0: 4}, {0: 5}, {0: 6}]
    assert [handle.rows for handle in recorder.handles] == [[0]] * 3


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


# ------------------------------------------------------------------------------------- preemption


def allocations(world: World) -> list[int]:
    """Notes who asks for its first blocks, in order; a sequence that begins again is there again."""
    asked: list[int] = []

    def ask(message: ToStore) -> None:
        if isinstance(message, Allocate):
            asked.append(message.sequence)
        world.asked.append(message)

    world.scheduler._ask_store = ask
    return asked


def test_blocks_come_as_answers_grow_and_the_youngest_gives_its_own_back() -> None:
    """Two answers, each of which needs most of the arena in the end: both begin, the older one is never
    interrupted, and the younger one goes on where it was."""
    world = World()
    asked = allocations(world)
    old, young = (world.add(prompt=2, max_tokens=30, client=client) for client in range(2))
    world.serve()
    assert asked == [old, young, young]
    assert done(world, old) == done(world, young) == ("length", list(range(1, 31)))
    world.check_over()


def test_what_was_preempted_goes_on_with_all_that_was_asked_of_it() -> None:
    world = World()
    asked = allocations(world)
    world.add(prompt=2, max_tokens=36, client=1)
    forced = [90 - token for token in range(14)]
    numbers = [
        world.add(prompt=2, max_tokens=14, forced=forced, client=2),
        world.add(prompt=2, max_tokens=14, presence_penalty=0.5, client=3),
    ]
    world.serve()
    assert asked[3:] and {*asked[3:]} <= {*numbers}, "both are younger"
    assert done(world, numbers[0]) == ("length", forced)
    assert done(world, numbers[1]) == ("length", list(range(1, 15)))
    (_, prompt, _, first), *_, (_, _, _, last) = world.engine.adjusted
    assert prompt == [0, 0] and first == [] and last == list(range(1, 1 + len(last))) and last
    world.check_over()


def test_a_grammar_is_begun_again_after_what_it_has_allowed() -> None:
    world = World()
    asked = allocations(world)
    old = world.add(prompt=2, max_tokens=36, client=1)
    followed = [5 + 3 * place for place in range(20)]
    young = world.add(prompt=2, max_tokens=30, grammar=" ".join(map(str, followed)), client=2)
    world.constraints.work()
    world.serve()
    assert asked == [old, young, young]
    assert done(world, young) == ("stop", followed) and done(world, old) == ("length", list(range(1, 37)))
    world.check_over()


def test_what_is_cancelled_while_it_makes_room_does_not_begin_again() -> None:
    world = World()
    asked = allocations(world)
    old, young = (world.add(prompt=2, max_tokens=30, client=client) for client in range(2))
    world.store_works()
    world.store_answers()
    world.until(lambda: world.state(young) is State.RELEASING, 1)
    world.abort(young)
    world.abort(young)
    world.serve()
    assert asked == [old, young]
    assert done(world, young)[0] == "cancelled" and done(world, old) == ("length", list(range(1, 31)))
    world.check_over()


def test_nothing_is_written_where_no_block_is_because_the_store_is_late() -> None:
    world = World()
    asked = allocations(world)
    number = world.add(prompt=2, max_tokens=20)
    world.store_works()
    world.store_answers()
    for _ in range(40):
        world.engine.finish()
        world.advance()
    assert world.state(number) in (State.RELEASING, State.ALLOCATING), "it has given its blocks back"
    world.serve()
    assert asked == [number, number] and done(world, number) == ("length", list(range(1, 21)))
    world.check_over()


# ----------------------------------------------------------------------------------------- at random


@pytest.mark.parametrize("seed", range(40))
def test_random_requests_get_their_tokens_and_give_all_back(seed: int) -> None:
    """Store, device and answers lag behind by random times; requests come and are cancelled in between."""
    rng = random.Random(seed)
    world = World()
    expected: dict[int, tuple[str, list[int]]] = {}
    aborted: set[int] = set()

    def new() -> None:
        prompt, count = rng.randint(1, 14), rng.randint(1, 12)
        first = rng.choice([10_000 * (1 + len(world.runs)), END - rng.randint(1, 14)])
        forced = [rng.randrange(END, END + 9) for _ in range(count)] if rng.random() < 0.2 else None
        logprobs = rng.choice([None, None, 0, 3])
        number = world.add(prompt, count, first=first, forced=forced, logprobs=logprobs)
        tokens = forced or list(range(first + 1, first + count + 1))
        if forced is None and END in tokens:
            expected[number] = "stop", tokens[: tokens.index(END) + 1]
        else:
            expected[number] = "length", tokens

    def abort() -> None:
        number = rng.randrange(len(world.runs) + 3)
        if number in world.runs and world.end(number) is None:
            aborted.add(number)
        world.abort(number)

    acts: list[Callable[[], None]] = [
        lambda: world.store_works(rng.randint(0, 3)),
        lambda: world.store_answers(rng.randint(0, 2)),
        lambda: world.engine.finish(rng.randint(0, 6)),
        world.advance,
        world.advance,
    ]
    for _ in range(600):
        if len(world.runs) < 60 and rng.random() < 0.15:
            new()
        if rng.random() < 0.03:
            abort()
        rng.choice(acts)()
        world.check()
    world.serve()
    assert len(world.runs) > 30
    for number, (reason, tokens) in expected.items():
        found, given = done(world, number)
        if number in aborted:
            assert given == tokens[: len(given)]
            assert found == "cancelled" or (found, given) == (reason, tokens)
        else:
            assert (found, given) == (reason, tokens)
    world.check_over()


# --------------------------------------------------------- what ends or shapes an answer besides


def test_one_of_the_stop_token_ids_ends_an_answer_also_where_end_tokens_do_not() -> None:
    world = World()
    numbers = [
        world.add(prompt=3, max_tokens=9, first=END - 3, stop_token_ids=[END + 1], ignore_eos=True),
        world.add(prompt=3, max_tokens=9, first=END - 3, stop_token_ids=[END - 1]),
    ]
    world.serve()
    assert done(world, numbers[0]) == ("stop", [END - 2, END - 1, END, END + 1])
    assert done(world, numbers[1]) == ("stop", [END - 2, END - 1])
    world.check_over()


def test_only_what_wants_its_logits_adjusted_is_adjusted() -> None:
    world = World()
    world.add(prompt=3, max_tokens=2)
    number = world.add(prompt=3, max_tokens=2, first=5, min_tokens=2, stop_token_ids=[8], logit_bias={1: 2.0})
    world.serve()
    slot = 1
    assert world.engine.adjusted == [(slot, world.runs[number].tokens, [END, 8], [])]
    world.check_over()


def test_a_prompt_is_scored_before_its_first_token() -> None:
    world = World()
    number = world.add(prompt=6, max_tokens=2, first=4, prompt_logprobs=0)
    world.serve()
    kinds = [type(report) for report in world.reports if not isinstance(report, Prefilled)]
    assert kinds == [PromptScored, Stepped, Stepped, Done]
    (scored,) = [report for report in world.reports if isinstance(report, PromptScored)]
    assert (scored.sequence, scored.start) == (number, 1)
    assert [entry.logprob for entry in scored.logprobs] == [-4.0] * 5
    world.check_over()


@pytest.mark.parametrize("prompt", [1, 6, 17])
def test_a_prompt_that_is_only_scored_takes_no_step(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that decodes; in pieces where it is long, and not among short prompts."""
    monkeypatch.setattr("clo.gpu_worker.scheduler._SCORES", 10)
    world = World()
    monkeypatch.setattr(world.engine.prompt_graphs, "longest", 8)
    other = world.add(prompt=3, max_tokens=6)
    number = world.add(prompt, max_tokens=0, first=4, prompt_logprobs=1)
    world.serve()
    assert done(world, number) == ("length", []) and done(world, other)[1] == [1, 2, 3, 4, 5, 6]
    scored = [report for report in world.reports if isinstance(report, PromptScored)]
    assert [report.start for report in scored] == [1, 11][: 1 + (prompt > 11)]
    assert sum(len(report.logprobs) for report in scored) == prompt - 1
    assert world.engine.together == [[0]]
    world.check_over()


def test_a_scored_prompt_that_is_cancelled_gives_everything_back() -> None:
    world = World()
    number = world.add(prompt=6, max_tokens=0, prompt_logprobs=1)
    world.store_works()
    world.store_answers()
    world.advance()
    world.abort(number)
    world.serve()
    assert done(world, number) == ("cancelled", [])
    world.check_over()


# ------------------------------------------------------------------------------------ grammars


def test_a_request_with_a_grammar_follows_it_beside_others() -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9 2 7")
    other = world.add(prompt=3, max_tokens=6)
    world.serve()
    assert done(world, number) == ("stop", [5, 9, 2, 7]), "nothing may follow, so it waits for no end token"
    assert done(world, other) == ("length", [1, 2, 3, 4, 5, 6])
    world.check_over()


def test_a_grammar_whose_answer_may_go_on_ends_at_an_end_token_and_at_the_last_one() -> None:
    world = World()
    ending = world.add(prompt=3, max_tokens=9, grammar=f"5 {END} 7")
    ignoring = world.add(prompt=3, max_tokens=9, grammar=f"5 {END} 7", ignore_eos=True)
    long = world.add(prompt=3, max_tokens=2, grammar="5 9 2 7")
    world.serve()
    assert done(world, ending) == ("stop", [5, END])
    assert done(world, ignoring) == ("stop", [5, END, 7])
    assert done(world, long) == ("length", [5, 9])
    world.check_over()


def test_others_do_not_wait_for_a_mask() -> None:
    """The threads of a grammar do nothing, and the device everything: it repeats its step, in vain."""
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9 2")
    world.constraints.work()
    other = world.add(prompt=3, max_tokens=20)
    world.advance()
    world.store_works()
    world.store_answers()
    world.until(lambda: len(world.tokens(other)) == 12)
    slot = world.scheduler._sequences[number].slot
    assert world.tokens(number) == [5] and world.engine.lengths[slot] == 3
    world.constraints.work()
    world.serve()
    assert done(world, number) == ("stop", [5, 9, 2])
    assert world.tokens(other) == list(range(1, 21))
    world.check_over()


def test_a_request_waits_for_its_grammar_without_a_slot() -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9")
    assert world.state(number) is State.COMPILING and world.scheduler.busy
    assert (world.scheduler.waiting, world.scheduler.running) == (1, 0)
    world.advance(3)
    assert not world.asked
    world.constraints.work()
    world.advance()
    assert world.state(number) is State.ALLOCATING
    world.serve()
    assert done(world, number) == ("stop", [5, 9])
    world.check_over()


@pytest.mark.parametrize(("grammar", "tokens"), [("!", []), ("5 9 !", [5, 9])])
def test_a_grammar_that_cannot_be_followed_ends_its_request_with_a_sentence(
    grammar: str, tokens: list[int]
) -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar=grammar)
    other = world.add(prompt=3, max_tokens=6)
    world.serve()
    end = world.end(number)
    assert isinstance(end, Refused) and end.code == "invalid_request"
    assert end.text == "The answer cannot follow structured_outputs any further: too hard."
    assert world.tokens(number) == tokens
    assert done(world, other) == ("length", [1, 2, 3, 4, 5, 6])
    world.check_over()


def test_grammars_that_cannot_be_had_are_refused() -> None:
    world = World()
    world.constraints.missing = "the package llguidance is not installed"
    number = world.add(prompt=3, max_tokens=9, grammar="5")
    end = world.end(number)
    assert isinstance(end, Refused) and end.code == "invalid_request"
    assert end.text == "This server has no structured output: the package llguidance is not installed."
    world.check_over()


@pytest.mark.parametrize("rounds", range(12))
def test_a_request_with_a_grammar_may_be_cancelled_at_any_time(rounds: int) -> None:
    """Its slot is free only when the threads no longer write to its mask."""
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9 2 7 3 1")
    other = world.add(prompt=3, max_tokens=9)
    for turn in range(rounds):
        world.store_works()
        world.store_answers()
        if turn % 3 != 2:
            world.constraints.work()
        world.engine.finish()
        world.advance()
    world.abort(number)
    constraint = world.constraints.made[0]
    if not constraint.done and world.state(number) is State.RELEASING:
        world.engine.finish()
        world.advance()
        assert world.state(number) is State.RELEASING
    world.serve()
    assert done(world, number)[0] == "cancelled"
    assert done(world, other)[1] == list(range(1, 10))
    world.check_over()
