"""The layout of the arena, which is the order of its rows. Everyone who reads or writes a row asks here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby, product
from typing import TYPE_CHECKING

from clo.kvstore.arena import Arena, Piece

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from clo.runtime.model.kv_shape import KVShape

_PAGE = 2 * 2**20  # a huge page of most machines, and a multiple of any other


@dataclass(frozen=True)
class ArenaLayout:
    """``[layer][kv_head][block][token][K|V][head_dim]``: the rows that one layer and head needs from many
    blocks are close together, which suits the GPU's address translation.

    With ``--prefix-attention sparse`` the codes of a block's rows follow behind them, for each layer and
    head: they are read in pieces of some 35 KB, and whoever copies blocks as bytes copies both.

    Args:
        layers, kv_heads: numbers of the model's layers and KV heads.
        blocks: number of blocks in the arena.
        part_bytes: size of one layer and KV head of a block.
    """

    layers: int
    kv_heads: int
    blocks: int
    part_bytes: int

    @classmethod
    def of_block(cls, layers: int, kv_heads: int, blocks: int, block_bytes: int) -> "ArenaLayout":
        """The layout of blocks of ``block_bytes`` bytes, all layers and heads together.

        Raises:
            ValueError: the bytes cannot be divided among so many layers and heads.
        """
        part, rest = divmod(block_bytes, layers * kv_heads)
        if rest:
            raise ValueError(
                f"{block_bytes} bytes of a block are not {layers} layers of {kv_heads} KV heads."
            )
        return cls(layers, kv_heads, blocks, part)

    def offset(self, layer: int, kv_head: int, block: int) -> int:
        """Byte at which one layer and head of a block begins."""
        return ((layer * self.kv_heads + kv_head) * self.blocks + block) * self.part_bytes

    def on_nodes(self, head_nodes: Sequence[int], size: int) -> Iterator[Piece]:
        """The pieces of an arena of ``size`` bytes where each KV head lies on a NUMA node of its own, in
        every layer. They begin and end where pages do: a page that several heads share lies on the node of
        the one with which it begins, and what is behind the last block on the last one's."""
        heads = product(range(self.layers), range(self.kv_heads))
        starts = [min(size, -(-self.offset(*head, 0) // _PAGE) * _PAGE) for head in heads]
        pieces = map(Piece, starts, [*starts[1:], size], cycle(head_nodes))
        held = (piece for piece in pieces if piece.start < piece.stop)
        for node, run in groupby(held, lambda piece: piece.node):
            same = list(run)
            yield Piece(same[0].start, same[-1].stop, node)


def arena_parts(arena: Arena, shape: "KVShape", blocks: int) -> "torch.Tensor":
    """The bytes of an arena as a tensor, in the order of memory: [layers, kv_heads, blocks, part_bytes]."""
    import torch  # here, because the store itself needs none

    return arena.tensor(torch.uint8, (shape.layers, shape.kv_heads, blocks, shape.part_bytes))


def rows_of(parts: "torch.Tensor", shape: "KVShape") -> "torch.Tensor":
    """The rows in ``arena_parts``, in the order of memory: [layers, kv_heads, blocks, block_tokens, 2,
    head_dim], a view."""
    flat = parts[..., : shape.block_tokens * shape.row_bytes].view(shape.dtype)
    rows: torch.Tensor = flat.unflatten(-1, (shape.block_tokens, 2, shape.head_dim))
    return rows


def codes_of(parts: "torch.Tensor", shape: "KVShape") -> "torch.Tensor | None":
    """The codes in ``arena_parts``, a view [blocks, layers, kv_heads, code_bytes] uint8; None where blocks
    have none."""
    if not shape.codes:
        return None
    return parts[..., shape.block_tokens * shape.row_bytes :].permute(2, 0, 1, 3)


def arena_tensor(arena: Arena, shape: "KVShape", blocks: int) -> "torch.Tensor":
    """The rows of an arena, see ``rows_of``."""
    return rows_of(arena_parts(arena, shape, blocks), shape)


def arena_bytes(arena: Arena, layout: ArenaLayout) -> "NDArray[np.uint8]":
    """The bytes of an arena in the order of memory: [layers * kv_heads][blocks][part_bytes]."""
    return arena.bytes((layout.layers * layout.kv_heads, layout.blocks, layout.part_bytes))


def by_block(rows: "torch.Tensor") -> "torch.Tensor":
    """``arena_tensor`` as everyone indexes it: [blocks, layers, kv_heads, block_tokens, 2, head_dim]."""
    return rows.permute(2, 0, 1, 3, 4, 5)
