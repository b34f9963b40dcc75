"""The CUDA kernels that take a batch of prompts into the cache, against their references on the CPU."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from clo.kernels import encode_prompts as encode_prompts_module
from clo.kernels.blocks import PromptBlocks
from clo.kernels.copy_codes import load_codes, store_codes
from clo.kernels.decode_pages import decode_pages
from clo.kernels.encode import CODES_PER_BYTE, STEP, CodePages, unpack
from clo.kernels.encode_prompts import encode_prompts
from clo.kernels.encode_values import ValuePages, halves_of
from clo.kernels.fill_resident import PromptSequences, fill_resident
from clo.kernels.limits import RUN
from clo.kernels.load import load_blocks, load_rows
from clo.kernels.resident import ResidentSet
from clo.kernels.store import store_prompts
from tests.cuda_tensors import RECENT, SINKS, mapped, on_gpu, resident_set, same
from tests.kernel_calls import SHAPES, prompt_blocks_of

pytestmark = pytest.mark.gpu

FIRST = SINKS + RECENT
shapes = pytest.mark.parametrize(("dim", "kv_heads", "group", "dtype"), SHAPES)


class Cache(NamedTuple):
    """What a batch of prompts goes to."""

    arena: Tensor
    pages: CodePages
    rotation: Tensor
    resident: ResidentSet


def prompt_rows(lengths: list[int], dim: int, kv_heads: int, dtype: torch.dtype, padded: int = 0) -> Tensor:
    """Rows of prompts behind each other, whose keys are not centred, then some that are not numbers."""
    total = sum(lengths)
    rows = torch.randn(max(padded, total + 37), kv_heads, 2, dim) + torch.randn(dim)
    rows[total:] = torch.nan
    return rows[: padded or None].to(dtype)


def sequences_of(lengths: list[int], slots: int, count: int) -> PromptSequences:
    """The prompts in different ones of so many slots, filled up to ``count`` sequences with the last one."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    columns = starts, lengths, torch.randperm(slots)[: len(lengths)].tolist()
    more = count - len(lengths)
    return PromptSequences(*(torch.tensor([*column, *[column[-1]] * more]) for column in columns))


def random_pages(prompt_blocks: PromptBlocks, kv_heads: int, block_tokens: int, dim: int) -> CodePages:
    pool = len(prompt_blocks.starts) + 3, kv_heads
    codes = torch.randint(0, 256, (*pool, block_tokens, dim // CODES_PER_BYTE), dtype=torch.uint8)
    return CodePages(codes, torch.randn(*pool, block_tokens).half(), torch.randn(*pool, dim))


def pages_on_gpu(pages: CodePages) -> CodePages:
    return CodePages(*(part.cuda() for part in pages))


def blocks_on_gpu(prompt_blocks: PromptBlocks) -> PromptBlocks:
    return PromptBlocks(*(part.cuda() for part in prompt_blocks))


def sequences_on_gpu(sequences: PromptSequences) -> PromptSequences:
    return PromptSequences(*(part.cuda() for part in sequences))


def same_pages(
    keys: Tensor, prompt_blocks: PromptBlocks, pages: CodePages, found: CodePages, rotation: Tensor
) -> None:
    """Whether pages agree up to rounding, which may also change a code whose value is between two levels."""
    codes, scales, centres = (part.cpu() for part in found)
    torch.testing.assert_close(centres, pages.centres, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scales, pages.scales, rtol=0.03, atol=1e-3)
    expected = pages.codes.clone()
    for start, count, _, page in zip(*(part.tolist() for part in prompt_blocks), strict=True):
        if count:
            centred = (keys[start : start + count].double() - pages.centres[page]).transpose(0, 1)
            rotated = centred @ rotation.double()
            in_steps = rotated / (STEP * rotated.square().mean(2, keepdim=True).sqrt().clamp(min=1e-12))
            from_boundary = (in_steps - in_steps.round()).abs()
            different = unpack(codes[page, :, :count]) != unpack(expected[page, :, :count])
            assert (from_boundary[different] < 1e-4).all()
            expected[page, :, :count] = codes[page, :, :count]
    assert torch.equal(codes, expected), "other tokens keep their codes"


@shapes
@pytest.mark.parametrize("block_tokens", [64, 512])
def test_store_prompts(dim: int, kv_heads: int, group: int, dtype: torch.dtype, block_tokens: int) -> None:
    lengths = [1, block_tokens, 2 * block_tokens + 7, 5]
    rows, prompt_blocks = prompt_rows(lengths, dim, kv_heads, dtype), prompt_blocks_of(lengths, block_tokens)
    arena = torch.randn(kv_heads, len(prompt_blocks.starts) + 3, block_tokens, 2, dim).to(dtype)
    arena, arena_gpu = arena.transpose(0, 1), mapped(arena).transpose(0, 1)
    store_prompts(rows, prompt_blocks, arena)
    store_prompts(rows.cuda(), blocks_on_gpu(prompt_blocks), arena_gpu)
    same((arena, arena_gpu))


@shapes
@pytest.mark.parametrize("block_tokens", [64, 512])
def test_load_blocks(dim: int, kv_heads: int, group: int, dtype: torch.dtype, block_tokens: int) -> None:
    arena = torch.randn(kv_heads, 23, block_tokens, 2, dim).to(dtype)
    arena, arena_gpu = arena.transpose(0, 1), mapped(arena).transpose(0, 1)
    for count in (1, 2, 17):
        blocks = torch.randperm(23)[:count]
        expected = torch.empty(count * block_tokens, kv_heads, 2, dim, dtype=dtype)
        found = torch.full_like(expected, torch.nan).cuda()
        load_blocks(expected, blocks, arena)
        load_blocks(found, blocks.cuda(), arena_gpu)
        same((expected, found))


@shapes
@pytest.mark.parametrize("block_tokens", [64, 512])
def test_load_rows(dim: int, kv_heads: int, group: int, dtype: torch.dtype, block_tokens: int) -> None:
    """Those that are not asked for stay."""
    arena = torch.randn(kv_heads, 23, block_tokens, 2, dim).to(dtype)
    arena, arena_gpu = arena.transpose(0, 1), mapped(arena).transpose(0, 1)
    blocks, tokens = torch.randperm(23)[:5], 5 * block_tokens
    expected = torch.randn(tokens, kv_heads, 2, dim).to(dtype)
    found = expected.cuda()
    for count in (1, 77, tokens):
        positions = torch.rand(kv_heads, tokens).argsort(1)[:, :count].int().contiguous()
        load_rows(expected, positions, blocks, arena)
        load_rows(found, positions.cuda(), blocks.cuda(), arena_gpu)
        same((expected, found))


def random_values(prompt_blocks: PromptBlocks, kv_heads: int, block_tokens: int, dim: int) -> ValuePages:
    pool = len(prompt_blocks.starts) + 3, kv_heads
    words = torch.randint(-(2**15), 2**15, (*pool, block_tokens // RUN, halves_of(dim), 32, 4))
    return ValuePages(words.to(torch.int16), torch.rand(*pool, block_tokens).half())


@shapes
@pytest.mark.parametrize("block_tokens", [64, 512])
def test_codes_go_to_the_arena_and_come_back(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype, block_tokens: int
) -> None:
    """Bit for bit, and nothing else changes."""
    prompt_blocks = prompt_blocks_of([1, 2 * block_tokens + 7, block_tokens], block_tokens)
    pages = random_pages(prompt_blocks, kv_heads, block_tokens, dim)
    values = random_values(prompt_blocks, kv_heads, block_tokens, dim)
    size = block_tokens * (dim // CODES_PER_BYTE + 16 * halves_of(dim) + 4) + 4 * dim + 48
    arena = torch.randint(0, 256, (kv_heads, len(prompt_blocks.starts) + 3, size), dtype=torch.uint8)
    arena, arena_gpu = arena.transpose(0, 1), mapped(arena).transpose(0, 1)
    on_device = (
        pages_on_gpu(pages),
        ValuePages(*(part.cuda() for part in values)),
        blocks_on_gpu(prompt_blocks),
    )
    store_codes(pages, values, prompt_blocks, arena)
    store_codes(*on_device, arena_gpu)
    same((arena, arena_gpu))
    for part in (*pages, *values, *on_device[0], *on_device[1]):
        part.zero_()
    load_codes(pages, values, prompt_blocks, arena)
    load_codes(*on_device, arena_gpu)
    same(*zip((*pages, *values), (*on_device[0], *on_device[1]), strict=True))


@shapes
@pytest.mark.parametrize("block_tokens", [64, 512])
def test_decode_pages(dim: int, kv_heads: int, group: int, dtype: torch.dtype, block_tokens: int) -> None:
    """Up to the rounding of 16 bits, in which keys are turned back."""
    prompt_blocks = prompt_blocks_of([3 * block_tokens], block_tokens)
    pages = random_pages(prompt_blocks, kv_heads, block_tokens, dim)
    values = random_values(prompt_blocks, kv_heads, block_tokens, dim)
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()
    numbers = torch.randperm(len(pages.codes))[:4]
    expected = torch.empty(4 * block_tokens, kv_heads, 2, dim, dtype=dtype)
    found = torch.full_like(expected, torch.nan).cuda()
    decode_pages(expected, numbers, pages, values, rotation)
    on_device = pages_on_gpu(pages), ValuePages(*(part.cuda() for part in values)), rotation.cuda()
    decode_pages(found, numbers.cuda(), *on_device)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}[dtype]
    off = (found.cpu().float() - expected.float()).norm(dim=-1)
    assert (off <= 3 * rounding * expected.float().norm(dim=-1) + 1e-5).all()


@shapes
@pytest.mark.parametrize(("block_tokens", "blocks"), [(64, 1024), (512, 1024), (512, 1), (192, 20)])
def test_encode_prompts(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype, block_tokens: int, blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where a block of threads takes several tiles of a page, as it does where there are many pages."""
    monkeypatch.setattr(encode_prompts_module, "_BLOCKS", blocks)
    lengths = [1, 2 * block_tokens + 7, block_tokens, *torch.randint(1, 2 * block_tokens, (2,)).tolist()]
    rows, prompt_blocks = prompt_rows(lengths, dim, kv_heads, dtype), prompt_blocks_of(lengths, block_tokens)
    pages = random_pages(prompt_blocks, kv_heads, block_tokens, dim)
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()
    found = pages_on_gpu(pages)
    encode_prompts(rows[:, :, 0], prompt_blocks, pages, rotation)
    encode_prompts(rows.cuda()[:, :, 0], blocks_on_gpu(prompt_blocks), found, rotation.cuda())
    same_pages(rows[:, :, 0], prompt_blocks, pages, found, rotation)


@shapes
@pytest.mark.parametrize("capacity", [5, 100, 1024])
@pytest.mark.parametrize("choose", [True, False])
def test_fill_resident(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype, capacity: int, choose: bool
) -> None:
    lengths = [FIRST + capacity + 300, 1, SINKS, FIRST, FIRST + 1, FIRST + capacity, FIRST + capacity + 1]
    rows, sequences = prompt_rows(lengths, dim, kv_heads, dtype), sequences_of(lengths, 9, 8)
    chosen = torch.full((8, kv_heads, capacity), 2**30, dtype=torch.int32)
    for number, length in enumerate(lengths):
        if length > FIRST + capacity:  # for others it is not read
            drawn = torch.rand(kv_heads, length - FIRST).argsort(1)[:, :capacity]
            chosen[number] = drawn.int() + SINKS
    chosen[-1] = chosen[-2]
    resident = resident_set(9, kv_heads, capacity, dim, dtype)
    resident.positions.random_(0, 999)
    found = on_gpu(resident)
    fill_resident(rows, sequences, chosen if choose else None, resident)
    fill_resident(rows.cuda(), sequences_on_gpu(sequences), chosen.cuda() if choose else None, found)
    same(*zip(resident[:3], found[:3], strict=True))


def test_a_graph_of_the_three_takes_in_whatever_batch_lies_in_its_tensors() -> None:
    dim, kv_heads, block_tokens, dtype, slots = 64, 2, 64, torch.bfloat16, 4
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()

    def batch(lengths: list[int]) -> tuple[Tensor, PromptBlocks, PromptSequences]:
        """Padded to 600 tokens, 16 parts and 4 sequences."""
        parts = (torch.cat((part, part.new_zeros(16 - len(part)))) for part in prompt_blocks_of(lengths, 64))
        rows = prompt_rows(lengths, dim, kv_heads, dtype, padded=600)
        return rows, PromptBlocks(*parts), sequences_of(lengths, slots, 4)

    def take(rows: Tensor, prompt_blocks: PromptBlocks, sequences: PromptSequences, cache: Cache) -> None:
        store_prompts(rows, prompt_blocks, cache.arena)
        encode_prompts(rows[:, :, 0], prompt_blocks, cache.pages, cache.rotation)
        fill_resident(rows, sequences, None, cache.resident)

    rows, prompt_blocks, sequences = batch([600])
    arena = torch.randn(len(prompt_blocks.starts) + 3, kv_heads, block_tokens, 2, dim).to(dtype)
    pages = random_pages(prompt_blocks, kv_heads, block_tokens, dim)
    cache = Cache(arena, pages, rotation, resident_set(slots, kv_heads, 30, dim, dtype))
    found = Cache(mapped(arena), pages_on_gpu(pages), rotation.cuda(), on_gpu(cache.resident))
    inputs = rows.cuda(), blocks_on_gpu(prompt_blocks), sequences_on_gpu(sequences)
    take(rows, prompt_blocks, sequences, cache)
    take(*inputs, found)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(*inputs, found)
    for lengths in ([1, 200, 64, 300], [65], [500, 3]):
        rows, prompt_blocks, sequences = batch(lengths)
        targets, sources = (inputs[0], *inputs[1], *inputs[2]), (rows, *prompt_blocks, *sequences)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        take(rows, prompt_blocks, sequences, cache)
        same((arena, found.arena), *zip(cache.resident[:3], found.resident[:3], strict=True))
        same_pages(rows[:, :, 0], prompt_blocks, pages, found.pages, rotation)
        pages.codes.copy_(found.pages.codes)  # the next batch is compared with what it finds
