"""The prompts of a worker: which one is computed next, and which ones together."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from clo.gpu_worker.cache.layer import PROMPT_QUERIES
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.sequence import Sequence


class Unit(NamedTuple):
    """Work that was launched: its floating-point operations, the sequences that it was for and, where their
    prompts are complete, their logits [len(sequences), vocab]."""

    flops: float
    sequences: list[Sequence]
    logits: Tensor | None


def beside_tokens(max_tokens: int) -> int:
    """Tokens of longer prompts that may be in progress beside another one; ``max_tokens`` is the longest."""
    return max_tokens // 4


class PromptQueue:
    """Sequences whose prompts wait or are being computed, in the order in which they came.

    Short prompts are computed several at a time, as one CUDA graph. Units of longer ones take turns: every
    second one goes to the prompt that came first, the others to the one that has the least left, so that a
    prompt waits neither for a much longer one nor for ever. There is memory for one prompt of any length, and
    for some tokens beside it.

    Args:
        engine: does the computing.
        max_tokens: longest sequence.
    """

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self._engine, self._beside = engine, beside_tokens(max_tokens)
        self._waiting: list[Sequence] = []
        self._main: Sequence | None = None  # may have any length
        self._oldest_next = True

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """A sequence has slot and blocks."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence ends before its prompt is complete."""
        self._waiting.remove(sequence)
        sequence.prefill = None

    def advance(self, flops: float) -> Unit:
        """Launch a unit of about so many floating-point operations, or the least that there is."""
        sequence = self._next()
        if self._short(sequence):
            return self._together(sequence, flops)
        if sequence.prefill is None:
            score = sequence.run.sampling.prompt_logprobs
            sequence.prefill = self._engine.prefill(
                sequence.slot, sequence.run.tokens, sequence.blocks, score=score, cached=sequence.cached
            )
            sequence.scores = sequence.prefill.scores
        tokens, flops = sequence.prefill.unit(flops)
        logits = self._engine.advance(sequence.slot, sequence.prefill, tokens)
        if logits is not None:
            self.remove(sequence)
        return Unit(flops, [sequence], logits)

    def own_tokens(self, sequence: Sequence) -> int:
        """Last tokens of a prompt that are computed even where their rows are there already: those whose
        queries choose the resident rows, and all of a prompt that is scored or computed at once."""
        whole = self._short(sequence) or sequence.run.sampling.prompt_logprobs is not None
        return len(sequence.run.tokens) if whole else PROMPT_QUERIES

    def _short(self, sequence: Sequence) -> bool:
        if sequence.run.sampling.prompt_logprobs is not None:  # a graph keeps the last tokens' logits alone
            return False
        return len(sequence.run.tokens) <= self._engine.prompt_graphs.longest

    def _next(self) -> Sequence:
        ready = self._ready()
        oldest, self._oldest_next = self._oldest_next, not self._oldest_next
        return ready[0] if oldest else min(ready, key=self._left)

    def _ready(self) -> list[Sequence]:
        """Those for which there is memory, at least one."""
        longer = [sequence for sequence in self._waiting if not self._short(sequence)]
        if self._main not in longer:
            self._main = next((sequence for sequence in longer if sequence.prefill is None), None)
        beside = [sequence for sequence in longer if sequence.prefill and sequence is not self._main]
        room = self._beside - sum(len(sequence.run.tokens) for sequence in beside)
        return [
            sequence
            for sequence in self._waiting
            if sequence.prefill
            or sequence is self._main
            or self._short(sequence)
            or len(sequence.run.tokens) <= room
        ]

    def _left(self, sequence: Sequence) -> float:
        """Work that is left of a prompt."""
        if sequence.prefill is not None:
            return sequence.prefill.remaining_flops
        decoder = self._engine.decoder
        left = len(sequence.run.tokens) - sequence.cached
        return decoder.shape.layers * decoder.layer_flops(left, sequence.cached)

    def _together(self, chosen: Sequence, flops: float) -> Unit:
        """A short prompt, and others that fit into the same work, in the order in which they came."""
        graphs, taken, total = self._engine.prompt_graphs, [chosen], len(chosen.run.tokens)
        for sequence in self._waiting:
            if len(taken) == graphs.most:
                break
            size = graphs.size(total + len(sequence.run.tokens))
            if sequence is chosen or not self._short(sequence) or size is None or self._work(size) > flops:
                continue
            taken.append(sequence)
            total += len(sequence.run.tokens)
        logits = self._engine.prefill_short(
            [sequence.slot for sequence in taken],
            [sequence.run.tokens for sequence in taken],
            [sequence.blocks for sequence in taken],
        )
        for sequence in taken:
            self.remove(sequence)
        size = graphs.size(total)
        assert size is not None
        return Unit(self._work(size), taken, logits)

    def _work(self, size: int) -> float:
        """Floating-point operations of a graph of ``size`` tokens."""
        decoder = self._engine.decoder
        return decoder.shape.layers * decoder.layer_flops(size, 0)
