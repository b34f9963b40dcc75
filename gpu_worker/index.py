"""The index: what a head scores to find the rows that its query wants, without reading the rows."""

from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.shape import KVShape
from kernels.encode import CODES_PER_BYTE, encode
from kernels.select import scan, scan_exact


class Index(Protocol):
    """Estimates the products of queries with every key of a sequence, addressed by the arena's block ids."""

    token_bytes: int
    """Bytes that the index takes on the worker per token, all layers and heads together."""

    def write_prompt(self, layer: int, keys: Tensor, table: Tensor) -> None:
        """Index a whole prompt. keys: [T, kv_heads, head_dim]; table: [max_blocks] int64."""

    def write(self, layer: int, keys: Tensor, blocks: Tensor, offsets: Tensor, previous: Tensor) -> None:
        """Index one new key a sequence.

        keys: [N, kv_heads, head_dim]; blocks, offsets: [N] int64, where the new key stands;
        previous: [N] int64, the block before that one (the same at the start of a sequence).
        """

    def products(self, layer: int, query: Tensor, table: Tensor) -> Tensor:
        """query [B, query_heads, head_dim], table [B, max_blocks] to [B, kv_heads, group, T] float32."""


class TwoBitIndex:
    """Rotated 2-bit codes (``kernels.encode``).

    A block's centre is the mean of its keys when it is filled by a prompt; a block that decoding opens takes
    over the centre of the block before it, since its own mean is not known yet.

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
        self._rotation = torch.linalg.qr(gaussian).Q.float().to(device)
        row = code_bytes + self._scales.itemsize + shape.head_dim * 4 / shape.block_tokens
        self.token_bytes = int(shape.layers * shape.kv_heads * row)

    def write_prompt(self, layer: int, keys: Tensor, table: Tensor) -> None:
        block_tokens = self._codes.shape[3]
        for page in range(-(-len(keys) // block_tokens)):
            part, block = keys[page * block_tokens : (page + 1) * block_tokens], table[page]
            centre = part.float().mean(0)
            codes, scales = encode(part, centre, self._rotation)
            self._centres[layer, block] = centre
            self._codes[layer, block, :, : len(part)] = codes.transpose(0, 1)
            self._scales[layer, block, :, : len(part)] = scales.transpose(0, 1)

    def write(self, layer: int, keys: Tensor, blocks: Tensor, offsets: Tensor, previous: Tensor) -> None:
        opened = (offsets == 0)[:, None, None]
        source = blocks.where(offsets != 0, previous)
        first = opened & (source == blocks)[:, None, None]  # the first token of a sequence centres on itself
        centre = torch.where(first, keys.float(), self._centres[layer, source])
        self._centres[layer, blocks] = centre
        codes, scales = encode(keys, centre, self._rotation)
        self._codes[layer, blocks, :, offsets] = codes
        self._scales[layer, blocks, :, offsets] = scales

    def products(self, layer: int, query: Tensor, table: Tensor) -> Tensor:
        return scan(
            query, self._codes[layer], self._scales[layer], self._centres[layer], self._rotation, table
        )


class ExactIndex:
    """No index: scores the keys in the arena themselves. The reference for what an index loses."""

    token_bytes = 0

    def __init__(self, arena: Tensor) -> None:
        self._arena = arena  # [blocks, layers, kv_heads, block_tokens, 2, head_dim]

    def write_prompt(self, layer: int, keys: Tensor, table: Tensor) -> None:
        """Nothing to do: the keys are in the arena already."""

    def write(self, layer: int, keys: Tensor, blocks: Tensor, offsets: Tensor, previous: Tensor) -> None:
        """Nothing to do: the keys are in the arena already."""

    def products(self, layer: int, query: Tensor, table: Tensor) -> Tensor:
        return scan_exact(query, self._arena[:, layer], table)
