"""The index of a layer: its heads score it to find the rows that a query needs."""

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.kernels.attend import AttentionState
from clo.kernels.attend_tail import attend_tail
from clo.kernels.blocks import PromptBlocks
from clo.kernels.copy_codes import load_codes, store_codes
from clo.kernels.decode_pages import decode_pages
from clo.kernels.encode import CODES_PER_BYTE, CodePages, encode_new
from clo.kernels.encode_prompts import encode_prompts
from clo.kernels.encode_values import ValuePages, encode_new_values, encode_prompt_values, halves_of
from clo.kernels.limits import RUN
from clo.kernels.quantize_query import QuantizedQuery, Rope, quantize_query
from clo.kernels.score import Scores, score_codes, score_exact
from clo.kernels.update_resident import TailList
from clo.runtime.model.kv_shape import KVShape

Prepared = TypeVar("Prepared")
"""What an index computes from a query before it is known which heads select."""


class Index(Protocol[Prepared]):
    """Says what every row of a sequence is worth to a query, for one layer."""

    def write_prompts(self, rows: Tensor, blocks: PromptBlocks) -> None:
        """Index whole prompts. rows: [N, kv_heads, 2, head_dim]; blocks: which pages they fill."""

    def store_codes(self, blocks: PromptBlocks) -> None:
        """Copy what ``write_prompts`` has written to the blocks in the arena, where these have codes."""

    def write(self, kv: Tensor, batch: Batch) -> None:
        """Index the newest row of each sequence. kv: [B, kv_heads, 2, head_dim]."""

    def prepare(self, query: Tensor, lse: Tensor, batch: Batch) -> Prepared:
        """Do all that does not depend on which heads select.

        Args:
            query: [B, query_heads, head_dim].
            lse: [B, query_heads] float32, log-sum-exp of the last attention.
        """

    def score(self, prepared: Prepared, reselect: Tensor, batch: Batch, sinks: int, latest: int) -> Scores:
        """Scores, see ``clo.kernels.score``; undefined where ``reselect`` is False.

        Args:
            prepared: the return value of ``prepare``.
            reselect: [B, kv_heads] bool, heads that select.
            sinks, latest: numbers of first and latest tokens that are not candidates.
        """


class TwoBitIndex:
    """Rotated 2-bit codes of keys (``clo.kernels.encode``), centred on the mean of their page if a prompt
    filled it, and, where there is a tail, of values (``clo.kernels.encode_values``).

    Args:
        pages: memory of the codes of this layer; also an attribute.
        values: the same for values, None where nothing attends to codes; also an attribute.
        rotation: [head_dim, head_dim] float32, see ``random_rotation``.
        scale: factor of the scores.
        stored: [blocks, kv_heads, code_bytes] uint8, the codes of this layer in the arena; None where blocks
            have none there.
    """

    def __init__(
        self,
        pages: CodePages,
        values: ValuePages | None,
        rotation: Tensor,
        scale: float,
        stored: Tensor | None = None,
    ) -> None:
        self.pages, self.values, self._rotation, self._scale = pages, values, rotation, scale
        self._stored = stored

    @staticmethod
    def allocate(
        shape: KVShape, pages: int, device: torch.device, *, values: bool
    ) -> list[tuple[CodePages, ValuePages | None]]:
        """Memory for the pages of all layers, with ``values`` or without."""
        lines = (shape.layers, pages, shape.kv_heads)
        code_bytes = shape.head_dim // CODES_PER_BYTE
        codes = torch.empty(*lines, shape.block_tokens, code_bytes, dtype=torch.uint8, device=device)
        scales = torch.empty(*lines, shape.block_tokens, dtype=torch.float16, device=device)
        centres = torch.empty(*lines, shape.head_dim, dtype=torch.float32, device=device)
        keys = [CodePages(*layer) for layer in zip(codes, scales, centres, strict=True)]
        if not values:
            return [(layer, None) for layer in keys]
        words = (shape.block_tokens // RUN, halves_of(shape.head_dim), 32, 4)
        value_codes = torch.empty(*lines, *words, dtype=torch.int16, device=device)
        value_scales = torch.empty_like(scales)
        return [
            (layer, ValuePages(*of_values))
            for layer, *of_values in zip(keys, value_codes, value_scales, strict=True)
        ]

    @staticmethod
    def bytes_per_token(shape: KVShape, *, values: bool) -> int:
        """Bytes that the index takes on the worker for a token, all layers and heads together."""
        row = shape.head_dim // CODES_PER_BYTE + 2 + shape.head_dim * 4 / shape.block_tokens
        if values:
            row += 16 * halves_of(shape.head_dim) + 2
        return int(shape.layers * shape.kv_heads * row)

    def write_prompts(self, rows: Tensor, blocks: PromptBlocks) -> None:
        encode_prompts(rows[:, :, 0], blocks, self.pages, self._rotation)
        if self.values is not None:
            encode_prompt_values(rows[:, :, 1], blocks, self.values)

    def store_codes(self, blocks: PromptBlocks) -> None:
        if self._stored is not None:
            assert self.values is not None, "who reads these codes wants those of values, too"
            store_codes(self.pages, self.values, blocks, self._stored)

    def load_codes(self, rows: Tensor, blocks: PromptBlocks) -> None:
        """Index whole blocks by their codes in the arena, and compute their rows from these.

        Args:
            rows: [N, kv_heads, 2, head_dim], to be filled.
            blocks: where they lie, and which pages they get.
        """
        assert self._stored is not None and self.values is not None, "the arena has no codes"
        load_codes(self.pages, self.values, blocks, self._stored)
        decode_pages(rows, blocks.pages, self.pages, self.values, self._rotation)

    def write(self, kv: Tensor, batch: Batch) -> None:
        encode_new(kv[:, :, 0], batch.lengths, batch.pages, self.pages, self._rotation)
        if self.values is not None:
            encode_new_values(kv[:, :, 1], batch.lengths, batch.pages, self.values)

    def prepare(self, query: Tensor, lse: Tensor, batch: Batch, rope: Rope | None = None) -> QuantizedQuery:
        """See ``Index``; with ``rope`` the query is one before RoPE."""
        return quantize_query(
            query, self.pages, self._rotation, lse, batch.lengths, batch.pages, self._scale, rope
        )

    def score(
        self, prepared: QuantizedQuery, reselect: Tensor, batch: Batch, sinks: int, latest: int
    ) -> Scores:
        return score_codes(
            prepared, self.pages, reselect, batch.lengths, batch.pages, sinks, latest, self._scale
        )

    def attend(
        self,
        state: AttentionState,
        prepared: QuantizedQuery,
        tail: TailList,
        lse: Tensor,
        batch: Batch,
        *,
        early: bool,
    ) -> None:
        """Attend to the tail; see ``clo.kernels.attend_tail``.

        Args:
            prepared: the return value of ``prepare`` for the query that attends, with the same ``lse``.
        """
        assert self.values is not None, "the index was made for a tail"
        attend_tail(
            state,
            prepared,
            self.pages,
            self.values,
            tail,
            batch.lengths,
            batch.pages,
            lse,
            self._scale,
            early=early,
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

    def write_prompts(self, rows: Tensor, blocks: PromptBlocks) -> None:
        """Nothing to do: the keys are in the arena already."""

    def store_codes(self, blocks: PromptBlocks) -> None:
        """Nothing to do: there are none."""

    def write(self, kv: Tensor, batch: Batch) -> None:
        """Nothing to do: the keys are in the arena already."""

    def prepare(self, query: Tensor, lse: Tensor, batch: Batch) -> ExactQuery:
        return ExactQuery(query, lse)

    def score(self, prepared: ExactQuery, reselect: Tensor, batch: Batch, sinks: int, latest: int) -> Scores:
        query, lse = prepared
        return score_exact(query, self._arena, batch.blocks, lse, batch.lengths, sinks, latest, self._scale)
