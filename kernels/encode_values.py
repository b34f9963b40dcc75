"""Encode: 2-bit codes of values for the tail.

A value is rotated by a Hadamard transform with random signs, so that its entries are close to Gaussian
(QuaRot, Ashkboos et al. 2024), and rounded as keys are (``clo.kernels.encode``). The transform needs no
matrix, and is undone in a few additions once a sum of values is complete. Values are not centred: that gained
nothing in closeness, and the centres of all pages would have to be added to every sum.

Codes lie as tensor cores want them, 16 tokens to a run. A word of 16 bits holds the codes of one token's 8
entries ``8 * chunk`` to ``8 * chunk + 7``, low bits first; the 8 chunks of a half, times 16 tokens, are 256
bytes. A head with a number of chunks that is not a multiple of 8 leaves words of its last half empty.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import PROMPT_BLOCKS, PromptBlocks
from clo.kernels.compiled import Array, compiled, floats
from clo.kernels.encode import PAGE_TABLE, SMALLEST, STEP
from clo.kernels.launch import ELEMENTS, launch
from clo.kernels.limits import CHUNK, RUN

MIX = 0x5A3C69E7
"""Bit i is the sign of entry i before the transform; those of every second 32 entries are the opposite."""

_THREADS = 256


class ValuePages(NamedTuple):
    """One layer of the values' codes, in the pages of the keys' (``clo.kernels.encode.CodePages``)."""

    codes: Tensor  # [pages, kv_heads, block_tokens // 16, halves, 32, 4] int16, see ``pack_values``
    scales: Tensor  # [pages, kv_heads, block_tokens] float16

    @property
    def block_tokens(self) -> int:
        return self.scales.shape[2]


def halves_of(head_dim: int) -> int:
    """Halves of a run's codes: one for every 64 entries of a value."""
    return -(-head_dim // (8 * CHUNK))


VALUE_CODES = Argument(
    "values.codes",
    torch.int16,
    f"pages kv_heads block_tokens//{RUN} -(-head_dim//{8 * CHUNK}) 32 4",
    chunks=True,
)
VALUE_SCALES = Argument("values.scales", torch.float16, "pages kv_heads block_tokens", chunks=True)
WHOLE_RUNS = Rule(f"block_tokens % {RUN} == 0", "a run lies in one page")
WHOLE_CHUNKS = Rule(f"head_dim % {CHUNK} == 0", "a word of codes is of so many entries")
"""``ValuePages`` as arguments of operations."""

_PAGES = (VALUE_CODES._replace(name="pages.codes"), VALUE_SCALES._replace(name="pages.scales"))
_PROMPTS = Signature(
    "encode_prompt_values",
    (
        Argument("values", ELEMENT, "N kv_heads head_dim", dense=1, chunks=True),
        *PROMPT_BLOCKS, *_PAGES,
    ),
    (
        HEAD_DIM, WHOLE_RUNS, WHOLE_CHUNKS,
        Rule("P >= 1", "a launch needs a part, if only one that is not in use"),
    ),
)  # fmt: skip
_NEW = Signature(
    "encode_new_values",
    (
        Argument("values", ELEMENT, "B kv_heads head_dim", dense=1, chunks=True),
        Argument("lengths", torch.int64, "B"),
        PAGE_TABLE, *_PAGES,
    ),
    (HEAD_DIM, WHOLE_RUNS, WHOLE_CHUNKS),
)  # fmt: skip


def transform(vectors: Tensor) -> Tensor:
    """The Hadamard transform of float32 vectors [..., head_dim], normalised, in blocks of the largest power
    of 2 that divides head_dim. It is its own inverse."""
    dim = vectors.shape[-1]
    block = dim & -dim
    blocks = vectors.unflatten(-1, (dim // block, block))
    step = 1
    while step < block:
        pairs = blocks.unflatten(-1, (block // (2 * step), 2, step))
        low, high = pairs.unbind(-2)
        blocks = torch.stack((low + high, low - high), -2).flatten(-3)
        step *= 2
    transformed: Tensor = blocks.flatten(-2) * block**-0.5
    return transformed


@cache
def signs(dim: int) -> Tensor:
    """The signs [head_dim] float32 that entries get before the transform, as in ``encode_values.cu``."""
    return torch.tensor([1.0 - 2.0 * (MIX >> entry % 32 & 1 ^ entry // 32 % 2) for entry in range(dim)])


def encode_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and scales of values.

    Args:
        values: [..., head_dim], any float dtype.

    Returns:
        levels [..., head_dim] uint8, 0 to 3, of the rotated value; scales [...] float16.
    """
    rotated = transform(values.float() * signs(values.shape[-1]))
    squares = rotated.square().sum(-1, keepdim=True)
    step = (squares / values.shape[-1]).sqrt_().clamp_min_(1e-12).mul_(STEP)
    levels = (rotated / step).floor_().add_(2).clamp_(0, 3)
    along = ((levels - 1.5) * rotated).sum(-1).clamp_min_(SMALLEST)
    return levels.to(torch.uint8), (squares.squeeze(-1) / along).to(torch.float16)


def decode_values(levels: Tensor, scales: Tensor) -> Tensor:
    """Values [..., head_dim] float32 of what ``encode_values`` returned."""
    rotated = (levels.float() - 1.5) * scales.float().unsqueeze(-1)
    return transform(rotated) * signs(levels.shape[-1])


def pack_values(levels: Tensor) -> Tensor:
    """Words of whole runs: [..., tokens, head_dim] uint8 to [..., tokens // 16, halves, 32, 4] int16.

    Of a token's chunk c, half ``c // 8``, the word is that of lane ``4 * (c % 8) + t % 8 // 2`` and place
    ``t % 2 + 2 * (t // 8)``, where t is the token's number in its run.
    """
    tokens, dim = levels.shape[-2:]
    halves = halves_of(dim)
    chunks = levels.int().unflatten(-1, (-1, CHUNK))
    words = (chunks << 2 * torch.arange(CHUNK, dtype=torch.int32)).sum(-1)  # [..., tokens, chunks]
    words = torch.nn.functional.pad(words, (0, 8 * halves - dim // CHUNK))
    words = words.unflatten(-1, (halves, 8)).unflatten(-3, (tokens // RUN, 2, 4, 2))
    # [..., runs, upper, quad, second, halves, chunk] to [..., runs, halves, chunk, quad, upper, second]
    first = words.dim() - 6
    order = [*range(first), first, first + 4, first + 5, first + 2, first + 1, first + 3]
    packed: Tensor = words.permute(order).flatten(-2).flatten(-3, -2)
    return packed.to(torch.int16)


def unpack_values(words: Tensor, dim: int) -> Tensor:
    """The levels [..., tokens, head_dim] uint8 that ``pack_values`` packed."""
    parts = words.int().unflatten(-1, (2, 2)).unflatten(-3, (8, 4))
    # [..., runs, halves, chunk, quad, upper, second] to [..., runs, upper, quad, second, halves, chunk]
    first = parts.dim() - 6
    order = [*range(first), first, first + 4, first + 3, first + 5, first + 1, first + 2]
    parts = parts.permute(order).flatten(-2).flatten(-5, -2)[..., : dim // CHUNK]
    levels = torch.stack([parts >> 2 * place & 3 for place in range(CHUNK)], -1)
    return levels.flatten(-2).to(torch.uint8)


def encode_prompt_values(values: Tensor, prompt_blocks: PromptBlocks, pages: ValuePages) -> None:
    """Encode the values of a batch of whole prompts, in place.

    Args:
        values: [N, kv_heads, head_dim]; those of tokens that are in no part are not read.
        prompt_blocks: which tokens go to which page; a part fills the first tokens of its page.
        pages: this layer of the values' codes.
    """
    _PROMPTS.check(values, *prompt_blocks, *pages)
    starts, counts, _, numbers = prompt_blocks
    if not values.is_cpu:
        _, kv_heads, dim = values.shape
        chunk = 16 // values.itemsize
        launch(
            "encode_values.cu", "encode_prompt_values",
            (-(-pages.block_tokens * CHUNK // _THREADS), kv_heads, len(starts)), _THREADS,
            [values, values.stride(0) // chunk, values.stride(1) // chunk, starts, counts, numbers, *pages,
             STEP],
            ELEMENT=ELEMENTS[values.dtype], DIM=dim, BLOCK_TOKENS=pages.block_tokens, THREADS=_THREADS,
            MIX=MIX,
        )  # fmt: skip
        return
    for start, count, page in zip(starts.tolist(), counts.tolist(), numbers.tolist(), strict=True):
        if count > 0:
            levels, scales = encode_values(values[start : start + count].transpose(0, 1))
            runs = -(-count // RUN)
            held = unpack_values(pages.codes[page, :, :runs], values.shape[2])
            held[:, :count] = levels
            pages.codes[page, :, :runs] = pack_values(held)
            pages.scales[page, :, :count] = scales


def encode_new_values(values: Tensor, lengths: Tensor, page_table: Tensor, pages: ValuePages) -> None:
    """Encode the newest value of each sequence, in place.

    Args:
        values: [B, kv_heads, head_dim].
        lengths: [B] int64, tokens of each sequence with the new one; 0 for a slot not in use.
        page_table: [B, max_blocks] int64.
        pages: this layer of the values' codes.
    """
    _NEW.check(values, lengths, page_table, *pages)
    batch, kv_heads, dim = values.shape
    if not values.is_cpu:
        chunk = 16 // values.itemsize
        launch(
            "encode_values.cu", "encode_new_values", (-(-kv_heads // 4), batch), 32,
            [values, values.stride(0) // chunk, values.stride(1) // chunk, kv_heads, lengths, page_table,
             page_table.stride(0), *pages, STEP],
            ELEMENT=ELEMENTS[values.dtype], DIM=dim, BLOCK_TOKENS=pages.block_tokens, THREADS=32, MIX=MIX,
        )  # fmt: skip
        return
    scales = torch.empty(batch, kv_heads)
    _encode(
        floats(values), lengths.numpy(), page_table.contiguous().numpy(), pages.block_tokens,
        signs(dim).numpy(), dim & -dim, pages.codes.numpy(), scales.numpy(),
    )  # fmt: skip
    for sequence, length in enumerate(lengths.tolist()):
        if length > 0:
            number, offset = divmod(length - 1, pages.block_tokens)
            pages.scales[int(page_table[sequence, number]), :, offset] = scales[sequence]


def _loop(
    values: Array, lengths: Array, page_table: Array, block_tokens: int, flips: Array, block: int,
    codes: Array, scales: Array,
) -> None:  # fmt: skip
    batch, kv_heads, dim = values.shape
    rotated, unit = np.empty(dim, np.float32), np.float32(1) / np.sqrt(np.float32(block))
    for sequence in range(batch):
        number, offset = divmod(lengths[sequence] - 1, block_tokens)
        if number < 0 or number >= page_table.shape[1]:  # a slot not in use, or the caller hears of it
            continue
        page, run, token = page_table[sequence, number], offset // 16, offset % 16
        for head in range(kv_heads):
            for entry in range(dim):
                rotated[entry] = values[sequence, head, entry] * flips[entry]
            step = 1
            while step < block:
                for first in range(0, dim, 2 * step):
                    for entry in range(first, first + step):
                        low, high = rotated[entry], rotated[entry + step]
                        rotated[entry] = low + high
                        rotated[entry + step] = low - high
                step *= 2
            squares = np.float32(0)
            for entry in range(dim):
                rotated[entry] *= unit
                squares += rotated[entry] * rotated[entry]
            width = max(np.sqrt(squares / np.float32(dim)), np.float32(1e-12)) * np.float32(STEP)
            along = np.float32(0)
            for chunk in range(dim // 8):
                word = np.int32(0)
                for place in range(8):
                    value = rotated[chunk * 8 + place]
                    level = min(max(np.floor(value / width) + np.float32(2), np.float32(0)), np.float32(3))
                    along += value * (level - np.float32(1.5))
                    word |= np.int32(level) << np.int32(2 * place)
                lane, slot = 4 * (chunk % 8) + token % 8 // 2, token % 2 + 2 * (token // 8)
                codes[page, head, run, chunk // 8, lane, slot] = np.int16(word)
            scales[sequence, head] = squares / max(along, np.float32(SMALLEST))


_encode = compiled(_loop)
