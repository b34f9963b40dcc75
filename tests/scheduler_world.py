"""A scheduler with the engine of ``tests.fake_engine`` between a router and a store, whose messages a test
delivers; what the files ``test_scheduler_*`` share."""

from collections import deque
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from clo.gpu_worker.constraint import Constraints, Publish
from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.pacing import Pacing
from clo.gpu_worker.scheduler import Scheduler
from clo.gpu_worker.sequence import State
from clo.kvstore.pool import BlockPool, Growth
from clo.runtime.wire.errors import PromptTooLong
from clo.runtime.wire.messages import (
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
from tests.fake_engine import BLOCK_TOKENS, MAX_TOKENS, SLOTS, UNIT_FLOPS, FakeEngine

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
