"""The layers of one decode step: which query each one selects with, and what runs at the same time."""

import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.side_stream import SideStream
from clo.kernels.attend import AttentionState
from clo.kernels.quantize_query import Rope
from clo.kernels.update_resident import FetchList


class DecodeStep:
    """The model's part of a decode step, over the cache.

    Args:
        decoder: the model.
        cache: the cache of its KV.
        sources: the query that each layer selects with.
        verified: whether a layer that was prefetched for selects again with its own query.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, sources: tuple[QuerySource, ...], *, verified: bool
    ) -> None:
        self._decoder, self._cache, self._sources, self._verified = decoder, cache, sources, verified
        # for even and for odd layers
        self._ahead = SideStream(decoder.device), SideStream(decoder.device)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Logits [B, vocab] float32 of the current tokens [B]; rows of slots not in use are undefined."""
        decoder, cache = self._decoder, self._cache
        hidden = decoder.embed(tokens)
        normed = decoder.input_norm(0, hidden)
        rope = decoder.rope((batch.lengths - 1).clamp_min(0))
        fetch_list: FetchList | None = None
        for layer, source in enumerate(self._sources):
            following = (*self._sources, QuerySource.OWN)[layer + 1]
            next_list: FetchList | None = None
            if following is QuerySource.INPUT:
                next_list = self._prefetch(layer + 1, hidden, rope, batch)
            heads = decoder.project(layer, normed)
            if source is not QuerySource.OWN:
                self._ahead[layer % 2].join()  # from here on the tail is that of the prefetch
            select = source is QuerySource.OWN or self._verified
            begun: AttentionState | None = None
            if not select and not decoder.norms_heads:
                # This takes longer than attention to the rows, so it does not wait for RoPE, which it applies
                # by itself. It knows no q/k norm: where there is one, ``attend`` begins it with its query.
                begun = cache.begin_tail(layer, heads[:, : decoder.shape.query_heads], batch, rope)
            query, kv = decoder.rotate(layer, heads, rope)
            attended = cache.attend(layer, query, kv, batch, fetch_list, begun, select=select)
            hidden, normed = decoder.add_attention(layer, hidden, attended)
            if following is QuerySource.MIDDLE:
                next_list = self._prefetch(layer + 1, hidden, rope, batch)
            hidden, normed = decoder.add_mlp(layer, hidden, normed)
            fetch_list = next_list
        logits = decoder.logits(normed)
        cache.end_step()  # last, so that nothing waits for the new rows
        return logits

    @property
    def late_layers(self) -> list[int] | None:
        """The layers that select only with their own query, so that nothing but their own attention hides the
        fetching; None where others do both, as their rows are not counted apart."""
        own = [layer for layer, source in enumerate(self._sources) if source is QuerySource.OWN]
        return own if not self._verified or len(own) == len(self._sources) else None

    def _prefetch(self, layer: int, hidden: Tensor, rope: Rope, batch: Batch) -> FetchList:
        """Select for a layer with the query that hidden states of the layer before predict."""
        with self._ahead[layer % 2].fork(hidden):
            predicted = self._decoder.query(layer, self._decoder.input_norm(layer, hidden), rope)
            return self._cache.prefetch(layer, predicted, batch)
