"""Prefill, layer by layer: only one layer's KV is on the worker at a time; each row leaves it once."""

import torch
from torch import Tensor

from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import PROMPT_QUERIES
from clo.gpu_worker.model.decoder import Decoder
from clo.kernels.attend import attend_prompt
from clo.runtime.model.kv_shape import KVShape

_CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}  # about as long as a decode step


def prefill_bytes(shape: KVShape, tokens: int) -> int:
    """About the most GPU memory that the prefill of a prompt takes, apart from its index pages."""
    width = shape.query_heads * shape.head_dim * shape.dtype.itemsize
    rows = 2 * shape.kv_heads * shape.row_bytes  # of the current layer and of the one being stored
    ranking = PROMPT_QUERIES * shape.query_heads * 12 + shape.kv_heads * shape.head_dim * 4
    index = shape.kv_heads * shape.head_dim * 16
    rope = 8 * shape.head_dim
    return tokens * (2 * width + rows + rope + max(ranking, index)) + _CHUNK_TOKENS["cuda"] * 24 * width


class Prefill:
    """The prefill of one prompt, cut into units of one layer of one chunk, so that decode steps fit in
    between.

    Args:
        decoder: the model.
        cache: takes each layer's rows.
        slot: the sequence's slot.
        tokens: the prompt, at least one token.
        block_table, page_table: [max_blocks] int64, those of the sequence.

    Attributes:
        chunk_tokens: tokens of a chunk; it may be changed before the first ``advance``.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slot: int,
        tokens: list[int],
        block_table: Tensor,
        page_table: Tensor,
    ) -> None:
        self._decoder, self._cache, self._slot = decoder, cache, slot
        self._block_table, self._page_table = block_table, page_table
        self.total = len(tokens)
        device, shape = block_table.device, decoder.shape
        ids = torch.tensor(
            tokens, pin_memory=device.type == "cuda"
        )  # else the copy would wait for the device
        self._hidden = decoder.embed(ids.to(device, non_blocking=True))
        self._rope = decoder.rope(torch.arange(self.total, device=device))
        self._rows = torch.empty(
            self.total, shape.kv_heads, 2, shape.head_dim, dtype=shape.dtype, device=device
        )
        chunks = -(-self.total // _CHUNK_TOKENS[device.type])
        # equal chunks: the last one holds queries enough to select with
        self.chunk_tokens = -(-self.total // chunks)
        self._layer = self._start = 0

    @property
    def done(self) -> int:
        """Work that is finished, as a number of prompt tokens out of ``total``."""
        return (self._layer * self.total + self._start) // self._decoder.shape.layers

    def last_hidden(self, count: int) -> Tensor:
        """Hidden states [count, hidden] of the last tokens, as they left the layers that are complete."""
        return self._hidden[-count:]

    @torch.inference_mode()
    def advance(self) -> Tensor | None:
        """One unit of work; returns the logits [1, vocab] after the last one, else None."""
        layer, start = self._layer, self._start
        end = min(start + self.chunk_tokens, self.total)
        hidden = self._hidden[start:end]
        cos, sin = self._rope
        normed = self._decoder.input_norm(layer, hidden)
        query, rows = self._decoder.qkv(layer, normed, (cos[start:end], sin[start:end]))
        self._rows[start:end] = rows
        attended = attend_prompt(query, self._rows[:end], self._decoder.scale)
        hidden, normed = self._decoder.add_attention(layer, hidden, attended)
        self._hidden[start:end], normed = self._decoder.add_mlp(layer, hidden, normed)
        self._start = end
        if end < self.total:
            return None
        self._cache.take_prompt(self._slot, layer, self._rows, query, self._block_table, self._page_table)
        self._rows = torch.empty_like(self._rows)  # the former ones may be on their way to the arena
        self._layer, self._start = layer + 1, 0
        if self._layer < self._decoder.shape.layers:
            return None
        return self._decoder.logits(normed[-1:])
