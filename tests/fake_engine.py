"""An engine that computes nothing, two steps deep, whose device gets on only as far as a test says.

The token that follows token n is n + 1. What is launched stands in one queue, as the work of a GPU does, and
``finish`` completes it from the front. The engine complains where a step finds other slots than those in use,
or where a slot goes to a sequence while work on the former one is still in the queue.
"""

import numpy as np
import torch
from torch import Tensor

from clo.gpu_worker.outputs import StepHandle
from clo.kernels.sample import LATE
from clo.runtime.wire.messages import CacheStats, Logprob, Sampling

SLOTS, BLOCK_TOKENS, MAX_TOKENS = 3, 4, 48
UNITS = 3  # of a prefill
UNIT_FLOPS = 10.0  # of each unit
SECONDS = 0.001  # that each measured piece of work takes


class Event:
    """The end of the work launched so far, and of nothing that comes later."""

    def __init__(self, engine: "FakeEngine") -> None:
        self._engine, self._number = engine, engine.launch()

    @property
    def reached(self) -> bool:
        return self._engine.done >= self._number

    def wait(self) -> None:
        self._engine.done = max(self._engine.done, self._number)


class FakeTimer:
    """A piece of work that takes ``SECONDS``."""

    def __init__(self, engine: "FakeEngine") -> None:
        self._engine, self._number = engine, 0

    def stop(self) -> None:
        self._number = self._engine.launched

    @property
    def seconds(self) -> float | None:
        return SECONDS if self._engine.done >= self._number else None


class FakeGraphs:
    """Prefill of prompts up to ``longest`` tokens; none unless a test says so."""

    longest, most = 0, 2

    def size(self, tokens: int) -> int | None:
        return next((size for size in (4, 8, 16) if size >= tokens), None)


class FakeScores:
    """What the model thought of a prompt: minus its own number of each token."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def read(self) -> list[Logprob]:
        return [Logprob(token, -float(token), []) for token in self._tokens[1:]]


class FakePrefill:
    def __init__(self, engine: "FakeEngine", slot: int, tokens: list[int], score: int | None) -> None:
        self._engine, self._slot, self._tokens = engine, slot, tokens
        self.scores = None if score is None else FakeScores(tokens)
        self._units = 0
        self.total = len(tokens)

    @property
    def done(self) -> int:
        return self._units * self.total // UNITS

    @property
    def remaining_flops(self) -> float:
        return (UNITS - self._units) * UNIT_FLOPS * self.total

    def unit(self, flops: float) -> tuple[int, float]:
        return max(1, self.total // UNITS), UNIT_FLOPS

    def advance(self, tokens: int | None = None) -> Tensor | None:
        assert self._engine.owner[self._slot] is self, "the prefill of a sequence that has ended goes on"
        assert self._units < UNITS
        self._units += 1
        self._engine.launch(self._slot)
        self._engine.log.append("unit")
        self._engine.units.append(self._slot)
        return torch.tensor([[self._tokens[-1] + 1.0]]) if self._units == UNITS else None


class FakeRelease:
    def __init__(self, engine: "FakeEngine", slot: int) -> None:
        self._engine, self._slot = engine, slot
        self.event = Event(engine)

    def finish(self, tokens: int, steps: int) -> CacheStats:
        assert self.event.reached, "the counters are not there yet"
        return CacheStats(steps, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, tokens, 0)


class FakeEngine:
    """See the head of this file; ``log`` names what was launched, in order.

    A slot's state is what the device has once it comes to the end of its queue, as kernels see it.
    """

    depth = 2

    def __init__(self, group: object = None) -> None:
        self.slots, self.group = SLOTS, group
        self.decoder = self.cache = self.shape = self  # all that the scheduler looks at is here
        self.block_tokens, self.layers = BLOCK_TOKENS, UNITS
        self.prompt_graphs = FakeGraphs()
        self.units: list[int] = []  # slots of the units of prefill, in order
        self.together: list[list[int]] = []  # slots of each batch of short prompts
        self.launched = self.done = 0
        self.owner: dict[int, object] = {}  # slot -> its prefill, then True while it decodes
        self.last_use = [0] * SLOTS  # number of the last work that touches a slot
        self.lengths: dict[int, int] = {}  # of decoding slots
        self.room: dict[int, int] = {}  # tokens that a slot has blocks for
        self.tokens: dict[int, int] = {}
        self.log: list[str] = []
        self.joined = 0
        self.activated: list[tuple[Sampling, int]] = []  # with their seeds
        self.adjusted: list[tuple[int, list[int], list[int], list[int]]] = []  # with prompts, ends, answers
        self.masks: dict[int, tuple[set[int], int]] = {}  # what may follow in a slot, and after which length
        self._mail: dict[int, list[int]] = {}  # work number -> drawn tokens, by slot
        self._logits = torch.zeros(SLOTS, 1)  # one buffer, as a graph has

    def launch(self, *slots: int) -> int:
        """Put one piece of work at the end of the queue; returns its number."""
        self.launched += 1
        for slot in slots:
            self.last_use[slot] = self.launched
        return self.launched

    def finish(self, count: int | None = None) -> None:
        """The device completes ``count`` pieces of work, or all."""
        self.done = self.launched if count is None else min(self.launched, self.done + count)

    # what the scheduler calls

    def prefill(
        self,
        slot: int,
        tokens: list[int],
        blocks: list[int],
        score: int | None = None,
        cached: int = 0,
    ) -> FakePrefill:
        assert cached % BLOCK_TOKENS == 0 and cached < len(tokens)
        assert slot not in self.owner and slot not in self.lengths, f"slot {slot} is in use"
        assert self.last_use[slot] <= self.done, f"slot {slot} is given away while work on it is in the queue"
        assert len(blocks) * BLOCK_TOKENS >= len(tokens)
        self.room[slot] = len(blocks) * BLOCK_TOKENS
        self.owner[slot] = prefill = FakePrefill(self, slot, tokens, score)
        return prefill

    def advance(self, slot: int, prefill: FakePrefill, tokens: int) -> Tensor | None:
        return prefill.advance(tokens)

    def extend(self, slot: int, blocks: list[int]) -> None:
        assert slot in self.lengths, "the slot is not in use"
        self.room[slot] += len(blocks) * BLOCK_TOKENS

    def prefill_short(self, slots: list[int], tokens: list[list[int]], blocks: list[list[int]]) -> Tensor:
        assert sum(len(ids) for ids in tokens) <= 16 and len(slots) <= self.prompt_graphs.most
        for slot, ids, held in zip(slots, tokens, blocks, strict=True):
            assert len(ids) <= self.prompt_graphs.longest
            self.prefill(slot, ids, held)
        self.launch(*slots)
        self.log.append("short")
        self.together.append(slots)
        return torch.tensor([[ids[-1] + 1.0] for ids in tokens])

    def layer_flops(self, tokens: int, before: int) -> float:
        return UNIT_FLOPS * tokens

    def timer(self) -> FakeTimer:
        return FakeTimer(self)

    def activate(self, slot: int, length: int, sampling: Sampling, seed: int) -> None:
        assert isinstance(self.owner[slot], FakePrefill) and slot not in self.lengths
        self.lengths[slot] = length
        self.activated.append((sampling, seed))

    def adjust(
        self, slot: int, sampling: Sampling, prompt: list[int], ends: list[int], answer: list[int]
    ) -> None:
        assert slot in self.lengths
        self.adjusted.append((slot, prompt, ends, answer))

    def constrain(self, slot: int, mask: np.ndarray, length: int) -> None:
        if slot in self.lengths:
            self.masks[slot] = set(mask.tolist()), length
        else:
            assert slot not in self.owner, "the slot has gone to another sequence"

    def start(self, slots: list[int], logits: Tensor) -> StepHandle:
        assert len(logits) == len(slots)
        drawn = [int(token) for token in logits[:, 0]]
        for place, slot in enumerate(slots):
            if slot in self.masks:
                allowed, length = self.masks[slot]
                assert length == self.lengths[slot], "the first mask is there before the first draw"
                drawn[place] = min(allowed)
        self.tokens.update(zip(slots, drawn, strict=True))
        number = self.launch(*slots)
        self._mail[number] = drawn
        self.log.append("start")
        return StepHandle(number, list(range(len(slots))), logits)

    def step(self, slots: list[int], longest: int) -> StepHandle:
        assert slots == sorted(self.lengths), "a step takes all slots in use, and no other"
        number = self.launch(*slots)
        drawn = dict.fromkeys(range(SLOTS), -7)
        for slot in slots:
            allowed, length = self.masks.get(slot, ({self.tokens[slot] + 1}, self.lengths[slot] + 1))
            if length != self.lengths[slot] + 1:  # the mask is late, so the step is repeated
                assert length <= self.lengths[slot]
                drawn[slot] = LATE
                continue
            self.lengths[slot] += 1
            assert self.lengths[slot] <= self.room[slot], "there is no block for the token's row"
            self.tokens[slot] = drawn[slot] = min(allowed)
            self._logits[slot] = self.tokens[slot]
        assert longest == max(self.lengths.values()) or self.masks
        assert longest <= MAX_TOKENS
        self._mail[number] = list(drawn.values())
        on_way = [step for step in self._mail if step > self.done]
        assert len(on_way) <= self.depth + 1 + SLOTS
        self.log.append("step")
        return StepHandle(number, slots, self._logits)

    def feed(self, slot: int, token: int) -> None:
        assert slot in self.lengths
        self.tokens[slot] = token

    def read(self, handle: StepHandle) -> list[int] | None:
        if handle.number > self.done:
            return None
        drawn = self._mail.pop(handle.number)
        return [drawn[row] for row in handle.rows]

    def event(self) -> Event:
        return Event(self)

    def logprob(self, logits: Tensor, event: Event, token: int, top: int) -> Logprob:
        event.wait()
        return Logprob(token, float(logits[0]), [(token, 0.0)] * top)

    def retire(self, slot: int) -> FakeRelease:
        self.lengths.pop(slot, None)
        self.owner.pop(slot, None)
        self.masks.pop(slot, None)
        return FakeRelease(self, slot)

    def join_prompts(self) -> None:
        self.joined += 1

    def leave_prompt(self) -> None:
        self.join_prompts()

    def check_integrity(self) -> None:
        assert self.lengths.keys() <= self.owner.keys()
