"""One layer of the cache: its resident set, its index, and the order of the work on them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.index import Index, TwoBitIndex
from clo.gpu_worker.cache.prompt import ExactRows, LastTokens, Prompts
from clo.gpu_worker.cache.ranking import Ranking
from clo.gpu_worker.side_stream import SideStream
from clo.kernels.append import append
from clo.kernels.attend import AttentionState, attend_resident, empty_state, merge_fetched
from clo.kernels.attend_tail import tail_parts
from clo.kernels.fetch import fetch
from clo.kernels.fill_resident import fill_resident
from clo.kernels.gate import gate
from clo.kernels.load import load_blocks, load_rows
from clo.kernels.quantize_query import Rope
from clo.kernels.resident import ResidentSet
from clo.kernels.score import Scores
from clo.kernels.store import store_new
from clo.kernels.update_resident import FetchList, TailList, update_resident

PROMPT_QUERIES = 32  # last queries of a prompt that choose the first resident set
EXACT_ROWS = 2048
"""Rows of a head that a prompt attends to exactly of a beginning that comes as codes, or as many as its
resident set takes. 1,024 tripled the KL on SmolLM2-135M behind 6K tokens of four documents
(``benchmarks.quality.prefix``). At the Llama-3-8B shape they are 8 MiB a layer, where the codes of 128K
tokens are 69."""


class LayerStreams(NamedTuple):
    """Side streams for the parts of a layer's work that the rest need not wait for."""

    storing: SideStream  # rows of a prompt go to the arena; shared by all layers
    filling: SideStream  # they are indexed, and the first resident ones chosen; shared by all layers
    recording: SideStream  # the new row goes to arena, index and ring; shared by all layers
    gating: SideStream  # shared by every second layer, and so is the next one
    fetching: SideStream
    tail: SideStream  # attention to the tail


class LayerState(NamedTuple):
    """What a layer remembers of each slot besides its rows."""

    selection_query: Tensor  # [slots, kv_heads, group * head_dim], query of the last selection; 0 for none
    lse: Tensor  # [slots, query_heads] float32, log-sum-exp of the last attention
    counters: Tensor  # [slots, kv_heads, 6] int64, see ``clo.gpu_worker.cache.kv_cache.KVCache.counters``
    tail: TailList | None  # the tail of the last selection; None where what is not resident is dropped


class LayerCache:
    """The resident rows of one layer, for all slots.

    Args:
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        index: scores the rows.
        resident: the resident set of all slots.
        state: the state of all slots.
        threshold: [kv_heads] float32, the gate of each head; above 1 a head selects in every step.
        select_k: rows that a head selects.
        successors: whether they are selected by a part of the weight of the rows before them as well, see
            ``clo.kernels.update_resident``; also an attribute, as ``select_k`` is.
        scale: factor of the scores.
        streams: side streams for the layer's work.

    Attributes:
        stores: whether rows of prompts go to the arena.
    """

    def __init__(
        self,
        arena: Tensor,
        index: Index[Any],
        resident: ResidentSet,
        state: LayerState,
        threshold: Tensor,
        select_k: int,
        successors: bool,
        scale: float,
        streams: LayerStreams,
    ) -> None:
        self.arena, self.index, self.resident, self.state = arena, index, resident, state
        self.select_k, self.successors = select_k, successors
        self.stores = True
        self._threshold, self._scale, self._streams = threshold, scale, streams
        self._ranking = Ranking(scale, arena.device)

    # ------------------------------------------------------------------------------------- prompt

    def take_rows(self, rows: Tensor, prompts: Prompts) -> None:
        """Store and index rows of prompts, beside later work.

        Args:
            rows: [N, kv_heads, 2, head_dim], of whole prompts or of whole blocks of one.
            prompts: where they go.
        """
        if self.stores:
            with self._streams.storing.fork(rows):
                self.store(rows, prompts)
        with self._streams.filling.fork(rows):
            self.index.write_prompts(rows, prompts.blocks)
            if self.stores:
                self.index.store_codes(prompts.blocks)

    def load_rows(self, rows: Tensor, prompts: Prompts) -> None:
        """Read rows [N, kv_heads, 2, head_dim] of whole blocks that are in the arena already."""
        load_blocks(rows, prompts.blocks.blocks, self.arena)

    def index_rows(self, rows: Tensor, prompts: Prompts) -> None:
        """Index rows that ``load_rows`` has read, beside later work."""
        with self._streams.filling.fork(rows):
            self.index.write_prompts(rows, prompts.blocks)

    @property
    def exact_rows(self) -> int:
        """Rows of a head that ``fetch_best`` fetches: those of a resident set can be chosen among them."""
        return max(EXACT_ROWS, self.resident.whole)

    def load_codes(self, rows: Tensor, prompts: Prompts) -> None:
        """Index whole blocks of a prompt by their codes in the arena, and fill rows [N, kv_heads, 2,
        head_dim] with what these say."""
        assert isinstance(self.index, TwoBitIndex), "only codes can be loaded"
        self.index.load_codes(rows, prompts.blocks)

    def fetch_best(self, rows: Tensor, prompts: Prompts, queries: Tensor) -> Tensor:
        """Replace the rows that weigh most, of those that ``load_codes`` has filled, by the exact ones.

        The sinks and the latest tokens are among them, since the resident set has to have these.

        Args:
            rows: [N, kv_heads, 2, head_dim], more than ``exact_rows``.
            prompts: where they lie.
            queries: [Q, query_heads, head_dim], some of those that will attend to them.

        Returns:
            [kv_heads, exact_rows] int32, their positions.
        """
        resident = self.resident
        weights = self._ranking.weights(rows[:, :, 0], queries)
        weights[:, : resident.sinks] = torch.inf
        weights[:, len(rows) - resident.recent :] = torch.inf
        positions = weights.topk(self.exact_rows, sorted=False).indices.int()
        load_rows(rows, positions, prompts.blocks.blocks, self.arena)
        return positions

    def start_sets(
        self,
        rows: Tensor,
        prompts: Prompts,
        lse: Tensor,
        last: LastTokens | None = None,
        exact: ExactRows | None = None,
    ) -> None:
        """Choose and copy the first resident rows of prompts that ``take_rows`` has taken, beside later work.

        Args:
            rows: [N, kv_heads, 2, head_dim], the layer's whole KV.
            prompts: where its tokens go.
            lse: [S, query_heads] float32, log-sum-exp of the attention of each prompt's last token.
            last: the last tokens of a single prompt, whose queries choose its set; None where every prompt
                fits into its set.
            exact: the rows of a single prompt among which its set is chosen; None for all.
        """
        positions = () if exact is None else (exact.positions,)
        with self._streams.filling.fork(rows, lse, *(last or ()), *positions):
            self.fill(rows, prompts, lse, last, exact)

    def start_sets_by_codes(
        self, rows: Tensor, prompts: Prompts, last: LastTokens, lengths: Tensor, page_table: Tensor
    ) -> None:
        """As ``start_sets`` for one prompt that does not fit into its set, ranked by the keys' codes. The
        launches depend on shapes alone, so that a CUDA graph can hold them.

        Args:
            rows: [N, kv_heads, 2, head_dim], of which the first are the layer's whole KV.
            prompts: where its tokens go.
            last: the last tokens, whose queries choose its set, the last one last.
            lengths: [W] int64, the prompt's tokens, W times.
            page_table: [max_blocks] int64, pages of the prompt.
        """
        with self._streams.filling.fork(rows, *last):
            weights = self._weigh_codes(last, lengths, page_table)
            chosen = weights.topk(self.resident.capacity).indices.int()
            self._begin(rows, prompts, chosen.unsqueeze(0), last.lse[-1:])

    def fetch_best_by_codes(
        self,
        rows: Tensor,
        prefix: Prompts,
        last: LastTokens,
        lengths: Tensor,
        page_table: Tensor,
        own: Tensor,
    ) -> Tensor:
        """As ``fetch_best``, ranked by the keys' codes, for a CUDA graph as ``start_sets_by_codes`` is.

        Args:
            rows: [N, kv_heads, 2, head_dim], of which the first are the layer's whole KV.
            prefix: where the rows lie that ``load_codes`` has filled.
            last: tokens whose queries choose, their log-sum-exp from the rows as they are.
            lengths, page_table: see ``start_sets_by_codes``.
            own: [2] int64, bounds of the rows that are exact already.

        Returns:
            [kv_heads, capacity] int32, of the rows that are exact now those candidates for the resident set
            that weigh most, best first.
        """
        resident, device = self.resident, rows.device
        with self._streams.filling.fork(*last):  # which comes after the codes of all tokens
            weights = self._weigh_codes(last, lengths, page_table)
            fetched = torch.arange(weights.shape[1], device=device) < own[0]
            count = min(self.exact_rows, weights.shape[1])
            best = weights.masked_fill(~fetched, -1).topk(count, sorted=False).indices
            exact = weights.masked_fill(fetched, -1).scatter(1, best, weights.gather(1, best))
            chosen = exact.topk(resident.capacity).indices.int()
        self._streams.filling.join()
        latest = own[0] - 1 - torch.arange(resident.recent, device=device)
        always = torch.cat((torch.arange(resident.sinks, device=device), latest))
        wanted = torch.cat((best, always.expand(resident.kv_heads, -1)), 1).int()
        blocks = prefix.blocks.blocks
        within = rows[: len(blocks) * self.arena.shape[2]]
        load_rows(within, wanted.masked_fill(wanted >= own[0], -1), blocks, self.arena)
        return chosen

    def start_chosen(self, rows: Tensor, prompts: Prompts, chosen: Tensor, lse: Tensor) -> None:
        """As ``start_sets`` for one prompt, with the rows [kv_heads, capacity] int32 that ``chosen`` says."""
        with self._streams.filling.fork(rows, chosen, lse):
            self._begin(rows, prompts, chosen.unsqueeze(0).contiguous(), lse)

    def _begin(self, rows: Tensor, prompts: Prompts, chosen: Tensor | None, lse: Tensor) -> None:
        """Resident rows and state of the prompts' slots; ``chosen`` as for ``fill_resident``."""
        slots = prompts.sequences.slots
        fill_resident(rows, prompts.sequences, chosen, self.resident)
        # there is no selection yet: the first step selects, at a gate above 0
        self.state.selection_query.index_fill_(0, slots, 0)
        self.state.lse.index_copy_(0, slots, lse)
        if self.state.tail is not None:
            self.state.tail.counts.index_fill_(0, slots, 0)

    def _rank(self, rows: Tensor, last: LastTokens, exact: ExactRows | None) -> Tensor:
        """Positions [kv_heads, C] int32 of the candidates that the last tokens attend to most, best first.

        Args:
            rows: [T, kv_heads, 2, head_dim], the layer's whole KV.
        """
        resident, (queries, lse) = self.resident, (part[-PROMPT_QUERIES:] for part in last)
        begin, end = resident.sinks, len(rows) - resident.recent  # of the candidates
        if exact is None:
            weights = self._ranking.weights(rows[begin:end, :, 0], queries, lse)
            return weights.topk(resident.capacity).indices.int() + begin
        positions, own = exact
        keys = rows[positions.t().long(), torch.arange(resident.kv_heads, device=rows.device), 0]
        weights = self._ranking.weights(keys, queries, lse)
        weights.masked_fill_((positions < begin) | (positions >= end), -1.0)
        if own < end:
            weights = torch.cat((weights, self._ranking.weights(rows[own:end, :, 0], queries, lse)), 1)
            behind = torch.arange(own, end, dtype=torch.int32, device=rows.device)
            positions = torch.cat((positions, behind.expand(resident.kv_heads, -1)), 1)
        return positions.gather(1, weights.topk(resident.capacity).indices)

    def _weigh_codes(self, last: LastTokens, lengths: Tensor, page_table: Tensor) -> Tensor:
        """What all tokens of a prompt weigh to its last tokens by the keys' codes: [kv_heads, max_blocks *
        block_tokens] float32, below 0 for those that are no candidates."""
        assert isinstance(self.index, TwoBitIndex), "only codes are ranked"
        resident, queries = self.resident, last.queries.shape[0]
        batch = Batch(lengths, page_table, page_table.expand(queries, -1))
        every = torch.ones(queries, resident.kv_heads, dtype=torch.bool, device=lengths.device)
        prepared = self.index.prepare(last.queries, last.lse, batch)
        scores = self.index.score(prepared, every, batch, resident.sinks, resident.recent).rows
        places = torch.arange(scores.shape[2], device=lengths.device)
        # a score is the high half of a float32, which is a bfloat16
        weights = scores.clamp_min_(0).view(torch.bfloat16).sum(0, dtype=torch.float32)
        return weights.masked_fill_((places < resident.sinks) | (places >= lengths[0] - resident.recent), -1)

    # ------------------------------------------------------------------------------------- decode

    def prefetch(self, query: Tensor, batch: Batch) -> FetchList:
        """Gate, select and begin to fetch with a predicted query, ahead of the layer itself."""
        # The token that the new one will displace from the ring is no candidate yet.
        return self._select(query, batch, self.resident.recent + 1, ahead=True)[0]

    def begin_tail(self, query: Tensor, batch: Batch, rope: Rope | None = None) -> AttentionState:
        """Begin to attend to the tail that the last selection left, where there is one, beside later work.

        Args:
            query: [B, query_heads, head_dim], the one that ``attend`` will get, or the same before RoPE.
            rope: of the query's positions, where RoPE is still to be applied.

        Returns:
            The state that ``attend`` continues.
        """
        count = len(query)
        state = empty_state(query, self.resident.slots(count), self._tail_parts(count))
        self._attend_tail(state, query, batch, rope)
        return state

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
        """The layer's part of a decode step: gate, select, fetch, attend, append.

        Args:
            query: [B, query_heads, head_dim]; kv: [B, kv_heads, 2, head_dim].
            fetch_list: the list that ``prefetch`` returned, or None where there was no prefetch.
            begun: what ``begin_tail`` returned, if it was called, which is for a layer that does not select
                here.
            select: whether to select with this query, also where ``prefetch`` has selected already.

        Returns:
            [B, query_heads, head_dim].
        """
        count = len(batch.lengths)
        resident, tail, lse = self.resident.slots(count), self.state.tail, self.state.lse[:count]
        streams, parts = self._streams, self._tail_parts(count)
        if begun is None and not select:  # the tail takes longer than the rows where there are few
            begun = self.begin_tail(query, batch)
        state = begun or empty_state(query, resident, parts)
        with streams.recording.fork(kv):
            self.record(kv, batch)
        if select:
            if fetch_list is not None:
                streams.fetching.join()
            fetch_list, prepared = self._select(query, batch, resident.recent, ahead=False)
            self._attend_tail(state, query, batch, prepared=prepared)
        if query.is_cpu:  # there `fetch` has returned with all rows
            fetch_list = None
        attend_resident(query, kv, resident, batch.lengths, fetch_list, self._scale, state)
        if not query.is_cpu:  # there `attend_resident` has appended it
            with streams.recording.fork(kv):
                append(kv, batch.lengths, resident)
        if tail is not None:
            streams.tail.join()
        streams.fetching.join()
        counters = None if tail is None else self.state.counters[:count]
        return merge_fetched(
            state, query, resident, batch.lengths, fetch_list, lse, self._scale, counters, parts
        )

    def _tail_parts(self, count: int) -> int:
        """Parts of the state of so many slots that their tails fill."""
        return 0 if self.state.tail is None else tail_parts(self.state.tail.slots(count))

    def _attend_tail(
        self,
        state: AttentionState,
        query: Tensor,
        batch: Batch,
        rope: Rope | None = None,
        prepared: Any = None,
    ) -> None:
        """Begin to attend to the tail, where there is one; ``prepared`` as from the index, if it is known."""
        if self.state.tail is None:
            return
        assert isinstance(self.index, TwoBitIndex), "only codes can be attended to"
        count = len(query)
        tail, lse = self.state.tail.slots(count), self.state.lse[:count]
        with self._streams.tail.fork(query, *state):
            quantized = prepared or self.index.prepare(query, lse, batch, rope)
            self.index.attend(state, quantized, tail, lse, batch, early=prepared is None)

    def _select(self, query: Tensor, batch: Batch, latest: int, *, ahead: bool) -> tuple[FetchList, Any]:
        """Gate and select, and begin to fetch; the latest ``latest`` tokens are not candidates.

        Returns:
            The rows on their way, and the query as the index has prepared it.
        """
        count = len(batch.lengths)
        resident = self.resident.slots(count)
        with self._streams.gating.fork():
            reselect = self.gate(query, batch)
        prepared = self.index.prepare(query, self.state.lse[:count], batch)
        self._streams.gating.join()
        scores = self.index.score(prepared, reselect, batch, resident.sinks, latest)
        fetch_list = self.update_resident(scores, reselect, batch, latest)
        with self._streams.fetching.fork():
            self.fetch(fetch_list, batch, patient=ahead)
        return fetch_list, prepared

    # The steps below are separate methods so that benchmarks can replace one of them.

    def store(self, rows: Tensor, prompts: Prompts) -> None:
        """Write rows of prompts to the arena; see ``clo.kernels.store``."""
        prompts.store(rows, self.arena)

    def fill(
        self,
        rows: Tensor,
        prompts: Prompts,
        lse: Tensor,
        last: LastTokens | None,
        exact: ExactRows | None = None,
    ) -> None:
        """See ``start_sets``."""
        chosen = None
        if last is not None and len(rows) > self.resident.whole:
            chosen = self._rank(rows, last, exact).unsqueeze(0)
        self._begin(rows, prompts, chosen, lse)

    def record(self, kv: Tensor, batch: Batch) -> None:
        """Write the new rows [B, kv_heads, 2, head_dim] to the arena and to the index."""
        store_new(kv, batch.lengths, batch.blocks, self.arena)
        self.index.write(kv, batch)

    def gate(self, query: Tensor, batch: Batch) -> Tensor:
        """[B, kv_heads] bool, the heads that select; see ``clo.kernels.gate``."""
        lengths, count = batch.lengths, len(batch.lengths)
        selection_query, counters = self.state.selection_query[:count], self.state.counters[:count]
        return gate(query, selection_query, self._threshold, lengths, self.resident.whole, counters)

    def update_resident(self, scores: Scores, reselect: Tensor, batch: Batch, latest: int) -> FetchList:
        """Choose rows and say which have to be fetched, and list the tail; see
        ``clo.kernels.update_resident``."""
        count, tail = len(batch.lengths), self.state.tail
        resident, counters = self.resident.slots(count), self.state.counters[:count]
        listed = None if tail is None else tail.slots(count)
        return update_resident(
            scores, reselect, batch.lengths, latest, resident, counters, self.select_k, listed,
            successors=self.successors,
        )  # fmt: skip

    def fetch(self, fetch_list: FetchList, batch: Batch, *, patient: bool) -> None:
        """Bring the rows from the arena; see ``clo.kernels.fetch``."""
        resident = self.resident.slots(len(batch.lengths))
        fetch(fetch_list, resident, batch.blocks, self.arena, patient=patient)
