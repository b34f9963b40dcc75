"""Continuous batching: requests join and leave between decode steps, prefill takes turns with decoding."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from gpu_worker.engine import Engine, logprob_of
from gpu_worker.prefill import Prefill
from runtime.messages import (
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
    steps: int = 0
    committed: int = 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.run.tokens)


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
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        max_tokens: int,
        report: Callable[[FromWorker], None],
        ask_store: Callable[[ToStore], None],
    ) -> None:
        self._engine, self._max_tokens = engine, max_tokens
        self._block_tokens = engine.decoder.shape.block_tokens
        self._report, self._ask_store = report, ask_store
        self._free_slots = list(range(slots))
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()  # for a slot
        self._prefilling: deque[Request] = deque()
        self._decoding: dict[int, Request] = {}  # by slot
        self.steps = 0
        self.generated = 0

    @property
    def busy(self) -> bool:
        """Whether ``advance`` has work to do."""
        return bool(self._prefilling or self._decoding)

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

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
        request.prefill = self._engine.prefill(request.slot, request.run.tokens, message.blocks)
        self._prefilling.append(request)

    def denied(self, message: Denied) -> None:
        """The store can never hold the request."""
        request = self._requests.pop(message.sequence, None)
        if request is None:
            logger.warning("the store denied a message: %s", message.text)
            return
        self._release(request)
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

    def advance(self) -> None:
        """Some prefill, then one decode step."""
        units = PREFILL_UNITS_PER_STEP if self._decoding else 1
        while units and self._prefilling:
            self._prefill(self._prefilling[0])
            units -= 1
        if self._decoding:
            self._decode()

    def _prefill(self, request: Request) -> None:
        prefill = request.prefill
        assert prefill is not None
        logits = prefill.advance()
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
        self._commit(request, len(run.tokens))
        self._take(logits, [request])

    def _decode(self) -> None:
        requests = [self._decoding[slot] for slot in sorted(self._decoding)]
        longest = max(len(request.tokens) for request in requests)
        slots = [request.slot for request in requests]
        logits = self._engine.forward(slots[-1] + 1, longest)
        self.steps += 1
        for request in requests:
            request.steps += 1
            if len(request.tokens) % self._block_tokens == 0:
                self._commit(request, len(request.tokens))
        self._take(logits[slots], requests)

    def _take(self, logits: Tensor, requests: list[Request]) -> None:
        """Choose the next token of each request, report them together, end those that are complete."""
        drawn = self._engine.sample(logits, [request.slot for request in requests])
        self.generated += len(requests)
        steps, finished = [], []
        for row, request in enumerate(requests):
            run, token = request.run, drawn[row]
            if run.forced is not None:
                token = run.forced[request.generated]
                self._engine.feed(request.slot, token)
            request.tokens.append(token)
            wanted = run.sampling.logprobs
            logprob = None if wanted is None else logprob_of(logits[row], token, wanted)
            steps.append(Step(run.sequence, token, logprob))
            if run.forced is None and token in run.eos and not run.sampling.ignore_eos:
                finished.append((request, "stop"))
            elif request.generated >= run.sampling.max_tokens:
                finished.append((request, "length"))
        self._report(Stepped(steps))
        for request, reason in finished:
            self._finish(request, reason)

    # -------------------------------------------------------------------------------------- leaving

    def _commit(self, request: Request, upto: int) -> None:
        """Tell the store which tokens its blocks hold now."""
        tokens = request.tokens[request.committed : upto]
        self._ask_store(Commit(request.run.sequence, request.committed, tokens))
        request.committed = upto

    def _finish(self, request: Request, reason: str) -> None:
        del self._requests[request.run.sequence]
        stats = NO_STATS
        if self._decoding.get(request.slot) is request:
            stats = self._engine.cache.stats(request.slot, len(request.tokens) - 1, request.steps)
        self._release(request)
        self._report(Done(request.run.sequence, reason, stats))
        self._admit()

    def _release(self, request: Request) -> None:
        if request.slot < 0:
            self._waiting.remove(request)
            return
        if request.prefill is not None:
            self._prefilling.remove(request)
        self._decoding.pop(request.slot, None)
        self._engine.release(request.slot)
        self._ask_store(Free(request.run.sequence))
        self._free_slots.append(request.slot)

    def check_integrity(self) -> None:
        """Every slot is free or used once and every list agrees with the requests.

        Raises:
            AssertionError: says what is wrong.
        """
        used = [request.slot for request in self._requests.values() if request.slot >= 0]
        slots = sorted(used + self._free_slots)
        assert slots == list(range(len(slots))), f"slots used or free more than once: {slots}"
        for slot, request in self._decoding.items():
            assert request.slot == slot, f"slot {slot} decodes a request of slot {request.slot}"
        listed = len(self._waiting) + self.running
        assert listed <= len(self._requests), f"{listed} listed of {len(self._requests)} requests"
