"""Continuous batching: requests join and leave between decode steps, prefill takes turns with decoding."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace
from torch import Tensor

from clo.gpu_worker.constraint import Constraints
from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.fair_queue import FairQueue
from clo.gpu_worker.outputs import StepHandle
from clo.gpu_worker.pacing import Pacing
from clo.gpu_worker.prompt_queue import PromptQueue
from clo.gpu_worker.sequence import Sequence, State
from clo.gpu_worker.shares import Shares
from clo.gpu_worker.side_stream import DeviceEvent
from clo.kernels.sample import LATE
from clo.runtime.wire.errors import InvalidRequest, PromptTooLong
from clo.runtime.wire.messages import (
    NO_STATS,
    Abort,
    Allocate,
    Allocated,
    CacheStats,
    Commit,
    Denied,
    Done,
    Free,
    FromWorker,
    Grow,
    Grown,
    Prefilled,
    PromptScored,
    Reason,
    Refused,
    Run,
    Step,
    Stepped,
    ToStore,
)

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.25
_ROOM = 64  # tokens, and steps in which the store can answer who asks for its next block
_SCORES = 4096  # log-probabilities of a message
_REASON_CHARACTERS = 300
_BESIDE_PROMPTS = 1  # more steps on their way: launching units takes milliseconds, and the host may be late


@dataclass(frozen=True)
class InFlightStep:
    """A step on its way: whose tokens it brings, and logits [vocab] where log-probabilities are wanted."""

    handle: StepHandle
    sequences: list[Sequence]
    logits: dict[int, Tensor]  # by sequence
    event: DeviceEvent | None  # the logits are complete then


class Scheduler:
    """Which request does what next. Talks to the router and the store through two callables.

    A sequence waits for a slot, for which clients take turns, then for its blocks, which the store grants,
    prefills and decodes; see ``clo.gpu_worker.sequence``. It begins with blocks for its prompt and the first
    tokens of its answer, and asks for another one when its last is nearly full. Where there are none, the
    youngest is preempted: it gives back slot and blocks, and begins again before all that wait, with a prompt
    that its answer is a part of. Its client sees a pause. Committed blocks of its prompt are likely to be
    there still.

    A sequence with a grammar takes part in every step as the others do. While a step runs, threads compute
    what may follow the token before, and the step looks at that when it draws. Nobody waits for them: where
    they are late the sequence draws nothing in that step and repeats it.

    Args:
        engine: does the computing.
        max_tokens: longest sequence.
        blocks: of the store.
        pacing: says how much prefill goes between two decode steps.
        report: takes messages for the router.
        ask_store: takes messages for the store.
        drift_check: compares some steps with full attention.
        constraints: makes grammars; None for none.
    """

    def __init__(
        self,
        engine: Engine,
        max_tokens: int,
        blocks: int,
        pacing: Pacing,
        report: Callable[[FromWorker], None],
        ask_store: Callable[[ToStore], None],
        drift_check: DriftCheck | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self._constraints = constraints
        self._compiling: list[Sequence] = []
        self._constrained: list[Sequence] = []  # those that decode with a grammar
        self._engine, self._max_tokens, self._drift_check = engine, max_tokens, drift_check
        self._pacing = pacing
        self._block_tokens = engine.decoder.shape.block_tokens
        self._room = min(_ROOM, self._block_tokens)
        # When a token has come from the first rank, the others may still be storing that step's rows.
        self._behind = 0 if engine.decoder.group is None else 1
        self._report, self._ask_store = report, ask_store
        self._free_slots = list(range(engine.slots))
        self._sequences: dict[int, Sequence] = {}  # by id; all that are not GONE
        self._arrived = 0
        self._waiting = FairQueue()
        self._shares = Shares(engine.slots, blocks)
        self._prompts = PromptQueue(engine, max_tokens)
        self._decoding: dict[int, Sequence] = {}  # by slot
        self._releasing: list[Sequence] = []
        self._in_flight: deque[InFlightStep] = deque()
        self._owed = 0.0  # floating-point operations of prompts to launch before the next step
        self.steps = 0
        self.generated = 0
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        """Whether ``advance`` has work to do."""
        work = (self._prompts, self._decoding, self._in_flight, self._releasing, self._compiling)
        return any(map(bool, work))

    @property
    def running(self) -> int:
        """Sequences that hold blocks."""
        working = (State.PREFILLING, State.DECODING, State.DRAINING)
        return sum(sequence.state in working for sequence in self._sequences.values())

    @property
    def decoding(self) -> int:
        """Sequences among these whose prompts are complete."""
        answering = (State.DECODING, State.DRAINING)
        return sum(sequence.state in answering for sequence in self._sequences.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait for their grammar, for a slot or for blocks."""
        pending = (State.COMPILING, State.WAITING, State.ALLOCATING)
        return sum(sequence.state in pending for sequence in self._sequences.values())

    # ------------------------------------------------------------------------- from router and store

    def add(self, run: Run) -> None:
        """Take a request; it is refused at once where it could never run."""
        prompt, grammar = len(run.tokens) - run.answered, run.sampling.grammar
        longest = prompt + run.sampling.max_tokens
        if prompt < 1 or longest > self._max_tokens:
            text = f"{longest} tokens with the prompt; the longest sequence is {self._max_tokens}."
            self._report(Refused(run.sequence, PromptTooLong.code, text))
            return
        if grammar is None:
            sequence = Sequence(run, self._arrived)
            self._waiting.append(sequence)
        elif self._constraints is None or self._constraints.missing:
            reason = "it has none" if self._constraints is None else self._constraints.missing
            text = f"This server has no structured output: {reason}."
            self._report(Refused(run.sequence, InvalidRequest.code, text))
            return
        else:
            sequence = Sequence(run, self._arrived, self._constraints.begin(grammar, run.tokens[prompt:]))
            self._compiling.append(sequence)
        self._arrived += 1
        self._sequences[sequence.id] = sequence
        self._shares.ask(run.client)
        self._give_slots()

    def abort(self, message: Abort) -> None:
        """End a request now, wherever it is."""
        sequence = self._sequences.get(message.sequence)
        if sequence is not None and sequence.preempted:
            sequence.preempted, sequence.reason = False, "cancelled"
        elif sequence is not None and sequence.state is not State.RELEASING:
            self._finish(sequence, "cancelled")

    def granted(self, message: Allocated) -> None:
        """The store gave blocks: the prefill can begin."""
        sequence = self._sequences.get(message.sequence)
        if sequence is None or sequence.state is not State.ALLOCATING:
            return  # cancelled meanwhile; its Free is on the way
        sequence.blocks = message.blocks
        sequence.cached = sequence.committed = message.cached * self._block_tokens
        sequence.move(State.PREFILLING)
        self._prompts.add(sequence)

    def grown(self, message: Grown) -> None:
        """The store gave further blocks, or has none."""
        sequence = self._sequences.get(message.sequence)
        if sequence is None or not sequence.growing:
            return  # it has ended, or been preempted, and its Free is on the way
        if message.blocks:
            sequence.growing = sequence.starving = False
            sequence.blocks = sequence.blocks + message.blocks  # the engine has the former list
            if sequence.state is State.DECODING:
                self._engine.extend(sequence.slot, message.blocks)
        elif sequence.state is State.DECODING:  # others take no further step, and so need none
            sequence.starving = True
            self._preempt_youngest()

    def freed(self) -> None:
        """The store has blocks back, and has given them to those who grow."""
        if any(sequence.starving for sequence in self._decoding.values()):
            self._preempt_youngest()

    def denied(self, message: Denied) -> None:
        """The store refused a message. Only an ``Allocate`` is about whether a request can run."""
        sequence = self._sequences.get(message.sequence)
        if message.answers != Allocate.__name__ or sequence is None or sequence.state is not State.ALLOCATING:
            logger.error("The KV store denied %s: %s", message.answers, message.text)
            return
        self._give_back(sequence)
        sequence.move(State.GONE)
        del self._sequences[sequence.id]
        self._report(Refused(message.sequence, message.code, message.text))
        self._give_slots()

    def _give_slots(self) -> None:
        # The slot comes before the blocks: a sequence that holds blocks without a slot would keep them from
        # those that could use them, while a slot that waits for blocks hardly keeps anybody out, since only
        # small requests pass those for which the store has too few.
        while self._free_slots and (sequence := self._waiting.pop(self._may_run)) is not None:
            sequence.slot = min(self._free_slots)
            self._free_slots.remove(sequence.slot)
            sequence.move(State.ALLOCATING)
            sequence.asked = self._first_blocks(sequence)
            self._shares.take(sequence.run.client, sequence.asked)
            run, own = sequence.run, self._prompts.own_tokens(sequence)
            most = self._blocks(sequence.longest)
            self._ask_store(
                Allocate(sequence.id, sequence.asked, run.tokens, own, run.sampling.cache_salt, most)
            )

    def _may_run(self, sequence: Sequence) -> bool:
        return self._shares.may_take(sequence.run.client, self._first_blocks(sequence))

    def _blocks(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self._block_tokens)

    def _first_blocks(self, sequence: Sequence) -> int:
        """Blocks that a sequence begins with: it can generate some tokens, in which time the next one
        comes."""
        return self._blocks(min(len(sequence.tokens) + self._room, sequence.longest))

    def _give_back(self, sequence: Sequence) -> None:
        """A sequence no longer has its slot."""
        self._free_slots.append(sequence.slot)
        self._shares.give_back(sequence.run.client, sequence.asked)

    # ----------------------------------------------------------------------------------------- work

    def advance(self) -> bool:
        """Prefill a little, launch a step, take in what arrived; False if all of it waits for the device."""
        self._pacing.look()
        self._give_slots()  # others may have asked for nothing for a while
        moved = self._look_at_constraints()
        depth = self._engine.depth + (_BESIDE_PROMPTS if self._prompts else 0)
        room = len(self._in_flight) < depth  # for a step
        if self._prompts and (room or not self._decoding):
            moved |= self._prefill()
        if room and not (self._prompts and self._owed > 0) and self._grow():
            self._launch_step()
            self._owed = self._pacing.between_steps(len(self._prompts))
            moved = True
        while self._in_flight and (tokens := self._engine.read(self._in_flight[0].handle)) is not None:
            self._process_output(self._in_flight.popleft(), tokens)
            moved = True
        return self._release_finished() or moved

    def _look_at_constraints(self) -> bool:
        """Take in what the threads of the grammars have found: sequences that may begin, texts that are
        complete, grammars that cannot be followed."""
        compiled = [s for s in self._compiling if s.constraint is not None and s.constraint.done]
        for sequence in compiled:
            assert sequence.constraint is not None
            self._compiling.remove(sequence)
            if sequence.constraint.error:
                sequence.failure = sequence.constraint.error
                self._leave(sequence, NO_STATS)
            elif sequence.constraint.complete:  # with what another worker has generated
                sequence.reason = "stop"
                self._leave(sequence, NO_STATS)
            else:
                sequence.move(State.WAITING)
                self._waiting.append(sequence)
        if compiled:
            self._give_slots()
        for sequence in self._constrained[:]:
            constraint = sequence.constraint
            assert constraint is not None
            if self._engine.depth == 1:
                constraint.wait()  # a step that begins now draws at once
            if constraint.done and (constraint.complete or constraint.error):
                sequence.failure = constraint.error
                self._finish(sequence, "stop")
        return bool(compiled)

    def _prefill(self) -> bool:
        """Launch what is owed before the next step or, where nothing decodes, one unit of any size; False if
        the device has enough to do. What it has no time for now stays owed."""
        beside = bool(self._decoding)
        moved = False
        while self._prompts and self._pacing.more:
            timer = self._engine.timer()
            unit = self._prompts.advance(self._owed if beside else math.inf)
            timer.stop()
            self._pacing.launched(timer, unit.flops)
            self._report_progress(unit.sequences)
            if unit.logits is not None:
                self._start(unit.sequences, unit.logits)
            moved = True
            self._owed -= unit.flops
            if not beside or self._owed <= 0:
                break
        return moved

    def _report_progress(self, sequences: list[Sequence]) -> None:
        now = time.monotonic()
        for sequence in sequences:
            prefill, total = sequence.prefill, len(sequence.run.tokens)
            if prefill is None:  # it is complete
                self._report(Prefilled(sequence.id, total, total))
            elif now - sequence.reported >= PROGRESS_SECONDS:
                sequence.reported = now
                self._report(Prefilled(sequence.id, prefill.done, total))

    def _start(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Sequences whose prompts are complete decode from now on, but those that are only scored."""
        for sequence in sequences:
            run, slot = sequence.run, sequence.slot
            sequence.move(State.DECODING)
            self._engine.activate(slot, len(run.tokens), run.sampling, run.seed)
            if run.sampling.max_tokens == 0:  # it is alone, as its prompt was not computed with others
                self._finish(sequence, "length")
                return
            self._decoding[slot] = sequence
            if run.sampling.adjusts:
                prompt, answer = run.tokens[: sequence.prompt], run.tokens[sequence.prompt :]
                self._engine.adjust(slot, run.sampling, prompt, sequence.ends, answer)
            if sequence.constraint is not None:
                self._engine.constrain(slot, sequence.constraint.mask, len(run.tokens))
                self._constrained.append(sequence)
        handle = self._engine.start([sequence.slot for sequence in sequences], logits)
        self._track(handle, sequences)

    def _grow(self) -> bool:
        """Ask for blocks for those whose last one is nearly full; whether a step can be launched. Who has no
        room for its next token, as the store is late, is preempted rather than waited for."""
        for sequence in list(self._decoding.values()):
            tokens, room = sequence.prompt + sequence.launched, len(sequence.blocks) * self._block_tokens
            if tokens > room:
                self._preempt(sequence)
            elif tokens > room - self._room and not sequence.growing and room < sequence.longest:
                sequence.growing = True
                sequence.asked += 1
                self._shares.grow(sequence.run.client, 1)
                self._ask_store(Grow(sequence.id, 1))
        return bool(self._decoding)

    def _preempt_youngest(self) -> None:
        """Make room for those that grow, unless somebody is leaving already."""
        if self._releasing:
            return
        states = (State.PREFILLING, State.DECODING)
        holders = [sequence for sequence in self._sequences.values() if sequence.state in states]
        self._preempt(max(holders, key=lambda sequence: sequence.number))

    def _preempt(self, sequence: Sequence) -> None:
        """Take slot and blocks from a sequence that is to go on later."""
        logger.info("Sequence %d is preempted; there are no blocks.", sequence.id)
        self.preemptions += 1
        sequence.preempted, sequence.growing, sequence.starving = True, False, False
        self._vacate(sequence)

    def _begin_again(self, sequence: Sequence) -> None:
        """A sequence that was preempted holds nothing any more; it is the next one."""
        run, tokens = sequence.run, sequence.tokens
        sampling = run.sampling
        if sampling.prompt_logprobs is not None and sequence.generated > run.answered:  # they are known
            sampling = replace(sampling, prompt_logprobs=None)
        again = replace(run, tokens=tokens, sampling=sampling, answered=len(tokens) - sequence.prompt)
        constraint = None
        if sampling.grammar is not None:
            assert self._constraints is not None
            constraint = self._constraints.begin(sampling.grammar, tokens[sequence.prompt :])
        following = Sequence(again, sequence.number, constraint)
        self._sequences[sequence.id] = following
        if constraint is None:
            self._waiting.prepend(following)
        else:
            self._compiling.append(following)

    def _launch_step(self) -> None:
        sequences = [self._decoding[slot] for slot in sorted(self._decoding)]
        lengths = {sequence.slot: sequence.prompt + sequence.launched for sequence in sequences}
        if self._drift_check is not None:
            self._drift_check.before(lengths)
        timer = self._engine.timer() if self._prompts else None
        handle = self._engine.step(list(lengths), max(lengths.values()))
        if timer is not None:
            timer.stop()
            self._pacing.launched_step(timer)
        if self._drift_check is not None:
            self._drift_check.after(handle)
        self.steps += 1
        for sequence in sequences:
            sequence.steps += 1
        self._track(handle, sequences)

    def _track(self, handle: StepHandle, sequences: list[Sequence]) -> None:
        """Record what is on its way, and set what the next step has to know before the tokens arrive."""
        logits: dict[int, Tensor] = {}
        for row, sequence in zip(handle.rows, sequences, strict=True):
            run = sequence.run
            if run.forced is not None:
                self._engine.feed(sequence.slot, run.forced[sequence.launched])
            if run.sampling.logprobs is not None:
                logits[sequence.id] = handle.logits[row].clone()
            sequence.launched += 1
            # one with a grammar may have to repeat its last step
            if sequence.launched == run.sampling.max_tokens and sequence.constraint is None:
                self._retire(sequence)
                sequence.move(State.DRAINING)
        event = self._engine.event() if logits else None
        self._in_flight.append(InFlightStep(handle, sequences, logits, event))

    def _process_output(self, step: InFlightStep, drawn: list[int]) -> None:
        """Report the tokens of a step together, end the requests that are complete."""
        steps = []
        for sequence, token in zip(step.sequences, drawn, strict=True):
            run = sequence.run
            if sequence.reason is not None or sequence.preempted:  # while this step was on its way
                continue
            if token == LATE:
                sequence.launched -= 1
                continue
            self._report_scores(sequence)
            if sequence.committed == sequence.cached:
                self._commit(sequence, len(sequence.tokens))
            stored = len(sequence.tokens) - self._behind
            if stored > sequence.committed and stored % self._block_tokens == 0:
                self._commit(sequence, stored)
            if run.forced is not None:
                token = run.forced[sequence.generated]
            sequence.tokens.append(token)
            self.generated += 1
            wanted, logprob = run.sampling.logprobs, None
            if wanted is not None and step.event is not None:
                logprob = self._engine.logprob(step.logits[sequence.id], step.event, token, wanted)
            steps.append(Step(sequence.id, token, logprob))
            if run.forced is None and token in sequence.ends:
                sequence.reason = "stop"
            elif sequence.generated >= run.sampling.max_tokens:
                sequence.reason = "length"
            elif sequence.constraint is not None:
                publish = partial(self._engine.constrain, sequence.slot)
                sequence.constraint.advance(token, len(sequence.tokens), publish)
        if steps:
            self._report(Stepped(steps))
        for sequence in step.sequences:
            if sequence.reason is not None and sequence.state in (State.DECODING, State.DRAINING):
                self._finish(sequence, sequence.reason)

    def _report_scores(self, sequence: Sequence) -> None:
        """Report what the model thought of a prompt; the device is done with it."""
        if sequence.scores is None:
            return
        scores = sequence.scores.read()
        sequence.scores = None
        for first in range(0, max(1, len(scores)), _SCORES):
            self._report(PromptScored(sequence.id, 1 + first, scores[first : first + _SCORES]))

    # -------------------------------------------------------------------------------------- leaving

    def _commit(self, sequence: Sequence, count: int) -> None:
        """Tell the store that its blocks hold the first ``count`` tokens now."""
        tokens = sequence.tokens[sequence.committed : count]
        self._ask_store(Commit(sequence.id, sequence.committed, tokens))
        sequence.committed = count

    def _retire(self, sequence: Sequence) -> None:
        """No further step for the sequence."""
        self._decoding.pop(sequence.slot, None)
        sequence.release = self._engine.retire(sequence.slot)

    def _finish(self, sequence: Sequence, reason: Reason) -> None:
        """End a sequence; its slot and blocks are free once the device has left them."""
        sequence.reason = reason
        if sequence.state in (State.COMPILING, State.WAITING):
            (self._compiling if sequence.state is State.COMPILING else self._waiting).remove(sequence)
            self._leave(sequence, NO_STATS)
            return
        self._vacate(sequence)
        self._release_finished()

    def _vacate(self, sequence: Sequence) -> None:
        """No further work for a sequence that has a slot; it is released once the device has left it."""
        if sequence in self._constrained:
            self._constrained.remove(sequence)
        if sequence.state is State.PREFILLING:
            self._prompts.remove(sequence)
            self._engine.leave_prompt()  # its blocks are free only when nothing is written to them
        if sequence.state is not State.DRAINING:
            self._retire(sequence)
        sequence.move(State.RELEASING)
        self._releasing.append(sequence)

    def _release_finished(self) -> bool:
        """Free what the sequences held whose last step is over."""
        gone = [
            sequence
            for sequence in self._releasing
            if sequence.release
            and sequence.release.event.reached
            and (sequence.constraint is None or sequence.constraint.done)  # it writes to the slot's mask
        ]
        for sequence in gone:
            assert sequence.release is not None
            self._releasing.remove(sequence)
            if sequence.reason == "length":  # also where nothing was generated
                self._report_scores(sequence)
            self._ask_store(Free(sequence.id))
            self._give_back(sequence)
            if sequence.preempted:
                sequence.move(State.GONE)
                self._begin_again(sequence)
                continue
            stats = sequence.release.finish(len(sequence.tokens) - 1, sequence.steps)
            self._leave(sequence, replace(stats, cached_tokens=sequence.cached))
        if gone:
            self._give_slots()
        return bool(gone)

    def _leave(self, sequence: Sequence, stats: CacheStats) -> None:
        """The last report of a sequence, which holds nothing any more."""
        sequence.move(State.GONE)
        del self._sequences[sequence.id]
        if sequence.failure:
            reason = " ".join(sequence.failure.split())[:_REASON_CHARACTERS].rstrip(".")
            text = f"The answer cannot follow structured_outputs any further: {reason}."
            self._report(Refused(sequence.id, InvalidRequest.code, text))
        else:
            assert sequence.reason is not None
            self._report(Done(sequence.id, sequence.reason, stats))

    def check_integrity(self) -> None:
        """Every slot is free or used once, and every list agrees with the states.

        Raises:
            AssertionError: says what is wrong.
        """
        sequences = self._sequences.values()
        placed = [s.slot for s in sequences if s.state not in (State.COMPILING, State.WAITING)]
        slots = sorted(placed + self._free_slots)
        assert slots == list(range(self._engine.slots)), f"slots used or free more than once: {slots}"
        taken, held = self._engine.slots - len(self._free_slots), self._shares.slots
        assert taken == held, f"{taken} slots are in use, of which clients have {held}"
        for slot, sequence in self._decoding.items():
            assert sequence.slot == slot, f"slot {slot} decodes a sequence of slot {sequence.slot}"
        for state, listed in (
            (State.COMPILING, self._compiling),
            (State.WAITING, self._waiting),
            (State.PREFILLING, self._prompts),
            (State.DECODING, self._decoding.values()),
            (State.RELEASING, self._releasing),
        ):
            expected = {s.id for s in sequences if s.state is state}
            assert {s.id for s in listed} == expected, f"{state.name}: {sorted(s.id for s in listed)} listed"
        self._engine.check_integrity()
