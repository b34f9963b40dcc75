"""How a batch of whole prompts is taken into the cache, against naive loops on fresh random inputs."""

import pytest
import torch
from torch import Tensor

from clo.kernels.append import append
from clo.kernels.blocks import PromptBlocks
from clo.kernels.copy_codes import load_codes, store_codes
from clo.kernels.decode_pages import decode_pages
from clo.kernels.encode import STEP, CodePages, unpack
from clo.kernels.encode_prompts import encode_prompts
from clo.kernels.encode_values import ValuePages, encode_prompt_values, halves_of
from clo.kernels.fill_resident import PromptSequences, fill_resident
from clo.kernels.load import load_blocks, load_rows
from clo.kernels.resident import ResidentSet
from clo.kernels.store import store_prompts
from tests.kernel_calls import prompt_blocks_of

BLOCK_TOKENS, KV_HEADS = 8, 3
LENGTHS = [1, BLOCK_TOKENS, 3 * BLOCK_TOKENS + 5, BLOCK_TOKENS - 1]
PADDING = 6  # tokens behind the last prompt
SINKS, RECENT, CAPACITY = 3, 4, 8
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def random_rows(lengths: list[int], dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of prompts behind each other, then some that are not numbers."""
    rows = torch.randn(sum(lengths) + PADDING, KV_HEADS, 2, dim)
    rows[sum(lengths) :] = torch.nan
    return rows.to(dtype)


def random_set(slots: int, dim: int, sinks: int = SINKS) -> ResidentSet:
    """A set with random content, also where positions are concerned."""
    positions, last_used = torch.randint(-1, 99, (2, slots, KV_HEADS, CAPACITY), dtype=torch.int32)
    rows = torch.randn(slots, KV_HEADS, sinks + RECENT + CAPACITY, 2, dim)
    return ResidentSet(rows, positions, last_used, sinks, RECENT)


def copy(resident: ResidentSet) -> ResidentSet:
    rows, positions, last_used = (part.clone() for part in resident[:3])
    return resident._replace(rows=rows, positions=positions, last_used=last_used)


def tokens_of(prompt_blocks: PromptBlocks) -> list[tuple[int, int, int, int]]:
    """(token of the batch, block, page, offset in both) of each token in a part."""
    parts = zip(*(field.tolist() for field in prompt_blocks), strict=True)
    return [(start + i, block, page, i) for start, count, block, page in parts for i in range(count)]


@dtypes
def test_rows_of_prompts_go_to_their_blocks_and_nowhere_else(dtype: torch.dtype) -> None:
    rows, prompt_blocks = random_rows(LENGTHS, 16, dtype), prompt_blocks_of(LENGTHS, BLOCK_TOKENS)
    arena = torch.randn(KV_HEADS, len(prompt_blocks.starts) + 3, BLOCK_TOKENS, 2, 16).to(dtype)
    arena = arena.transpose(0, 1)  # as the arena has it
    expected = arena.clone()
    tokens = tokens_of(prompt_blocks)
    assert [token for token, *_ in tokens] == [*range(sum(LENGTHS))]
    for token, block, _, offset in tokens:
        expected[block, :, offset] = rows[token]
    store_prompts(rows, prompt_blocks, arena)
    assert torch.equal(arena, expected)


@dtypes
def test_rows_of_whole_blocks_come_back(dtype: torch.dtype) -> None:
    rows = random_rows([5 * BLOCK_TOKENS], 16, dtype)[: 5 * BLOCK_TOKENS]
    blocks = torch.tensor([6, 0, 3, 2, 5])
    arena = torch.randn(KV_HEADS, 8, BLOCK_TOKENS, 2, 16).to(dtype).transpose(0, 1)
    for number, block in enumerate(blocks.tolist()):
        part = rows[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
        arena[block] = part.transpose(0, 1)
    found = torch.full_like(rows, torch.nan)
    load_blocks(found, blocks, arena)
    assert torch.equal(found, rows)
    with pytest.raises(ValueError, match="the blocks are whole"):
        load_blocks(found[1:], blocks, arena)


@dtypes
def test_some_rows_of_each_head_come_back_and_the_others_stay(dtype: torch.dtype) -> None:
    rows = random_rows([5 * BLOCK_TOKENS], 16, dtype)[: 5 * BLOCK_TOKENS]
    blocks = torch.tensor([6, 0, 3, 2, 5])
    arena = torch.randn(KV_HEADS, 8, BLOCK_TOKENS, 2, 16).to(dtype).transpose(0, 1)
    positions = torch.rand(KV_HEADS, len(rows)).argsort(1)[:, :11].int().contiguous()
    expected = rows.clone()
    for head, of_head in enumerate(positions.tolist()):
        for place in of_head:
            block, offset = divmod(place, BLOCK_TOKENS)
            expected[place, head] = arena[blocks[block], head, offset]
    load_rows(rows, positions, blocks, arena)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("dim", [16, 80, 128])
def test_codes_go_to_the_arena_and_come_back_as_rows_that_are_close(dim: int) -> None:
    """Whatever has become of the pages meanwhile."""
    size = 32
    lengths = [3 * size, 5]
    rows, prompt_blocks = random_rows(lengths, dim), prompt_blocks_of(lengths, size)
    rows[:, :, 0] += 3 * torch.randn(dim)
    pool = len(prompt_blocks.starts) + 3, KV_HEADS
    pages = CodePages(
        torch.zeros(*pool, size, dim // 4, dtype=torch.uint8),
        torch.zeros(*pool, size, dtype=torch.float16),
        torch.zeros(*pool, dim),
    )
    words = torch.zeros(*pool, size // 16, halves_of(dim), 32, 4, dtype=torch.int16)
    values = ValuePages(words, torch.zeros(*pool, size, dtype=torch.float16))
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()
    encode_prompts(rows[:, :, 0], prompt_blocks, pages, rotation)
    encode_prompt_values(rows[:, :, 1], prompt_blocks, values)
    code_bytes = size * (dim // 4 + 16 * halves_of(dim) + 4) + 4 * dim
    arena = torch.full((pool[0], KV_HEADS, code_bytes + 16), 7, dtype=torch.uint8)
    store_codes(pages, values, prompt_blocks, arena)
    used = prompt_blocks.counts > 0
    unused = torch.ones(pool[0], dtype=torch.bool)
    unused[prompt_blocks.blocks[used]] = False
    assert (arena[unused] == 7).all() and (arena[..., code_bytes:] == 7).all()
    written = [part.clone() for part in (*pages, *values)]
    other = torch.randperm(pool[0])[: len(used)].where(used, 2**40)
    load_codes(pages, values, prompt_blocks._replace(pages=other), arena)
    for part, its in zip((*pages, *values), written, strict=True):
        assert torch.equal(part[other[used]], its[prompt_blocks.pages[used]])
    found = torch.empty(3 * size, KV_HEADS, 2, dim)
    whole = prompt_blocks.counts == size
    decode_pages(found, other[whole], pages, values, rotation)
    error = (found - rows[: 3 * size]).norm(dim=-1)
    centred = rows[: 3 * size].unflatten(0, (3, size))
    centred = (centred - centred.mean(1, keepdim=True)).flatten(0, 1)
    assert (error[..., 0].mean() < 0.5 * centred[..., 0, :].norm(dim=-1).mean()).all()
    assert (error[..., 1].mean() < 0.5 * rows[: 3 * size, :, 1].norm(dim=-1).mean()).all()
    with pytest.raises(ValueError, match="a block's codes must fit"):
        store_codes(pages, values, prompt_blocks, arena[..., : code_bytes - 1])


@dtypes
@pytest.mark.parametrize("dim", [48, 64, 128])
@pytest.mark.parametrize("backwards", [False, True])
def test_keys_of_prompts_are_coded_around_the_mean_of_their_page(
    dim: int, dtype: torch.dtype, backwards: bool
) -> None:
    """In whatever order the parts are."""
    rows, prompt_blocks = random_rows(LENGTHS, dim, dtype), prompt_blocks_of(LENGTHS, BLOCK_TOKENS)
    if backwards:
        prompt_blocks = PromptBlocks(*(field.flip(0) for field in prompt_blocks))
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()
    count = len(prompt_blocks.starts) + 3
    pages = CodePages(
        torch.randint(0, 256, (count, KV_HEADS, BLOCK_TOKENS, dim // 4), dtype=torch.uint8),
        torch.rand(count, KV_HEADS, BLOCK_TOKENS).half(),
        torch.randn(count, KV_HEADS, dim),
    )
    before = CodePages(*(part.clone() for part in pages))
    keys = rows[:, :, 0]
    encode_prompts(keys, prompt_blocks, pages, rotation)

    used: dict[int, list[int]] = {}  # tokens of each page
    for token, _, page, _ in tokens_of(prompt_blocks):
        used.setdefault(page, []).append(token)
    for page, tokens in used.items():
        centre = keys[tokens].double().mean(0)
        torch.testing.assert_close(pages.centres[page].double(), centre, rtol=1e-5, atol=1e-6)
        rotated = (keys[tokens].double() - centre).transpose(0, 1) @ rotation.double()
        in_steps = rotated / (STEP * rotated.square().mean(2, keepdim=True).sqrt().clamp(min=1e-12))
        levels = unpack(pages.codes[page, :, : len(tokens)])
        if len(tokens) == 1:  # the key is its own centre
            assert not pages.scales[page, :, 0].any() and (levels == 2).all()
        else:
            different = levels != (in_steps.floor() + 2).clamp(0, 3)
            from_boundary = (in_steps - in_steps.round()).abs()
            assert (from_boundary[different] < 1e-4).all(), "only rounding may change a level"
            values = levels - 1.5
            fit = rotated.square().sum(2) / (rotated * values).sum(2).clamp(min=1e-30)
            torch.testing.assert_close(
                pages.scales[page, :, : len(tokens)].double(), fit, rtol=1e-3, atol=1e-6
            )
    for page in range(count):
        end = len(used.get(page, []))
        assert torch.equal(pages.codes[page, :, end:], before.codes[page, :, end:])
        assert torch.equal(pages.scales[page, :, end:], before.scales[page, :, end:])
        if not end:
            assert torch.equal(pages.centres[page], before.centres[page])


def filled(
    rows: Tensor, sequences: PromptSequences, chosen: Tensor | None, resident: ResidentSet
) -> ResidentSet:
    """What ``fill_resident`` has to make of a set, row by row."""
    resident = copy(resident)
    held, positions, last_used, sinks, recent = resident
    for number, (start, length, slot) in enumerate(zip(*(part.tolist() for part in sequences), strict=True)):
        candidates = range(sinks, length - recent)
        for h in range(resident.kv_heads):
            for position in range(min(sinks, length)):
                held[slot, h, position] = rows[start + position, h]
            for position in range(max(sinks, length - recent), length):
                held[slot, h, sinks + (position - sinks) % recent] = rows[start + position, h]
            members = [*candidates][: resident.capacity]
            if chosen is not None and len(candidates) > resident.capacity:
                members = chosen[number, h].tolist()
            positions[slot, h], last_used[slot, h] = -1, -1
            for entry, position in enumerate(members):
                held[slot, h, resident.first + entry] = rows[start + position, h]
                positions[slot, h, entry] = position
                last_used[slot, h, entry] = len(members) - 1 - entry
    return resident


@pytest.mark.parametrize("choose", [True, False])
@pytest.mark.parametrize("sinks", [SINKS, 0])
def test_slots_are_filled_with_sinks_ring_and_the_chosen_rows(sinks: int, choose: bool) -> None:
    first = sinks + RECENT
    lengths = [40, 1, sinks + 1, RECENT, first, first + 1, first + CAPACITY, first + CAPACITY + 1]
    rows, dim = random_rows(lengths, 16), 16
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    slots = torch.randperm(len(lengths) + 2)[: len(lengths)].tolist()
    # as a batch that is filled up with its last sequence
    sequences = PromptSequences(*(torch.tensor([*part, part[-1]]) for part in (starts, lengths, slots)))
    chosen = torch.full((len(lengths) + 1, KV_HEADS, CAPACITY), 2**30, dtype=torch.int32)
    for number, length in enumerate(lengths):
        if length > first + CAPACITY:  # for others it is not read
            drawn = torch.rand(KV_HEADS, length - first).argsort(1)[:, :CAPACITY]
            chosen[number] = drawn.int() + sinks
    chosen[-1] = chosen[-2]
    resident = random_set(len(lengths) + 2, dim, sinks)
    expected = filled(rows, sequences, chosen if choose else None, resident)
    fill_resident(rows, sequences, chosen if choose else None, resident)
    for found, wanted in zip(resident[:3], expected[:3], strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("length", [1, SINKS, SINKS + 2, SINKS + RECENT + 1, SINKS + RECENT + CAPACITY])
def test_a_prompt_that_fits_fills_a_slot_as_its_tokens_one_by_one_would(length: int) -> None:
    rows, resident = random_rows([length], 16), random_set(1, 16)
    resident.positions.fill_(-1)
    expected = copy(resident)
    for position in range(length):
        append(rows[position : position + 1], torch.tensor([position + 1]), expected)
    fill_resident(rows, PromptSequences(*torch.tensor([[0], [length], [0]])), None, resident)
    assert torch.equal(resident.positions, expected.positions)
    held, tokens = resident.tokens(0, length) >= 0, expected.tokens(0, length)
    assert torch.equal(resident.tokens(0, length), tokens)
    assert torch.equal(resident.rows[0, held], expected.rows[0, held])


def test_a_batch_without_a_sequence_is_refused() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="S >= 1 must hold"):
        fill_resident(random_rows([3], 16), PromptSequences(none, none, none), None, random_set(1, 16))
