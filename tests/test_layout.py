"""The layout of the arena: everyone who computes where a row lies finds the same place."""

from dataclasses import replace
from itertools import product

import pytest

from clo.kvstore.arena import Arena
from clo.kvstore.layout import ArenaLayout, arena_parts, arena_tensor, by_block
from clo.runtime.model.kv_shape import KVShape, LayerSpec
from clo.runtime.model.ranks import Rank

SHAPE = KVShape((LayerSpec(),) * 3, query_heads=4, kv_heads=2, head_dim=16, dtype_name="bfloat16")
BLOCKS = 5


def test_tensors_and_byte_offsets_are_of_one_layout() -> None:
    layout = ArenaLayout.of_block(SHAPE.layers, SHAPE.kv_heads, BLOCKS, SHAPE.block_bytes)
    assert layout.part_bytes == SHAPE.block_tokens * SHAPE.row_bytes
    arena = Arena.create(BLOCKS * SHAPE.block_bytes)
    rows = arena_tensor(arena, SHAPE, BLOCKS)
    assert rows.is_contiguous()
    blocks = by_block(rows)
    assert blocks.shape == (BLOCKS, SHAPE.layers, SHAPE.kv_heads, SHAPE.block_tokens, 2, SHAPE.head_dim)
    places = set()
    for block, layer, head in product(range(BLOCKS), range(SHAPE.layers), range(SHAPE.kv_heads)):
        part = blocks[block, layer, head]
        assert part.is_contiguous(), "one layer and head of a block is one piece of memory"
        offset = layout.offset(layer, head, block)
        assert part.data_ptr() - rows.data_ptr() == offset
        places.add(offset)
    parts = BLOCKS * SHAPE.layers * SHAPE.kv_heads
    assert places == set(range(0, parts * layout.part_bytes, layout.part_bytes)), "they fill the arena"


def test_what_one_layer_and_head_needs_of_all_blocks_lies_together() -> None:
    layout = ArenaLayout.of_block(layers=3, kv_heads=2, blocks=5, block_bytes=600)
    assert layout == ArenaLayout(layers=3, kv_heads=2, blocks=5, part_bytes=100)
    for layer, head in product(range(3), range(2)):
        starts = [layout.offset(layer, head, block) for block in range(5)]
        assert starts == list(range(starts[0], starts[0] + 500, 100))


def test_the_heads_of_a_rank_are_one_piece_of_each_layer_with_their_codes() -> None:
    shape = replace(SHAPE, kv_heads=4, codes=True)
    layout = ArenaLayout.of_block(shape.layers, shape.kv_heads, BLOCKS, shape.block_bytes)
    parts = arena_parts(Arena.create(BLOCKS * shape.block_bytes), shape, BLOCKS)
    for layer, rank in product(range(shape.layers), range(2)):
        heads = Rank(rank, 2).kv_heads(shape.kv_heads)
        own = parts[layer, heads]
        start, stop = (layout.offset(layer, head, 0) for head in (heads.start, heads.stop))
        assert own.is_contiguous() and own.nbytes == stop - start
        assert own.data_ptr() - parts.data_ptr() == start


@pytest.mark.parametrize(("layers", "kv_heads"), [(7, 2), (3, 401)])
def test_blocks_that_are_not_that_many_layers_and_heads_are_refused(layers: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"1200 bytes .* {layers} layers of {kv_heads} KV heads"):
        ArenaLayout.of_block(layers, kv_heads, 5, 1200)
