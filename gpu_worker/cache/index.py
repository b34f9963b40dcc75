"""The index: what a head scores to find the rows that its query wants, without reading the rows."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from clo.kernels.encode import CODES_PER_BYTE, encode, encode_new
from clo.kernels.quantize_query import quantize_query
from clo.kernels.score import score_codes, score_exact
from clo.runtime.model.kv_shape import KVShape

Weigh = Callable[[Tensor, int, int], Tensor]
"""From heads that select [B, kv_heads] bool, sinks and tail to the keys of ``clo.kernels.score``."""


class Index(Protocol):
    """Tells what every row of a sequence is worth to a query, addressed by the arena's block ids."""

    token_bytes: int
    """Bytes that the index takes on the worker per token, all layers and heads together."""

    def write_prompt(self, layer: int, keys: Tensor, block_table: Tensor) -> None:
        """Index a whole prompt. keys: [T, kv_heads, head_dim]; block_table: [max_blocks] int64."""

    def write(self, layer: int, keys: Tensor, lengths: Tensor, block_table: Tensor) -> None:
        """Index the newest key of each sequence.

        keys: [B, kv_heads, head_dim]; lengths: [B] int64, with that key; block_table: [B, max_blocks] int64.
        """

    def quantize_query(
        self, layer: int, query: Tensor, lse: Tensor, lengths: Tensor, block_table: Tensor, scale: float
    ) -> Weigh:
        """Do all that needs no list of heads that select, and return the rest.

        query: [B, query_heads, head_dim]; lse: [B, query_heads] float32, log-sum-exp of the last attention;
        lengths: [B] int64; block_table: [B, max_blocks] int64; scale: of the softmax.
        """


class TwoBitIndex:
    """Rotated 2-bit codes (``clo.kernels.encode``), centred on the mean of their block where a prompt filled it.

    Args:
        shape: of the model's KV.
        blocks: of the arena.
        device: where the codes live.
    """

    def __init__(self, shape: KVShape, blocks: int, device: torch.device) -> None:
        pool = (shape.layers, blocks, shape.kv_heads)
        code_bytes = shape.head_dim // CODES_PER_BYTE
        self._codes = torch.empty(*pool, shape.block_tokens, code_bytes, dtype=torch.uint8, device=device)
        self._scales = torch.empty(*pool, shape.block_tokens, dtype=torch.float16, device=device)
        self._centres = torch.empty(*pool, shape.head_dim, dtype=torch.float32, device=device)
        generator = torch.Generator().manual_seed(0)
        gaussian = torch.randn(shape.head_dim, shape.head_dim, generator=generator, dtype=torch.float64)
        self._rotation = torch.linalg.qr(gaussian).Q.float().contiguous().to(device)
        self.token_bytes = self.bytes_per_token(shape)

    @staticmethod
    def bytes_per_token(shape: KVShape) -> int:
        """``token_bytes`` of an index for this shape."""
        row = shape.head_dim // CODES_PER_BYTE + 2 + shape.head_dim * 4 / shape.block_tokens
        return int(shape.layers * shape.kv_heads * row)

    def write_prompt(self, layer: int, keys: Tensor, block_table: Tensor) -> None:
        block_tokens, whole = self._codes.shape[3], len(keys) // self._codes.shape[3]
        filled = keys[: whole * block_tokens].view(whole, block_tokens, *keys.shape[1:])
        if whole:
            self._write_blocks(layer, filled, block_table[:whole])
        if whole * block_tokens < len(keys):
            self._write_blocks(
                layer, keys[whole * block_tokens :].unsqueeze(0), block_table[whole : whole + 1]
            )

    def _write_blocks(self, layer: int, keys: Tensor, blocks: Tensor) -> None:
        """keys: [N, tokens, kv_heads, head_dim], up to a block of tokens each; blocks: [N] int64."""
        centres = keys.float().mean(1)
        codes, scales = encode(keys, centres.unsqueeze(1), self._rotation)
        self._centres[layer, blocks] = centres
        self._codes[layer, blocks, :, : keys.shape[1]] = codes.transpose(1, 2)
        self._scales[layer, blocks, :, : keys.shape[1]] = scales.transpose(1, 2)

    def write(self, layer: int, keys: Tensor, lengths: Tensor, block_table: Tensor) -> None:
        encode_new(
            keys, lengths, block_table, self._codes[layer], self._scales[layer], self._centres[layer],
            self._rotation,
        )  # fmt: skip

    def quantize_query(
        self, layer: int, query: Tensor, lse: Tensor, lengths: Tensor, block_table: Tensor, scale: float
    ) -> Weigh:
        quantized = quantize_query(
            query,
            self._centres[layer],
            self._rotation,
            lse,
            lengths,
            block_table,
            self._codes.shape[3],
            scale,
        )

        def rest(reselect: Tensor, sinks: int, tail: int) -> Tensor:
            return score_codes(
                quantized,
                self._codes[layer],
                self._scales[layer],
                reselect,
                lengths,
                block_table,
                sinks,
                tail,
                scale,
            )

        return rest


class ExactIndex:
    """No index: scores the keys in the arena themselves. The reference for what an index loses."""

    token_bytes = 0

    def __init__(self, arena: Tensor) -> None:
        self._arena = arena  # [blocks, layers, kv_heads, block_tokens, 2, head_dim]

    def write_prompt(self, layer: int, keys: Tensor, block_table: Tensor) -> None:
        """Nothing to do: the keys are in the arena already."""

    def write(self, layer: int, keys: Tensor, lengths: Tensor, block_table: Tensor) -> None:
        """Nothing to do: the keys are in the arena already."""

    def quantize_query(
        self, layer: int, query: Tensor, lse: Tensor, lengths: Tensor, block_table: Tensor, scale: float
    ) -> Weigh:
        def rest(_: Tensor, sinks: int, tail: int) -> Tensor:
            return score_exact(query, self._arena[:, layer], block_table, lse, lengths, sinks, tail, scale)

        return rest
