"""Answers forced through a worker's decode step, beside one full-attention pass over the same tokens.

The pass goes over prompt and answer at once. Attention is causal, so it leaves the prompt's rows in the arena
just as a prefill of the prompt alone does, and every cache takes the prompt from there: a prompt is computed
once, however many caches are measured on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.tasks import Item
from gpu_worker.cache import PROMPT_QUERIES, Batch, KVCache
from gpu_worker.engine import Engine
from gpu_worker.model import Decoder
from gpu_worker.prediction import measure_sources
from gpu_worker.prefill import Prefill
from gpu_worker.shape import KVShape
from kernels.attend import attend_all
from kernels.paging import gather_tokens
from kernels.select import Fresh, choose
from runtime.config import CacheConfig
from tests.reference import GREEDY

FULL = CacheConfig(attention="full")
Numbers = NDArray[numpy.float64]


@dataclass(frozen=True)
class Scores:
    """Figures of each forced token but the first, which no decode step predicts: [items, N - 1].

    ``kl`` is KL(full || cache) in nats; ``loss`` the negative log-likelihood; ``agree`` is 1 where the most
    likely token is that of full attention, ``right`` where it is the answer's. Past the end of an item's
    answer everything is NaN.
    """

    kl: Numbers
    loss: Numbers
    agree: Numbers
    right: Numbers


class Heads(NamedTuple):
    """What each head does in the mean step: each [layers, kv_heads]."""

    hits: Tensor  # share of selected rows that were resident
    errors: Tensor  # |cache - full| / |full| of the outputs of a query group
    late: Tensor  # rows that its query wants and that are neither resident nor on their way


class Reference:
    """Prompts in an arena, and what full attention says about their answers.

    The arena lies on the model's device: where rows come from does not change what is computed.

    Args:
        decoder: the model.
        items: answers have two tokens or more; longer ones than ``tokens`` are cut.
        tokens: N, of each answer at most.
    """

    def __init__(self, decoder: Decoder, items: list[Item], tokens: int) -> None:
        self.decoder, self.items = decoder, items
        shape, device = decoder.shape, decoder.device
        self.max_tokens = max(len(item.prompt) + len(item.answer[:tokens]) for item in items)
        pages = -(-self.max_tokens // shape.block_tokens)
        self.table = torch.arange(len(items) * pages, device=device).view(len(items), pages)
        self.arena = torch.zeros(
            self.table.numel(), shape.layers, shape.kv_heads, shape.block_tokens, 2, shape.head_dim,
            dtype=shape.dtype, device=device,
        )  # fmt: skip
        self.queries = torch.zeros(
            len(items), shape.layers, PROMPT_QUERIES, shape.query_heads, shape.head_dim,
            dtype=shape.dtype, device=device,
        )  # fmt: skip
        steps = max(len(item.answer[:tokens]) for item in items)
        self.answers = torch.zeros(len(items), steps, dtype=torch.int64, device=device)
        self.logits = torch.zeros(len(items), steps, decoder.vocab, device=device)
        cache = _Pass(shape, self.arena, FULL, len(items), self.max_tokens, decoder.scale, device)
        for slot, item in enumerate(items):
            answer = item.answer[:tokens]
            self.answers[slot, : len(answer)] = torch.tensor(answer, device=device)
            self.logits[slot, : len(answer)] = self._pass(cache, slot, item.prompt + answer[:-1], len(answer))
        cache.join_prompt()
        answers = torch.tensor([len(item.answer) for item in items], device=device)
        self._sources = measure_sources(decoder)
        self._ended = torch.arange(1, steps, device=device) >= answers.unsqueeze(1)  # [items, steps]
        self.full = self._scores([self._score(step, self.logits[:, step]) for step in range(1, steps)])

    @torch.inference_mode()
    def _pass(self, cache: "_Pass", slot: int, tokens: list[int], predicted: int) -> Tensor:
        """Prefill with full attention; logits [predicted, vocab] of the last tokens."""
        work = Prefill(self.decoder, cache, slot, tokens, self.table[slot])
        if work._chunk < predicted + PROMPT_QUERIES:
            work._chunk = len(tokens)  # the last chunk has to hold the prompt's last queries
        cache.queries, cache.behind = self.queries[slot], predicted - 1
        while work.advance() is None:
            pass
        normal = self.decoder.normalise(self.decoder.shape.layers, work._hidden[-predicted:])
        return self.decoder.logits(normal)

    @torch.inference_mode()
    def engine(self, config: CacheConfig, *, probe: bool = False) -> Engine:
        """An engine whose slots hold the prompts; with ``probe``, its cache is a ``Probe``."""
        slots, decoder = len(self.items), self.decoder
        engine = Engine(decoder, self.arena, config, slots, self.max_tokens, self._sources)
        if probe:
            engine.cache = Probe(
                decoder.shape, self.arena, config, slots, self.max_tokens, decoder.scale, decoder.device
            )
        if decoder.device.type == "cuda":
            engine._capture(slots)  # before the prompts, for it takes steps, of no sequence
            torch.cuda.synchronize()
        if isinstance(engine.cache, Probe):
            engine.cache.reset()
        engine._table.copy_(self.table)
        for slot, item in enumerate(self.items):
            for layer in range(decoder.shape.layers):
                pages = gather_tokens(self.arena[:, layer], self.table[slot : slot + 1])
                rows = pages[0].transpose(0, 1)[: len(item.prompt)].contiguous()
                engine.cache.take_prompt(slot, layer, rows, self.queries[slot, layer], self.table[slot])
            engine.activate(slot, len(item.prompt), GREEDY, 0)
        return engine

    @property
    def steps(self) -> int:
        """Decode steps that force the longest answer."""
        return self.answers.shape[1] - 1

    def force(self, engine: Engine) -> Scores:
        """Feed the answers to the decode steps of a fresh ``engine``."""
        return self._scores([self._score(step, logits) for step, logits in enumerate(self.decode(engine), 1)])

    @torch.inference_mode()
    def decode(self, engine: Engine) -> Iterator[Tensor]:
        """Feed the answers to a fresh ``engine``: the logits [items, vocab] of each decode step, which the
        next step may overwrite."""
        slots = list(range(len(self.items)))
        longest = max(len(item.prompt) for item in self.items)
        for step in range(1, self.steps + 1):
            engine._tokens.copy_(self.answers[:, step - 1])
            engine._lengths.masked_fill_(self._ended[:, step - 1], 0)  # not in use any more
            if engine._graphs:
                yield engine.step(slots, longest + step).logits
            else:  # without the sampling, which takes long on the CPU
                yield engine.forward(len(slots), longest + step)

    def _score(self, step: int, logits: Tensor) -> Tensor:
        """What ``Scores`` has of one decode step, given its logits [items, vocab]: [4, items]."""
        p, q = self.logits[:, step].log_softmax(-1), logits.log_softmax(-1)
        loss = -q.gather(1, self.answers[:, step, None]).squeeze(1)
        best, target = logits.argmax(-1), self.answers[:, step]
        agree = (best == self.logits[:, step].argmax(-1)).float()
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)  # below 0 it is rounding
        return torch.stack([kl, loss, agree, (best == target).float()])

    def _scores(self, columns: list[Tensor]) -> Scores:
        """Those of all steps, past the end of an answer NaN."""
        figures = torch.stack(columns, dim=2).masked_fill(self._ended, torch.nan).cpu()
        return Scores(*figures.double().numpy())


class _Pass(KVCache):
    """Stores rows as full attention does, and keeps the queries of the end of each prompt."""

    queries: Tensor  # [layers, W, query_heads, head_dim]
    behind: int  # tokens of the answer that follow the prompt

    def take_prompt(self, slot: int, layer: int, rows: Tensor, queries: Tensor, table: Tensor) -> None:
        super().take_prompt(slot, layer, rows, queries, table)
        end = len(queries) - self.behind
        self.queries[layer] = queries[end - PROMPT_QUERIES : end]


class Probe(KVCache):
    """Compares each attention with full attention over the same rows, and what a prefetch brings with what
    the query itself wants, for sequences that are all in use."""

    def __init__(
        self,
        shape: KVShape,
        arena: Tensor,
        config: CacheConfig,
        slots: int,
        max_tokens: int,
        scale: float,
        device: torch.device,
    ) -> None:
        super().__init__(shape, arena, config, slots, max_tokens, scale, device)
        # [layers, slots, kv_heads], summed over the steps
        self._errors = torch.zeros(self._tally.shape[:3], device=device)
        self._late = torch.zeros_like(self._errors)

    def reset(self) -> None:
        self._errors.zero_()
        self._late.zero_()

    def attend(
        self, layer: int, query: Tensor, kv: Tensor, batch: Batch, coming: Fresh | None, *, select: bool
    ) -> Tensor:
        count = len(query)
        self._late[layer, :count] += self._missing(layer, query, batch)
        attended = super().attend(layer, query, kv, batch, coming, select=select)
        self._recording.join()  # the new row is in the arena
        full = attend_all(query, self._arena[:, layer], batch.table, batch.lengths, self._scale).float()
        grouped = (count, self.shape.kv_heads, -1)
        off = (attended.float() - full).view(grouped).norm(dim=-1)
        self._errors[layer, :count] += off / full.view(grouped).norm(dim=-1)
        return attended

    def _missing(self, layer: int, query: Tensor, batch: Batch) -> Tensor:
        """Rows that the query wants and that neither lie in the set nor are on their way: [B, kv_heads]."""
        lengths, table = batch
        count, tail = len(query), self._recent + 1  # as in ``prefetch``: the new token is not appended yet
        every = torch.ones(count, self.shape.kv_heads, dtype=torch.bool, device=query.device)
        weigh = self._index.prepare(layer, query, self._norms[layer, :count], lengths, table, self._scale)
        held = (
            self._members[layer][:count].clone(),
            self._stamps[layer][:count].clone(),
            self._tally[layer, :count].clone(),
        )
        return choose(weigh(every, self._sinks, tail), every, lengths, tail, *held, self._k[layer]).counts

    def heads(self, steps: int) -> Heads:
        """Means over the steps and slots."""
        _, _, selected, fetched = self._tally.sum(1).cpu().unbind(-1)
        errors, late = self._errors.mean(1).cpu() / steps, self._late.mean(1).cpu() / steps
        return Heads(1 - fetched / selected.clamp_min(1), errors, late)
