"""The kernel of ``clo.kernels.weigh_blocks``, in Triton. Only a GPU imports it.

Numbers of samples and blocks are no constants of the compiled kernel, since every chunk has others.

A program takes M sampled queries of one head and a stretch of keys, N at a time.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "blocks"])
def weigh(
    samples, keys, references, sums, count, blocks, factor,
    sample_stride, sample_head_stride, key_stride, key_head_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * (TILES * N // BLOCK), tl.program_id(2)
    rows = tl.program_id(1) * M + tl.arange(0, M)
    entries = tl.arange(0, WIDTH)
    there = (rows < count)[:, None]
    source = samples + rows[:, None] * sample_stride + head * sample_head_stride + entries[None, :]
    query = tl.load(source, mask=there & (entries < DIM)[None, :], other=0.0)
    reference = tl.load(references + head * count + rows, mask=rows < count, other=0.0)
    target = sums + (head * count + rows).to(tl.int64)[:, None] * blocks
    keys += (head // GROUP) * key_head_stride
    for tile in range(TILES):
        block = first + tile * (N // BLOCK)
        tokens = block * BLOCK + tl.arange(0, N)
        held = (tokens < blocks * BLOCK)[None, :] & (entries < DIM)[:, None]
        offsets = tokens.to(tl.int64)[None, :] * key_stride + entries[:, None]
        scores = tl.dot(query, tl.load(keys + offsets, mask=held, other=0.0))
        # by choice: a sum must stay finite, however much larger it is than that of the chunk's own rows
        weights = tl.exp2(tl.minimum(scores * factor - reference[:, None], 100.0))
        of_block = tl.sum(tl.reshape(weights, (M, N // BLOCK, BLOCK)), 2)
        numbers = block + tl.arange(0, N // BLOCK)
        tl.store(target + numbers[None, :], of_block, mask=there & (numbers < blocks)[None, :])
