"""Continuous batching: requests join and leave between decode steps, prefill takes turns with decoding."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine, SlotRelease, StepHandle
from clo.gpu_worker.prefill import Prefill
from clo.gpu_worker.side_stream import DeviceEvent
from clo.runtime.wire.messages import (
    NO_STATS,
    Abort,
    Allocate,
    Allocated,
    Commit,
    Denied,
    Done,
    Free,
    FromWorker,
    Prefilled,
    Refused,
    Run,
    Step,
    Stepped,
    ToStore,
)

logger = logging.getLogger(__name__)

PREFILL_UNITS_PER_STEP = 4  # a unit is one layer of one chunk; about as long as a decode step
PREFILL_UNITS_AHEAD = 8
PROGRESS_SECONDS = 0.25


@dataclass
class Request:
    """One request on the worker. ``tokens`` is the prompt and all tokens generated so far."""

    run: Run
    tokens: list[int]
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    prefill: Prefill | None = None
    reported: float = 0.0
    ordered: int = 0  # tokens that have arrived or are on their way
    steps: int = 0
    committed: int = 0
    reason: str | None = None  # why it ended
    retirement: SlotRelease | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.run.tokens)


@dataclass
class InFlightStep:
    """A step on its way: whose tokens it brings, and logits [vocab] where log-probabilities are wanted."""

    posted: StepHandle
    requests: list[Request]
    logits: dict[int, Tensor]  # by sequence
    mark: DeviceEvent | None


class Scheduler:
    """Which request does what next. Talks to the router and the store through two callables.

    A request waits for a slot, then for its blocks (the store grants them in order), prefills and decodes.
    Its blocks are reserved for the prompt and all tokens it may generate: nothing runs out in mid-stream.

    Args:
        engine: does the computing.
        slots: sequences at a time.
        max_tokens: longest sequence.
        report: takes messages for the router.
        ask_store: takes messages for the store.
        drift_check: compares some steps with full attention.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        max_tokens: int,
        report: Callable[[FromWorker], None],
        ask_store: Callable[[ToStore], None],
        drift_check: DriftCheck | None = None,
    ) -> None:
        self._engine, self._max_tokens, self._drift_check = engine, max_tokens, drift_check
        self._block_tokens = engine.decoder.shape.block_tokens
        self._report, self._ask_store = report, ask_store
        self._free_slots = list(range(slots))
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()  # for a slot
        self._prefilling: deque[Request] = deque()
        self._decoding: dict[int, Request] = {}  # by slot
        self._flying: deque[InFlightStep] = deque()
        self._leaving: list[Request] = []  # ended, but their last step is not over
        self._units: deque[DeviceEvent] = deque()  # of prefill, on their way
        self.steps = 0
        self.generated = 0

    @property
    def busy(self) -> bool:
        """Whether ``advance`` has work to do."""
        return bool(self._prefilling or self._decoding or self._flying or self._leaving)

    @property
    def running(self) -> int:
        return sum(bool(request.blocks) for request in self._requests.values())

    @property
    def waiting(self) -> int:
        return len(self._requests) - self.running

    # ------------------------------------------------------------------------- from router and store

    def add(self, run: Run) -> None:
        """Take a request; it is refused at once where it could never run."""
        total = len(run.tokens) + run.sampling.max_tokens
        if not run.tokens or total > self._max_tokens:
            text = f"{total} tokens with the prompt; the longest sequence is {self._max_tokens}."
            self._report(Refused(run.sequence, "prompt_too_long", text))
            return
        request = Request(run, list(run.tokens))
        self._requests[run.sequence] = request
        self._waiting.append(request)
        self._admit()

    def abort(self, message: Abort) -> None:
        """End a request now, wherever it is."""
        request = self._requests.get(message.sequence)
        if request is not None:
            self._finish(request, "cancelled")

    def granted(self, message: Allocated) -> None:
        """The store gave blocks: the prefill can begin."""
        request = self._requests.get(message.sequence)
        if request is None:  # cancelled meanwhile; its Free is on the way
            return
        request.blocks = message.blocks
        self._prefilling.append(request)

    def denied(self, message: Denied) -> None:
        """The store can never hold the request."""
        request = self._requests.pop(message.sequence, None)
        if request is None:
            logger.warning("the store denied a message: %s", message.text)
            return
        self._free_slots.append(request.slot)
        self._report(Refused(message.sequence, message.code, message.text))
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            request = self._waiting.popleft()
            request.slot = min(self._free_slots)
            self._free_slots.remove(request.slot)
            total = len(request.tokens) + request.run.sampling.max_tokens
            self._ask_store(Allocate(request.run.sequence, -(-total // self._block_tokens)))

    # ----------------------------------------------------------------------------------------- work

    def advance(self) -> bool:
        """Some prefill, then a decode step, then what has arrived. False where all waits for the device."""
        moved = False
        room = len(self._flying) < self._engine.depth  # for a step
        units = (PREFILL_UNITS_PER_STEP if room else 0) if self._decoding else 1
        while units and self._prefilling and self._unit_may_start():
            self._prefill(self._prefilling[0])
            units -= 1
            moved = True
        if self._decoding and room:
            self._launch()
            moved = True
        while self._flying and (tokens := self._engine.read(self._flying[0].posted)) is not None:
            self._take(self._flying.popleft(), tokens)
            moved = True
        return self._see_off() or moved

    def _unit_may_start(self) -> bool:
        """The host stays only a few units ahead of the device, so that a decode step need not wait long."""
        while self._units and self._units[0].reached:
            self._units.popleft()
        return len(self._units) < PREFILL_UNITS_AHEAD

    def _prefill(self, request: Request) -> None:
        if request.prefill is None:  # only now, since it takes memory that is planned once
            request.prefill = self._engine.prefill(request.slot, request.run.tokens, request.blocks)
        prefill = request.prefill
        logits = prefill.advance()
        self._units.append(self._engine.mark())
        now = time.monotonic()
        if logits is not None or now - request.reported >= PROGRESS_SECONDS:
            request.reported = now
            self._report(Prefilled(request.run.sequence, prefill.done, prefill.total))
        if logits is None:
            return
        self._prefilling.popleft()
        request.prefill = None
        run = request.run
        self._engine.activate(request.slot, len(run.tokens), run.sampling, run.seed)
        self._decoding[request.slot] = request
        self._fly(self._engine.start(request.slot, logits), [request])

    def _launch(self) -> None:
        requests = [self._decoding[slot] for slot in sorted(self._decoding)]
        lengths = {request.slot: len(request.run.tokens) + request.ordered for request in requests}
        if self._drift_check is not None:
            self._drift_check.before(lengths)
        posted = self._engine.step(list(lengths), max(lengths.values()))
        if self._drift_check is not None:
            self._drift_check.after(posted)
        self.steps += 1
        for request in requests:
            request.steps += 1
        self._fly(posted, requests)

    def _fly(self, posted: StepHandle, requests: list[Request]) -> None:
        """Note what is on its way, and what the next step has to know before the tokens arrive."""
        rows: dict[int, Tensor] = {}
        for row, request in zip(posted.rows, requests, strict=True):
            run = request.run
            if run.forced is not None:
                self._engine.feed(request.slot, run.forced[request.ordered])
            if run.sampling.logprobs is not None:
                rows[run.sequence] = posted.logits[row].clone()
            request.ordered += 1
            if request.ordered == run.sampling.max_tokens:
                self._retire(request)
        mark = self._engine.mark() if rows else None
        self._flying.append(InFlightStep(posted, requests, rows, mark))

    def _take(self, flight: InFlightStep, drawn: list[int]) -> None:
        """Report the tokens of a step together, end the requests that are complete."""
        steps = []
        for request, token in zip(flight.requests, drawn, strict=True):
            run = request.run
            if request.reason is not None:  # it ended while this step was on its way
                continue
            complete = not request.committed or len(request.tokens) % self._block_tokens == 0
            if complete and len(request.tokens) > request.committed:
                self._commit(request, len(request.tokens))
            if run.forced is not None:
                token = run.forced[request.generated]
            request.tokens.append(token)
            self.generated += 1
            wanted, logprob = run.sampling.logprobs, None
            if wanted is not None and flight.mark is not None:
                logprob = self._engine.logprob(flight.logits[run.sequence], flight.mark, token, wanted)
            steps.append(Step(run.sequence, token, logprob))
            if run.forced is None and token in run.eos and not run.sampling.ignore_eos:
                request.reason = "stop"
            elif request.generated >= run.sampling.max_tokens:
                request.reason = "length"
        if steps:
            self._report(Stepped(steps))
        for request in flight.requests:
            if request.reason is not None and request.run.sequence in self._requests:
                self._finish(request, request.reason)

    # -------------------------------------------------------------------------------------- leaving

    def _commit(self, request: Request, upto: int) -> None:
        """Tell the store which tokens its blocks hold now."""
        tokens = request.tokens[request.committed : upto]
        self._ask_store(Commit(request.run.sequence, request.committed, tokens))
        request.committed = upto

    def _retire(self, request: Request) -> None:
        """No further step for the request."""
        self._decoding.pop(request.slot, None)
        request.retirement = self._engine.retire(request.slot)

    def _finish(self, request: Request, reason: str) -> None:
        """End a request; its slot and blocks are free once the device has left them."""
        request.reason = reason
        del self._requests[request.run.sequence]
        if request.slot < 0:
            self._waiting.remove(request)
            self._report(Done(request.run.sequence, reason, NO_STATS))
            return
        if request.blocks and not request.ordered:
            self._prefilling.remove(request)
            request.prefill = None
            self._engine.cache.join_prompt()  # its blocks are free only when nothing is written to them
        if request.retirement is None:
            self._retire(request)
        self._leaving.append(request)
        self._see_off()

    def _see_off(self) -> bool:
        """Free what the requests held whose last step is over."""
        gone = [
            request for request in self._leaving if request.retirement and request.retirement.mark.reached
        ]
        for request in gone:
            self._leaving.remove(request)
            retirement, reason = request.retirement, request.reason
            assert retirement is not None and reason is not None
            self._ask_store(Free(request.run.sequence))
            self._free_slots.append(request.slot)
            stats = retirement.stats(len(request.tokens) - 1, request.steps)
            self._report(Done(request.run.sequence, reason, stats))
        if gone:
            self._admit()
        return bool(gone)

    def check_integrity(self) -> None:
        """Every slot is free or used once and every list agrees with the requests.

        Raises:
            AssertionError: says what is wrong.
        """
        holders = [*self._requests.values(), *self._leaving]
        used = [request.slot for request in holders if request.slot >= 0]
        slots = sorted(used + self._free_slots)
        assert slots == list(range(len(slots))), f"slots used or free more than once: {slots}"
        for slot, request in self._decoding.items():
            assert request.slot == slot, f"slot {slot} decodes a request of slot {request.slot}"
        listed = len(self._waiting) + self.running
        assert listed <= len(self._requests), f"{listed} listed of {len(self._requests)} requests"
