"""The index of a layer: its heads score it to find the rows that a query needs."""

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.kernels.blocks import PromptBlocks
from clo.kernels.encode import CODES_PER_BYTE, CodePages, encode_new
from clo.kernels.encode_prompts import encode_prompts
from clo.kernels.quantize_query import QuantizedQuery, quantize_query
from clo.kernels.score import score_codes, score_exact
from clo.runtime.model.kv_shape import KVShape

Prepared = TypeVar("Prepared")
"""What an index computes from a query before it is known which heads select."""


class Index(Protocol[Prepared]):
    """Says what every row of a sequence is worth to a query, for one layer."""

    def write_prompts(self, keys: Tensor, blocks: PromptBlocks) -> None:
        """Index whole prompts. keys: [N, kv_heads, head_dim]; blocks: which pages they fill."""

    def write(self, keys: Tensor, batch: Batch) -> None:
        """Index the newest key of each sequence. keys: [B, kv_heads, head_dim]."""

    def prepare(self, query: Tensor, lse: Tensor, batch: Batch) -> Prepared:
        """Do all that does not depend on which heads select.

        Args:
            query: [B, query_heads, head_dim].
            lse: [B, query_heads] float32, log-sum-exp of the last attention.
        """

    def score(self, prepared: Prepared, reselect: Tensor, batch: Batch, sinks: int, tail: int) -> Tensor:
        """Scores [B, kv_heads, T] int16, see ``clo.kernels.score``; undefined where ``reselect`` is False.

        Args:
            prepared: the return value of ``prepare``.
            reselect: [B, kv_heads] bool, heads that select.
            sinks, tail: numbers of first and latest tokens that are not candidates.
        """


class TwoBitIndex:
    """Rotated 2-bit codes (``clo.kernels.encode``), centred on the mean of their page if a prompt filled it.

    Args:
        pages: memory of the codes of this layer; also an attribute.
        rotation: [head_dim, head_dim] float32, see ``random_rotation``.
        scale: factor of the scores.
    """

    def __init__(self, pages: CodePages, rotation: Tensor, scale: float) -> None:
        self.pages, self._rotation, self._scale = pages, rotation, scale

    @staticmethod
    def allocate(shape: KVShape, pages: int, device: torch.device) -> list[CodePages]:
        """Memory for the pages of all layers."""
        lines = (shape.layers, pages, shape.kv_heads)
        code_bytes = shape.head_dim // CODES_PER_BYTE
        codes = torch.empty(*lines, shape.block_tokens, code_bytes, dtype=torch.uint8, device=device)
        scales = torch.empty(*lines, shape.block_tokens, dtype=torch.float16, device=device)
        centres = torch.empty(*lines, shape.head_dim, dtype=torch.float32, device=device)
        return [CodePages(*layer) for layer in zip(codes, scales, centres, strict=True)]

    @staticmethod
    def bytes_per_token(shape: KVShape) -> int:
        """Bytes that the index takes on the worker for a token, all layers and heads together."""
        row = shape.head_dim // CODES_PER_BYTE + 2 + shape.head_dim * 4 / shape.block_tokens
        return int(shape.layers * shape.kv_heads * row)

    def write_prompts(self, keys: Tensor, blocks: PromptBlocks) -> None:
        encode_prompts(keys, blocks, self.pages, self._rotation)

    def write(self, keys: Tensor, batch: Batch) -> None:
        encode_new(keys, batch.lengths, batch.pages, self.pages, self._rotation)

    def prepare(self, query: Tensor, lse: Tensor, batch: Batch) -> QuantizedQuery:
        return quantize_query(query, self.pages, self._rotation, lse, batch.lengths, batch.pages, self._scale)

    def score(
        self, prepared: QuantizedQuery, reselect: Tensor, batch: Batch, sinks: int, tail: int
    ) -> Tensor:
        return score_codes(
            prepared, self.pages, reselect, batch.lengths, batch.pages, sinks, tail, self._scale
        )


def random_rotation(head_dim: int, device: torch.device) -> Tensor:
    """An orthogonal matrix [head_dim, head_dim] float32, always the same for a size."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(gaussian).Q
    return rotation.float().contiguous().to(device)


class ExactQuery(NamedTuple):
    """A query as it is."""

    query: Tensor  # [B, query_heads, head_dim]
    lse: Tensor  # [B, query_heads] float32


class ExactIndex:
    """No index: scores the keys in the arena themselves. The reference for what an index loses.

    Args:
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        scale: factor of the scores.
    """

    def __init__(self, arena: Tensor, scale: float) -> None:
        self._arena, self._scale = arena, scale

    def write_prompts(self, keys: Tensor, blocks: PromptBlocks) -> None:
        """Nothing to do: the keys are in the arena already."""

    def write(self, keys: Tensor, batch: Batch) -> None:
        """Nothing to do: the keys are in the arena already."""

    def prepare(self, query: Tensor, lse: Tensor, batch: Batch) -> ExactQuery:
        return ExactQuery(query, lse)

    def score(self, prepared: ExactQuery, reselect: Tensor, batch: Batch, sinks: int, tail: int) -> Tensor:
        query, lse = prepared
        return score_exact(query, self._arena, batch.blocks, lse, batch.lengths, sinks, tail, self._scale)
