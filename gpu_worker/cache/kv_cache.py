"""The KV cache as one worker sees it: rows in the arena, an index over them, and the resident rows.

A slot is a place for one sequence; row b of every batch is slot b, so no kernel needs a slot map, and a batch
is the first B slots. The cache knows the shape of the KV and nothing else of the model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.full import FullLayer
from clo.gpu_worker.cache.index import ExactIndex, TwoBitIndex, random_rotation
from clo.gpu_worker.cache.layer import LayerCache, LayerState, LayerStreams
from clo.gpu_worker.cache.pages import IndexPages
from clo.gpu_worker.cache.prompt import ExactRows, LastTokens, Prompts
from clo.gpu_worker.side_stream import DeviceEvent, Priority, SideStream
from clo.kernels.attend import AttentionState
from clo.kernels.limits import RUN
from clo.kernels.quantize_query import Rope
from clo.kernels.resident import ResidentSet
from clo.kernels.update_resident import FetchList, TailList
from clo.runtime.config import CacheConfig
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.wire.messages import CacheStats, HeadRows

_NEVER_REUSE = 2.0  # above any cosine


def index_pages(shape: KVShape, blocks: int, slots: int, max_tokens: int) -> int:
    """Pages that the index of a worker needs: for all its sequences at once, or for the whole arena.

    Args:
        blocks: number of blocks in the arena.
        slots: sequences at a time.
        max_tokens: longest sequence.
    """
    return min(blocks, slots * -(-max_tokens // shape.block_tokens))


class KVCache:
    """All layers of the cache, and what they share.

    Args:
        shape: shape of the model's KV.
        arena: [blocks, layers, kv_heads, block_tokens, 2, head_dim], shared with the KV store.
        config: ``attention`` chooses full attention over the arena, exact top-k, or CLO.
        slots: sequences at a time.
        max_tokens: longest sequence.
        scale: factor of the attention scores.
        device: the device of everything but the arena.
        layer_type: class of the layers that have a resident set.
        codes: [blocks, layers, kv_heads, code_bytes] uint8, the blocks' codes in the arena; None where blocks
            have none, and prompts attend exactly to what they begin with.
        ranks: that have as many heads each, of one model; the accounting is of all of them.

    Attributes:
        pages: which page of the index belongs to which block.
        layers: one for each layer of the model.
        thresholds: [layers, kv_heads] float32, the gates.
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
        layer_type: type[LayerCache] = LayerCache,
        codes: Tensor | None = None,
        ranks: int = 1,
    ) -> None:
        self.shape = shape
        self._codes, self._ranks = codes, ranks
        self.pages = IndexPages(index_pages(shape, arena.shape[0], slots, max_tokens))
        self._loading, self._storing, self._filling, self._recording = (SideStream(device) for _ in range(4))
        heads = (shape.layers, slots, shape.kv_heads)
        self._counters = torch.zeros(*heads, 6, dtype=torch.int64, device=device)
        # of former sequences
        self._ended = torch.zeros(shape.layers, ranks * shape.kv_heads, 6, dtype=torch.int64)
        self.thresholds = _thresholds(config, shape, device)
        self.layers: list[LayerCache | FullLayer] = []
        self._index_token_bytes = 0
        if config.attention == "full":
            self.layers += [FullLayer(arena[:, layer], self._storing, scale) for layer in range(shape.layers)]
            return
        indexes: list[TwoBitIndex] | list[ExactIndex]
        if config.attention == "clo":
            rotation, values = random_rotation(shape.head_dim, device), config.tail_tokens(max_tokens) > 0
            indexes = [
                TwoBitIndex(*pages, rotation, scale, None if codes is None else codes[:, layer])
                for layer, pages in enumerate(
                    TwoBitIndex.allocate(shape, self.pages.pages, device, values=values)
                )
            ]
            self._index_token_bytes = TwoBitIndex.bytes_per_token(shape, values=values)
        else:
            indexes = [ExactIndex(arena[:, layer], scale) for layer in range(shape.layers)]
        selection_query = torch.zeros(*heads, shape.group * shape.head_dim, dtype=shape.dtype, device=device)
        lse = torch.zeros(shape.layers, slots, shape.query_heads, device=device)
        tails = _tails(heads, -(-config.tail_tokens(max_tokens) // RUN), device)
        # Neighbouring layers overlap; layers two apart do not.
        shared = self._storing, self._filling, self._recording
        streams = [
            LayerStreams(
                *shared,
                SideStream(device),
                SideStream(device, Priority.SOON),
                SideStream(device, Priority.SOON),
            )
            for _ in range(2)
        ]
        for layer, (k, capacity) in enumerate(config.sizes(max_tokens, shape.layers)):
            first = config.sinks + config.recent
            lines = (slots, shape.kv_heads)
            resident = ResidentSet(
                torch.zeros(*lines, first + capacity, 2, shape.head_dim, dtype=shape.dtype, device=device),
                torch.full((*lines, capacity), -1, dtype=torch.int32, device=device),
                torch.full((*lines, capacity), -1, dtype=torch.int32, device=device),
                config.sinks,
                config.recent,
            )
            state = LayerState(selection_query[layer], lse[layer], self._counters[layer], tails[layer])
            self.layers.append(
                layer_type(
                    arena[:, layer], indexes[layer], resident, state, self.thresholds[layer], k,
                    config.attention == "clo", scale, streams[layer % 2],
                )
            )  # fmt: skip

    @property
    def ranks_codes(self) -> bool:
        """Whether there are codes by which ``start_sets_by_codes`` ranks."""
        return self._index_token_bytes > 0

    @property
    def sparse_layers(self) -> list[LayerCache]:
        """The layers that have a resident set."""
        return [layer for layer in self.layers if isinstance(layer, LayerCache)]

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident rows of all slots."""
        return self._ranks * sum(layer.resident.rows.nbytes for layer in self.sparse_layers)

    @property
    def index_bytes(self) -> int:
        """Bytes of the index of all pages."""
        return self._ranks * self._index_token_bytes * self.pages.pages * self.shape.block_tokens

    # ------------------------------------------------------------------------------------- prompt

    @property
    def stores(self) -> bool:
        """Whether rows of prompts go to the arena."""
        return all(layer.stores for layer in self.layers)

    @contextmanager
    def storing_nothing(self) -> Iterator[None]:
        """What prompts would write to the arena meanwhile is left out."""
        for layer in self.layers:
            layer.stores = False
        try:
            yield
        finally:
            for layer in self.layers:
                layer.stores = True

    def take_rows(self, layer: int, rows: Tensor, prompts: Prompts) -> None:
        """Take rows of prompts into one layer; see ``LayerCache.take_rows``."""
        self.layers[layer].take_rows(rows, prompts)

    def load_rows(
        self, layer: int, rows: Tensor, prompts: Prompts, after: Iterable[DeviceEvent]
    ) -> DeviceEvent:
        """Read rows of whole blocks of one layer that are in the arena already, beside later work.

        Args:
            rows: [N, kv_heads, 2, head_dim], to be filled.
            prompts: where they lie.
            after: what has to be reached before ``rows`` may change.

        Returns:
            Once it is reached, the rows are there.
        """
        with self._loading.fork(rows):
            for event in after:
                event.wait()
            self.layers[layer].load_rows(rows, prompts)
        return self._loading.event()

    def index_rows(self, layer: int, rows: Tensor, prompts: Prompts) -> None:
        """See ``LayerCache.index_rows``."""
        self.layers[layer].index_rows(rows, prompts)

    @property
    def least_prefix(self) -> int | None:
        """Tokens in the arena from which on a prompt that begins with them attends to them from their codes,
        but for the rows that matter most; of fewer, these would be all. None where it never does."""
        if self._codes is None:
            return None
        return 1 + max(layer.exact_rows for layer in self.sparse_layers)

    def load_codes(
        self, layer: int, rows: Tensor, prompts: Prompts, after: Iterable[DeviceEvent]
    ) -> DeviceEvent:
        """The same as ``load_rows`` from the blocks' codes, which get into the index as well."""
        cached = self.layers[layer]
        assert isinstance(cached, LayerCache), "full attention has no codes"
        with self._loading.fork(rows):
            for event in after:
                event.wait()
            cached.load_codes(rows, prompts)
        return self._loading.event()

    def fetch_best(self, layer: int, rows: Tensor, prompts: Prompts, queries: Tensor) -> Tensor:
        """See ``LayerCache.fetch_best``."""
        cached = self.layers[layer]
        assert isinstance(cached, LayerCache), "full attention has no codes"
        return cached.fetch_best(rows, prompts, queries)

    def start_sets(
        self,
        layer: int,
        rows: Tensor,
        prompts: Prompts,
        lse: Tensor,
        last: LastTokens | None = None,
        exact: ExactRows | None = None,
    ) -> None:
        """After all rows of a layer; see ``LayerCache.start_sets``."""
        self.layers[layer].start_sets(rows, prompts, lse, last, exact)

    def start_sets_by_codes(
        self,
        layer: int,
        rows: Tensor,
        prompts: Prompts,
        last: LastTokens,
        lengths: Tensor,
        page_table: Tensor,
    ) -> None:
        """See ``LayerCache.start_sets_by_codes``."""
        cached = self.layers[layer]
        assert isinstance(cached, LayerCache), "full attention has no sets"
        cached.start_sets_by_codes(rows, prompts, last, lengths, page_table)

    def fetch_best_by_codes(
        self,
        layer: int,
        rows: Tensor,
        prefix: Prompts,
        last: LastTokens,
        lengths: Tensor,
        page_table: Tensor,
        own: Tensor,
    ) -> Tensor:
        """See ``LayerCache.fetch_best_by_codes``."""
        cached = self.layers[layer]
        assert isinstance(cached, LayerCache), "full attention has no codes"
        return cached.fetch_best_by_codes(rows, prefix, last, lengths, page_table, own)

    def start_chosen(self, layer: int, rows: Tensor, prompts: Prompts, chosen: Tensor, lse: Tensor) -> None:
        """See ``LayerCache.start_chosen``."""
        cached = self.layers[layer]
        assert isinstance(cached, LayerCache), "full attention has no sets"
        cached.start_chosen(rows, prompts, chosen, lse)

    def rows_taken(self) -> tuple[DeviceEvent, DeviceEvent]:
        """Once both are reached, the rows of prompts that were given so far are not read any more."""
        return self._storing.event(), self._filling.event()

    def leave_prompt(self) -> None:
        """Later work may reuse the blocks and pages of a prompt that ends before it is complete."""
        self._loading.join()  # a layer's codes may be on their way into pages
        self.join_prompts()

    def join_prompts(self) -> None:
        """Later work finds the prompts in the arena, the index and the resident sets."""
        self._storing.join()
        if self.sparse_layers:  # else nothing was filled on the side, and a graph cannot wait for that
            self._filling.join()

    @property
    def fitting_tokens(self) -> int | None:
        """Tokens of the longest prompt whose rows all fit into every resident set; None for any prompt."""
        return min((layer.resident.whole for layer in self.sparse_layers), default=None)

    # ------------------------------------------------------------------------------------- decode

    def prefetch(self, layer: int, query: Tensor, batch: Batch) -> FetchList:
        """Gate, select and begin to fetch for a layer with a predicted query; see ``LayerCache.prefetch``."""
        cached = self.layers[layer]
        assert isinstance(cached, LayerCache), "full attention fetches nothing"
        return cached.prefetch(query, batch)

    def begin_tail(self, layer: int, query: Tensor, batch: Batch, rope: Rope | None = None) -> AttentionState:
        """Begin to attend to the tail that ``prefetch`` has listed; see ``LayerCache.begin_tail``."""
        cached = self.layers[layer]
        assert isinstance(cached, LayerCache), "full attention lists nothing"
        return cached.begin_tail(query, batch, rope)

    def attend(
        self,
        layer: int,
        query: Tensor,
        kv: Tensor,
        batch: Batch,
        fetch_list: FetchList | None,
        begun: AttentionState | None = None,
        *,
        select: bool,
    ) -> Tensor:
        """One layer of a decode step; see ``LayerCache.attend``."""
        return self.layers[layer].attend(query, kv, batch, fetch_list, begun, select=select)

    def end_step(self) -> None:
        """After the last layer: later work finds the new rows in arena, index and rings."""
        if self.sparse_layers:  # else nothing was recorded on the side, and a graph cannot wait for that
            self._recording.join()

    # ---------------------------------------------------------------------------------- accounting

    def counters(self, slot: int) -> Tensor:
        """[6] int64 since ``reset_counters``: gate checks, selections, rows selected, rows fetched; what the
        tail weighs in millionths of each attention; and in millionths of what weighed and was not resident at
        each selection, what is not in the tail."""
        return self.head_counters(slot).sum((0, 1))

    def head_counters(self, slot: int) -> Tensor:
        """[layers, kv_heads, 6] int64, those of each head; a view that goes on counting."""
        return self._counters[:, slot]

    def reset_counters(self, slot: int) -> None:
        """Start counting again for the next sequence of a slot."""
        self._counters[:, slot].zero_()

    def add_ended(self, counters: Tensor) -> None:
        """Add what the heads of all ranks did for a sequence that has ended: [layers, heads, 6] int64, on the
        CPU."""
        self._ended += counters

    @property
    def head_rows(self) -> HeadRows | None:
        """What the heads did for the sequences given to ``add_ended``; None with full attention."""
        if not self.sparse_layers:
            return None
        return HeadRows(selected=self._ended[..., 2].tolist(), fetched=self._ended[..., 3].tolist())

    def stats(self, counters: list[int], tokens: int, steps: int) -> CacheStats:
        """What the cache did for a sequence.

        Args:
            counters: those of its slot, of all ranks.
            tokens: its length.
            steps: decode steps that it took.
        """
        checks, selections, selected, fetched, tail, missed = counters
        ranks = self._ranks
        return CacheStats(
            steps=steps,
            head_steps=ranks * steps * self.shape.layers * self.shape.kv_heads,
            gate_checks=checks,
            selections=selections,
            selected_rows=selected,
            fetched_rows=fetched,
            fetched_bytes=fetched * self.shape.row_bytes,
            tail_millionths=tail,
            missed_millionths=missed,
            resident_bytes=ranks * sum(layer.resident.rows[0].nbytes for layer in self.sparse_layers),
            index_bytes=ranks * tokens * self._index_token_bytes,
            kv_bytes=tokens * self.shape.layers * self.shape.all_heads * self.shape.row_bytes,
            cached_tokens=0,
        )


def _tails(heads: tuple[int, int, int], runs: int, device: torch.device) -> list[TailList] | list[None]:
    """Empty tails of all layers, for ``heads`` layers, slots and KV heads."""
    if not runs:
        return [None] * heads[0]
    runs_of, masks = (torch.zeros(*heads, runs, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.zeros(heads, dtype=torch.int32, device=device)
    boosts = torch.zeros(heads, device=device)
    return [TailList(*layer) for layer in zip(runs_of, masks, counts, boosts, strict=True)]


def _thresholds(config: CacheConfig, shape: KVShape, device: torch.device) -> Tensor:
    """[layers, kv_heads] float32."""
    if config.profile is None:
        gate = _NEVER_REUSE if config.gate is None else config.gate
        return torch.full((shape.layers, shape.kv_heads), gate, device=device)
    config.profile.check(shape.layers, shape.kv_heads, shape.head_dim)
    return torch.tensor([layer.thresholds for layer in config.profile.layers], device=device)
