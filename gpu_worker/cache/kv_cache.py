"""The KV cache as one worker sees it: rows in the arena, an index over them, and the resident rows.

A slot is a place for one sequence; row b of every batch is slot b, so no kernel needs a slot map, and a batch
is the first B slots. The cache knows the shape of the KV and nothing else of the model.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.gpu_worker.cache.index import ExactIndex, Index, TwoBitIndex
from clo.gpu_worker.side_stream import SideStream
from clo.kernels.append import append
from clo.kernels.attend import attend_all, attend_resident, merge_fetched
from clo.kernels.fetch import fetch
from clo.kernels.gate import gate
from clo.kernels.store import store, store_new
from clo.kernels.update_resident import FetchList, update_resident
from clo.runtime.config import CacheConfig
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.wire.messages import CacheStats

PROMPT_QUERIES = 32  # last queries of a prompt that choose the first resident set
_NEVER_REUSE = 2.0  # above any cosine


class Batch(NamedTuple):
    """What every layer of one decode step shares: slots 0 .. B-1."""

    lengths: Tensor  # [B] int64, with the new token; 0 for a slot not in use
    block_table: Tensor  # [B, max_blocks] int64


class KVCache:
    """Resident rows, index, selection_queries and counters of all slots.

    Args:
        shape: of the model's KV.
        arena: [blocks, layers, kv_heads, block_tokens, 2, head_dim], shared with the KV store.
        config: the knobs; ``attention`` chooses full attention over the arena, exact top-k, or CLO.
        slots: sequences at a time.
        max_tokens: longest sequence.
        scale: of the softmax.
        device: of everything but the arena.
    """

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
        self.shape = shape
        self.full = config.attention == "full"
        self._arena, self._scale = arena, scale
        self._sinks, self._recent = config.sinks, config.recent
        self._storing = SideStream(device)  # rows of a prompt on their way to the arena
        self._recording = SideStream(device)  # a new row on its way to arena and index; no one waits for it
        self._gating = SideStream(device), SideStream(device)  # of even, of odd layers
        self._fetching = SideStream(device, urgent=True), SideStream(device, urgent=True)
        self._index: Index
        if config.attention == "clo":
            self._index = TwoBitIndex(shape, arena.shape[0], device)
        else:
            self._index = ExactIndex(arena)

        self._first = self._sinks + self._recent  # row at which the set starts
        # by layer, [slots, kv_heads, ...]
        self._k: list[int] = []
        self._resident: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._last_used: list[Tensor] = []
        for k, kept in config.sizes(max_tokens, shape.layers):
            capacity = 0 if self.full else kept
            lines = (slots, shape.kv_heads)
            rows = (*lines, self._first + capacity, 2, shape.head_dim)
            self._k.append(k)
            self._resident.append(torch.zeros(rows, dtype=shape.dtype, device=device))
            self._positions.append(torch.full((*lines, capacity), -1, dtype=torch.int32, device=device))
            self._last_used.append(torch.full((*lines, capacity), -1, dtype=torch.int32, device=device))
        heads = (shape.layers, slots, shape.kv_heads)
        label_width = 0 if self.full else shape.group * shape.head_dim
        self._selection_queries = torch.zeros(*heads, label_width, dtype=shape.dtype, device=device)
        never = _NEVER_REUSE if config.gate is None else config.gate
        self.thresholds = torch.full((shape.layers, shape.kv_heads), never, device=device)
        if config.profile is not None:
            config.profile.check(shape.layers, shape.kv_heads, shape.head_dim)
            self.thresholds.copy_(torch.tensor([layer.thresholds for layer in config.profile.layers]))
        self._lse = torch.zeros(shape.layers, slots, shape.query_heads, device=device)
        self._counters = torch.zeros(
            *heads, 4, dtype=torch.int64, device=device
        )  # checks, misses, rows, moves

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident rows of all slots."""
        return sum(rows.nbytes for rows in self._resident)

    @property
    def index_token_bytes(self) -> int:
        return self._index.token_bytes

    # ------------------------------------------------------------------------------------- prompt

    def take_prompt(self, slot: int, layer: int, rows: Tensor, queries: Tensor, block_table: Tensor) -> None:
        """Store one layer of a prompt and choose its first resident rows.

        Args:
            slot: of the sequence.
            rows: [T, kv_heads, 2, head_dim], the layer's whole KV.
            queries: [W, query_heads, head_dim], of the prompt's last W tokens.
            block_table: [max_blocks] int64, the sequence's blocks.
        """
        total = rows.shape[0]
        with self._storing.fork(rows):
            store(rows, block_table, self._arena[:, layer])
        if self.full:
            return
        self._index.write_prompt(layer, rows[:, :, 0], block_table)
        self._selection_queries[layer, slot].zero_()  # no selection_query: the first decode step selects
        last = queries[-1].float().view(self.shape.kv_heads, -1, self.shape.head_dim)
        scores = last @ rows[:, :, 0].float().permute(1, 2, 0) * self._scale  # [kv_heads, group, T]
        self._lse[layer, slot] = scores.logsumexp(-1).flatten()
        resident, positions = self._resident[layer][slot], self._positions[layer][slot]
        last_used, capacity = self._last_used[layer][slot], positions.shape[1]
        by_head = rows.transpose(0, 1)  # [kv_heads, T, 2, D]
        head = min(self._sinks, total)
        resident[:, :head] = by_head[:, :head]
        latest = torch.arange(max(head, total - self._recent), total, device=resident.device)
        ring = self._sinks + torch.remainder(latest - self._sinks, self._recent)
        resident[:, ring] = by_head[:, latest]

        positions.fill_(-1)
        last_used.fill_(-1)
        candidates = total - self._sinks - self._recent
        if candidates <= 0:
            return
        if candidates <= capacity:  # all fit, each in the slot that `append` expects
            chosen = torch.arange(self._sinks, self._sinks + candidates, device=resident.device)
            chosen = chosen.expand(self.shape.kv_heads, -1)
        else:
            chosen = self._rank_prompt(by_head[:, self._sinks : total - self._recent, 0], queries, capacity)
        count = chosen.shape[1]
        positions[:, :count] = chosen.int()
        last_used[:, :count] = torch.arange(count - 1, -1, -1, device=resident.device).int()
        heads = torch.arange(self.shape.kv_heads, device=resident.device).unsqueeze(1)
        resident[:, self._first : self._first + count] = by_head[heads, chosen]

    def join_prompt(self) -> None:
        """All work to come finds the prompts' rows in the arena."""
        self._storing.join()

    def _rank_prompt(self, keys: Tensor, queries: Tensor, count: int) -> Tensor:
        """Positions [kv_heads, count] of the keys that the last queries weigh most, best first."""
        kv_heads = self.shape.kv_heads
        last = queries[-PROMPT_QUERIES:].float()
        grouped = last.view(len(last), kv_heads, -1, self.shape.head_dim).transpose(0, 1).flatten(1, 2)
        products = grouped @ keys.float().transpose(1, 2) * self._scale  # [kv_heads, W * group, T']
        return products.softmax(-1).mean(1).topk(count).indices + self._sinks

    # ------------------------------------------------------------------------------------- decode

    def prefetch(self, layer: int, query: Tensor, batch: Batch) -> FetchList:
        """Gate, select and begin to fetch for a layer with a predicted query, ahead of the layer itself."""
        # The layer has not appended the new token yet: what that will displace still stands in the ring.
        return self._select(layer, query, batch, self._recent + 1, ahead=True)

    def attend(
        self, layer: int, query: Tensor, kv: Tensor, batch: Batch, coming: FetchList | None, *, select: bool
    ) -> Tensor:
        """One layer of a decode step: append, gate, select, fetch, attend.

        Args:
            query: [B, query_heads, head_dim]; kv: [B, kv_heads, 2, head_dim].
            coming: what ``prefetch`` returned for the layer, None where there was no prefetch.
            select: whether to select with this query too, and not accept what ``coming`` brings.

        Returns:
            [B, query_heads, head_dim].
        """
        count = len(batch.lengths)
        arena = self._arena[:, layer]
        resident, positions = self._resident[layer][:count], self._positions[layer][:count]
        if self.full:
            store_new(kv, batch.lengths, batch.table, arena)
            return attend_all(query, arena, batch.table, batch.lengths, self._scale)
        last_used = self._last_used[layer][:count]
        append(kv, batch.lengths, resident, positions, last_used, self._sinks, self._recent)
        with self._recording.fork(kv):
            store_new(kv, batch.lengths, batch.table, arena)
            self._index.write(layer, kv[:, :, 0], batch.lengths, batch.table)
        fetching = self._fetching[layer % 2]
        if select:
            if coming is not None:
                fetching.join()
            coming = self._select(layer, query, batch, self._recent, ahead=False)
        partial = attend_resident(
            query, resident, positions, batch.lengths, coming, self._sinks, self._recent, self._scale
        )
        fetching.join()
        return merge_fetched(
            partial, query, resident, batch.lengths, coming, self._lse[layer, :count], self._first,
            self._scale,
        )  # fmt: skip

    def end_step(self) -> None:
        """After the last layer: all work to come finds the new rows in arena and index."""
        if not self.full:
            self._recording.join()

    def _select(self, layer: int, query: Tensor, batch: Batch, tail: int, *, ahead: bool) -> FetchList:
        """Gate and select, and begin to fetch; the last ``tail`` tokens are no candidates."""
        lengths, block_table = batch
        count = len(lengths)
        positions, counters = self._positions[layer][:count], self._counters[layer, :count]
        gating = self._gating[layer % 2]
        with gating.fork():
            reselect = gate(
                query, self._selection_queries[layer, :count], self.thresholds[layer], lengths, counters
            )
        weigh = self._index.quantize_query(
            layer, query, self._lse[layer, :count], lengths, block_table, self._scale
        )
        gating.join()
        keys = weigh(reselect, self._sinks, tail)
        last_used = self._last_used[layer][:count]
        fetch_list = update_resident(
            keys, reselect, lengths, tail, positions, last_used, counters, self._k[layer]
        )
        with self._fetching[layer % 2].fork():
            fetch(
                fetch_list, positions, block_table, self._arena[:, layer], self._resident[layer][:count], self._first,
                patient=ahead,
            )  # fmt: skip
        return fetch_list

    # ---------------------------------------------------------------------------------- accounting

    def counters(self, slot: int) -> Tensor:
        """[4] int64 since ``reset_counters``: gate checks, heads that selected, rows selected, rows moved."""
        return self._counters[:, slot].sum((0, 1))

    def reset_counters(self, slot: int) -> None:
        """Begin to count anew for the next sequence of a slot."""
        self._counters[:, slot].zero_()

    def stats(self, counters: list[int], tokens: int, steps: int) -> CacheStats:
        """What the cache did for a sequence.

        Args:
            counters: of its slot; tokens: its length; steps: decode steps that it took.
        """
        checks, selections, selected, moved = counters
        return CacheStats(
            steps=steps,
            head_steps=steps * self.shape.layers * self.shape.kv_heads,
            gate_checks=checks,
            selections=selections,
            selected_rows=selected,
            fetched_rows=moved,
            fetched_bytes=moved * self.shape.row_bytes,
            resident_bytes=sum(rows[0].nbytes for rows in self._resident),
            index_bytes=tokens * self._index.token_bytes,
            kv_bytes=tokens * self.shape.token_bytes,
        )
