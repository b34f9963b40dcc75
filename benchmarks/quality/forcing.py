"""Answers forced through a worker's decode step, beside one full-attention pass over the same tokens.

The pass goes over prompt and answer at once. Attention is causal, so it leaves the prompt's rows in the arena
just as a prefill of the prompt alone does, and every cache takes the prompt from there: a prompt is computed
once, however many caches are measured on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.tasks import Item
from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import PROMPT_QUERIES, LayerCache
from clo.gpu_worker.cache.prompt import ExactRows, LastTokens, Prompts, one_prompt
from clo.gpu_worker.cache.query_prediction import measure_query_sources
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import GREEDY
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.prefill import Prefill
from clo.kernels.attend import AttentionState, attend_all
from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.blocks import gather_tokens
from clo.kernels.update_resident import FetchList, update_resident
from clo.runtime.config import CacheConfig

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
        blocks = -(-self.max_tokens // shape.block_tokens)
        self.table = torch.arange(len(items) * blocks, device=device).view(len(items), blocks)
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
        cache.join_prompts()
        answers = torch.tensor([len(item.answer) for item in items], device=device)
        self._sources = measure_query_sources(decoder)
        self._ended = torch.arange(1, steps, device=device) >= answers.unsqueeze(1)  # [items, steps]
        self.full = self._scores([self._score(step, self.logits[:, step]) for step in range(1, steps)])

    @torch.inference_mode()
    def _pass(self, cache: "_Pass", slot: int, tokens: list[int], predicted: int) -> Tensor:
        """Prefill with full attention; logits [predicted, vocab] of the last tokens."""
        # Full attention has no index, so it has no pages either.
        table = self.table[slot]
        work = Prefill(self.decoder, cache, slot, tokens, table.tolist(), table, table, last=predicted)
        cache.queries, cache.behind = self.queries[slot], predicted - 1
        while (logits := work.advance()) is None:
            pass
        return logits

    @torch.inference_mode()
    def engine(self, config: CacheConfig, *, probe: bool = False) -> Engine:
        """An engine whose slots hold the prompts; with ``probe``, its layers are ``ProbeLayer``."""
        slots, layer_type = len(self.items), ProbeLayer if probe else LayerCache
        shape = self.decoder.shape
        engine = Engine(self.decoder, self.arena, config, slots, self.max_tokens, self._sources, layer_type)
        engine.capture([slots])  # before the prompts, for it takes steps, of no sequence
        for layer in engine.cache.layers:
            if isinstance(layer, ProbeLayer):
                layer.reset()
        for slot, item in enumerate(self.items):
            blocks = self.table[slot].tolist()
            engine.place(slot, blocks)
            prompts = one_prompt(slot, len(item.prompt), blocks, *engine.tables(slot), shape.block_tokens)
            for number, layer in enumerate(engine.cache.layers):
                by_head = gather_tokens(self.arena[:, number], self.table[slot : slot + 1])[0]
                rows = by_head.transpose(0, 1)[: len(item.prompt)].contiguous()
                queries = self.queries[slot, number]
                _, lse = attend_prompt(queries, rows, self.decoder.scale)
                layer.take_rows(rows, prompts)
                layer.start_sets(rows, prompts, lse[-1:], LastTokens(queries, lse))
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
            engine.feed(slice(len(slots)), self.answers[:, step - 1])
            engine.suspend(self._ended[:, step - 1])
            if self.decoder.device.type == "cuda":
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

    def start_sets(
        self,
        layer: int,
        rows: Tensor,
        prompts: Prompts,
        lse: Tensor,
        last: LastTokens | None = None,
        exact: ExactRows | None = None,
    ) -> None:
        super().start_sets(layer, rows, prompts, lse, last, exact)
        assert last is not None
        end = len(last.queries) - self.behind
        self.queries[layer] = last.queries[end - PROMPT_QUERIES : end]


class ProbeLayer(LayerCache):
    """Compares each attention with full attention over the same rows, and what a prefetch brings with what
    the query itself wants, for sequences that are all in use."""

    def __init__(self, *args: Any) -> None:  # those of ``LayerCache``
        super().__init__(*args)
        slots, kv_heads, _ = self.state.counters.shape
        # [slots, kv_heads], summed over the steps
        self._errors = torch.zeros(slots, kv_heads, device=self.state.lse.device)
        self._late = torch.zeros_like(self._errors)

    def reset(self) -> None:
        self._errors.zero_()
        self._late.zero_()

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        batch: Batch,
        fetch_list: FetchList | None,
        begun: AttentionState | None = None,
        *,
        select: bool,
    ) -> Tensor:
        count, kv_heads = len(query), self.resident.kv_heads
        self._late[:count] += self._missing(query, batch)
        attended = super().attend(query, kv, batch, fetch_list, begun, select=select)
        self._streams.recording.join()  # the new row is in the arena
        full = attend_all(query, self.arena, batch.blocks, batch.lengths, self._scale).float()
        off = (attended.float() - full).view(count, kv_heads, -1).norm(dim=-1)
        self._errors[:count] += off / full.view(count, kv_heads, -1).norm(dim=-1)
        return attended

    def _missing(self, query: Tensor, batch: Batch) -> Tensor:
        """Rows that the query wants and that neither lie in the set nor are on their way: [B, kv_heads]."""
        count, resident = len(query), self.resident.slots(len(query))
        latest = resident.recent + 1  # as in ``prefetch``: the new token is not appended yet
        every = torch.ones(count, resident.kv_heads, dtype=torch.bool, device=query.device)
        prepared = self.index.prepare(query, self.state.lse[:count], batch)
        scores = self.index.score(prepared, every, batch, resident.sinks, latest)
        held = resident._replace(positions=resident.positions.clone(), last_used=resident.last_used.clone())
        counters = self.state.counters[:count].clone()
        return update_resident(
            scores, every, batch.lengths, latest, held, counters, self.select_k, successors=self.successors
        ).counts

    def means(self, steps: int) -> Heads:
        """Means over the steps and slots, each [kv_heads]."""
        _, _, selected, fetched, *_ = self.state.counters.sum(0).cpu().unbind(-1)
        errors, late = self._errors.mean(0).cpu() / steps, self._late.mean(0).cpu() / steps
        return Heads(1 - fetched / selected.clamp_min(1), errors, late)


def heads_of(engine: Engine, steps: int) -> Heads:
    """What each head of an engine with ``ProbeLayer`` did, after so many steps."""
    layers = [layer.means(steps) for layer in engine.cache.layers if isinstance(layer, ProbeLayer)]
    return Heads(*(torch.stack(parts) for parts in zip(*layers, strict=True)))
