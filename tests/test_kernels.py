"""Every operation of the decode path against a naive loop, on fresh random inputs."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from clo.kernels.append import append
from clo.kernels.attend import attend_all, attend_resident, merge_fetched
from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.blocks import gather_tokens
from clo.kernels.encode import CodePages, encode, encode_new, unpack
from clo.kernels.fetch import fetch
from clo.kernels.gate import gate
from clo.kernels.quantize_query import QuantizedQuery, Rope, quantize_query
from clo.kernels.resident import ResidentSet
from clo.kernels.score import NEVER, score_codes, score_exact, score_products
from clo.kernels.store import store_new, store_prompt
from clo.kernels.update_resident import FetchList, update_resident
from tests.tail_inputs import with_runs

SINKS, RECENT, CAPACITY = 3, 4, 8
SHAPES = [
    (64, 1, 3),
    (64, 3, 3),
    (80, 2, 1),
    (96, 2, 4),
    (128, 1, 8),
    (256, 2, 2),
]  # head_dim, KV heads, group
BLOCK_TOKENS = 8


def softmax_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query [D], keys and values [T, D] in float64."""
    weights = (keys.double() @ query.double() * scale).softmax(0)
    return weights @ values.double()


def arena_layer(batch: int, max_blocks: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """One layer of a random arena with more blocks than needed, and a table of shuffled distinct blocks."""
    blocks = batch * max_blocks + 3
    block_table = torch.randperm(blocks)[: batch * max_blocks].view(batch, max_blocks)
    return torch.randn(blocks, kv_heads, BLOCK_TOKENS, 2, dim), block_table


def empty_set(
    batch: int, kv_heads: int, dim: int, fill: float = torch.nan, sinks: int = SINKS, capacity: int = CAPACITY
) -> ResidentSet:
    """A resident set without any positions, whose rows are ``fill`` throughout."""
    positions = torch.full((batch, kv_heads, capacity), -1, dtype=torch.int32)
    rows = torch.full((batch, kv_heads, sinks + RECENT + capacity, 2, dim), fill)
    return ResidentSet(rows, positions, positions.clone(), sinks, RECENT)


def random_rotation(dim: int) -> Tensor:
    rotation: Tensor = torch.linalg.qr(torch.randn(dim, dim)).Q
    return rotation.contiguous()


def random_pages(batch: int, max_blocks: int, kv_heads: int, dim: int) -> tuple[CodePages, Tensor]:
    """One layer of an index with random content, and a table of shuffled distinct pages."""
    pages = batch * max_blocks + 3
    page_table = torch.randperm(pages)[: batch * max_blocks].view(batch, max_blocks)
    codes = torch.randint(0, 256, (pages, kv_heads, BLOCK_TOKENS, dim // 4), dtype=torch.uint8)
    scales = torch.rand(pages, kv_heads, BLOCK_TOKENS).half()
    return CodePages(codes, scales, torch.randn(pages, kv_heads, dim)), page_table


@pytest.mark.parametrize(("dim", "kv_heads", "group"), SHAPES)
def test_attention_over_everything_and_over_a_chunk(dim: int, kv_heads: int, group: int) -> None:
    arena, block_table = arena_layer(3, 4, kv_heads, dim)
    lengths = torch.tensor([1, 17, 32])
    query = torch.randn(3, kv_heads * group, dim)
    out = attend_all(query, arena, block_table, lengths, 0.3)
    rows = gather_tokens(arena, block_table)
    for b in range(3):
        for h in range(kv_heads * group):
            keys, values = rows[b, h // group, : lengths[b]].unbind(1)
            torch.testing.assert_close(
                out[b, h].double(), softmax_attention(query[b, h], keys, values, 0.3), rtol=1e-4, atol=1e-5
            )

    prompt = torch.randn(10, kv_heads, 2, dim)
    queries = torch.randn(4, kv_heads * group, dim)
    out, lse = attend_prompt(queries, prompt, 0.3)
    for i in range(4):
        for h in range(kv_heads * group):
            keys, values = prompt[: 7 + i, h // group].unbind(1)
            torch.testing.assert_close(lse[i, h], (keys @ queries[i, h] * 0.3).logsumexp(0))
            torch.testing.assert_close(
                out[i, h].double(), softmax_attention(queries[i, h], keys, values, 0.3), rtol=1e-4, atol=1e-5
            )


def test_append_keeps_sinks_ring_and_set_in_step_with_the_arena() -> None:
    batch, kv_heads, dim = 3, 2, 16
    arena, block_table = arena_layer(batch, 4, kv_heads, dim)
    resident = empty_set(batch, kv_heads, dim)
    history = torch.randn(30, batch, kv_heads, 2, dim)
    joins = torch.tensor([30, 0, 5])  # step at which a sequence begins; the first one never does
    untouched = arena.clone()
    lengths = torch.zeros(batch, dtype=torch.int64)
    for step in range(30):
        lengths += step >= joins
        for _ in range(1 + step % 2):  # every second step is repeated
            append(history[step], lengths, resident)
        store_new(history[step], lengths, block_table, arena)
    written, rows = gather_tokens(arena, block_table), resident.rows
    for b in range(1, 3):
        mine = history[joins[b] :, b]
        assert torch.equal(written[b, :, : len(mine)], mine.transpose(0, 1))
        assert torch.equal(
            written[b, :, len(mine) :], gather_tokens(untouched, block_table)[b, :, len(mine) :]
        )
        assert torch.equal(rows[b, :, :SINKS], mine[:SINKS].transpose(0, 1))
        for position in range(len(mine) - RECENT, len(mine)):
            place = SINKS + (position - SINKS) % RECENT
            assert torch.equal(rows[b, :, place], mine[position])
        for entry in range(CAPACITY):  # while there was room, the rows that left the ring entered the set
            assert (resident.positions[b, :, entry] == SINKS + entry).all()
            assert torch.equal(rows[b, :, resident.first + entry], mine[SINKS + entry])
    assert (resident.positions[0] == -1).all()
    assert rows[0].isnan().all()
    assert torch.equal(written[0], gather_tokens(untouched, block_table)[0])


@pytest.mark.parametrize("length", [1, SINKS, SINKS + 1, SINKS + RECENT, SINKS + RECENT + 2, 30])
def test_the_set_says_which_tokens_it_holds(length: int) -> None:
    resident, history = empty_set(3, 2, 16), torch.randn(length, 3, 2, 2, 16)
    for step in range(length):
        append(history[step], torch.tensor([0, step + 1, 0]), resident)
    expected = {*range(min(length, SINKS)), *range(max(SINKS, length - RECENT), length)}
    expected |= {*range(SINKS, min(SINKS + CAPACITY, length - RECENT))}
    tokens, rows = resident.tokens(1, length), resident.rows[1]
    assert tokens.shape == rows.shape[:2] and tokens.dtype == torch.int64
    for h in range(2):
        filled = tokens[h] >= 0
        held = tokens[h, filled]
        assert sorted(held.tolist()) == sorted(expected)
        assert torch.equal(rows[h, filled], history[held, 1, h])
        assert rows[h, ~filled].isnan().all() and (tokens[h, ~filled] == -1).all()

    part = resident.slots(2)
    for name in ("rows", "positions", "last_used"):
        found, whole = getattr(part, name), getattr(resident, name)
        assert found.shape == whole[:2].shape and found.data_ptr() == whole.data_ptr(), "no copy"
    assert (part.sinks, part.recent, part.capacity) == (SINKS, RECENT, CAPACITY)


@pytest.mark.parametrize("tokens", [1, BLOCK_TOKENS, 2 * BLOCK_TOKENS + 3, 4 * BLOCK_TOKENS])
def test_store_writes_the_rows_of_a_prompt_and_nothing_else(tokens: int) -> None:
    arena, block_table = arena_layer(1, 4, 3, 16)
    expected, rows = arena.clone(), torch.randn(tokens, 3, 2, 16)
    for position in range(tokens):
        block = block_table[0, position // BLOCK_TOKENS]
        expected[block, :, position % BLOCK_TOKENS] = rows[position]
    store_prompt(rows, block_table[0].tolist(), arena)
    assert torch.equal(arena, expected)


def test_a_prompt_needs_blocks_enough() -> None:
    arena, _ = arena_layer(1, 4, 3, 16)
    with pytest.raises(ValueError, match="the blocks must hold the prompt"):
        store_prompt(torch.randn(BLOCK_TOKENS + 1, 3, 2, 16), [2], arena)


def test_attention_sees_the_rows_that_are_resident_and_those_that_arrive_later() -> None:
    kv_heads, dim, first, scale = 2, 32, SINKS + RECENT, 0.2
    for length, held, coming in ((1, 0, 0), (3, 0, 0), (first + 3, 3, 0), (50, CAPACITY, 4), (50, 5, 5)):
        resident = empty_set(1, kv_heads, dim, fill=1e4)  # poison
        valid = [*range(min(length, first)), *range(first, first + held)]
        rows = torch.randn(1, kv_heads, len(valid), 2, dim)
        resident.positions[..., :held] = torch.arange(held) + SINKS
        entries = torch.zeros(1, kv_heads, 6, dtype=torch.int32)
        entries[..., :coming] = torch.randperm(max(held, 1))[:coming].sort().values
        fetch_list = FetchList(entries, torch.full((1, kv_heads), coming, dtype=torch.int32))
        late = [first + entry for entry in entries[0, 0, :coming].tolist()]
        newest = length - 1 if length <= SINKS else SINKS + (length - 1 - SINKS) % RECENT
        kv = rows[:, :, newest].contiguous()  # its place in the ring is poison too
        early = [place for place, row in enumerate(valid) if row not in (*late, newest)]
        resident.rows[:, :, [valid[place] for place in early]] = rows[:, :, early]
        query, lse = torch.randn(1, 6, dim), torch.full((1, 6), torch.nan)
        lengths = torch.tensor([length])
        state = attend_resident(query, kv, resident, lengths, fetch_list, scale)
        resident.rows[:, :, valid] = rows
        out = merge_fetched(state, query, resident, lengths, fetch_list, lse, scale)
        for h in range(6):
            keys, values = rows[0, h // 3].unbind(1)
            torch.testing.assert_close(
                out[0, h].double(), softmax_attention(query[0, h], keys, values, scale), rtol=1e-4, atol=1e-5
            )
            expected = (keys @ query[0, h] * scale).logsumexp(0)
            torch.testing.assert_close(lse[0, h], expected, rtol=1e-4, atol=1e-4)


def test_attention_over_a_large_set_without_sinks_passes_over_a_slot_not_in_use() -> None:
    kv_heads, group, dim, held, scale = 2, 3, 64, 790, 0.2
    resident = empty_set(2, kv_heads, dim, fill=1e4, sinks=0, capacity=800)
    rows = torch.randn(kv_heads, RECENT + held, 2, dim).bfloat16()
    resident = resident._replace(rows=resident.rows.bfloat16())
    resident.rows[1, :, : RECENT + held] = rows
    resident.positions[1, :, :held] = torch.arange(held)
    newest = 4999 % RECENT
    kv, resident.rows[1, :, newest] = rows[:, newest].repeat(2, 1, 1, 1), 1e4
    lengths, query = torch.tensor([0, 5000]), torch.randn(2, kv_heads * group, dim).bfloat16()
    entries = torch.zeros(2, kv_heads, 6, dtype=torch.int32)
    entries[1, :, :4] = torch.tensor([0, 7, 100, 789])
    for fetch_list in (None, FetchList(entries, torch.tensor([[0, 0], [4, 0]], dtype=torch.int32))):
        lse = torch.full((2, kv_heads * group), torch.nan)
        state = attend_resident(query, kv, resident, lengths, fetch_list, scale)
        out = merge_fetched(state, query, resident, lengths, fetch_list, lse, scale)
        assert out.dtype == query.dtype and lse[0].isnan().all()
        for h in range(kv_heads * group):
            keys, values = rows[h // group].unbind(1)
            expected = softmax_attention(query[1, h], keys, values, scale)
            torch.testing.assert_close(out[1, h].double(), expected, rtol=0.01, atol=0.01)
            total = (keys.double() @ query[1, h].double() * scale).logsumexp(0)
            torch.testing.assert_close(lse[1, h].double(), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "kv_heads", "group"), SHAPES)
def test_codes_score_as_the_decoded_keys_do(dim: int, kv_heads: int, group: int) -> None:
    arena, block_table = arena_layer(2, 3, kv_heads, dim)
    keys, scale = arena[:, :, :, 0], dim**-0.5
    rotation = random_rotation(dim)
    centres = keys.mean(2)
    codes, scales = encode(keys, centres.unsqueeze(2), rotation)
    assert codes.shape == (*keys.shape[:-1], dim // 4)
    rotated = (unpack(codes).float() - 1.5) * scales.float().unsqueeze(-1)
    decoded = rotated @ rotation.T + centres.unsqueeze(2)
    error = (decoded - keys).square().mean() / (keys - centres.unsqueeze(2)).square().mean()
    assert error < 0.14, "a Gaussian in 2 bits loses about 12 % of its energy"
    query = torch.randn(2, kv_heads * group, dim)
    lse = 3 * torch.rand(2, kv_heads * group)
    lengths, reselect = torch.tensor([24, 15]), torch.ones(2, kv_heads, dtype=torch.bool)
    pages = CodePages(codes, scales, centres)
    quantized = quantize_query(query, pages, rotation, lse, lengths, block_table, scale)
    found = score_codes(quantized, pages, reselect, lengths, block_table, SINKS, RECENT, scale).rows
    products = query.view(2, kv_heads, group, dim) @ gather_tokens(decoded, block_table).transpose(-1, -2)
    expected = score_products(products, lse, lengths, SINKS, RECENT, scale)
    assert found.dtype == expected.dtype == torch.int16
    assert torch.equal(found == NEVER, expected == NEVER)
    weights = ((scores.int() << 16).view(torch.float32) for scores in (found, expected))
    # the query loses a little in 8 bits, and the weight in 16
    torch.testing.assert_close(*weights, rtol=0.06, atol=0.0, equal_nan=True)
    exact = query.view(2, kv_heads, group, dim) @ gather_tokens(keys, block_table).transpose(-1, -2)
    torch.testing.assert_close(
        score_exact(query, arena, block_table, lse, lengths, SINKS, RECENT, scale).rows,
        score_products(exact, lse, lengths, SINKS, RECENT, scale),
    )


@pytest.mark.parametrize("magnitude", [0.01, 1.0, 100.0])
def test_keys_are_rounded_to_the_nearest_level_of_their_own_size(magnitude: float) -> None:
    dim = 64
    keys, centre, rotation = (
        torch.randn(50, dim) * magnitude,
        torch.randn(dim) * magnitude,
        random_rotation(dim),
    )
    codes, scales = encode(keys, centre, rotation)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float16)
    rotated = (keys - centre).double() @ rotation.double()
    step = 0.9957 * rotated.square().mean(1, keepdim=True).sqrt()
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
    nearest = (rotated.unsqueeze(2) / step.unsqueeze(2) - levels).abs().argmin(2)
    assert (unpack(codes) != nearest).sum() <= 2, "an entry between two levels may go either way"
    values = levels[unpack(codes).long()]
    fit = rotated.square().sum(1) / (rotated * values).sum(1)
    torch.testing.assert_close(scales.double(), fit, rtol=1e-3, atol=0.0)
    assert encode(centre, centre, rotation)[1] == 0


@pytest.mark.parametrize("magnitude", [0.01, 1.0])
def test_new_keys_are_indexed_as_encode_does(magnitude: float) -> None:
    kv_heads, dim, max_blocks = 2, 48, 5
    keys = torch.randn(40, 2, kv_heads, dim) * magnitude
    pages, page_table = random_pages(2, max_blocks, kv_heads, dim)
    rotation = random_rotation(dim)
    before = CodePages(*(part.clone() for part in pages))
    for step in range(40):
        lengths = torch.tensor([0, step + 1])
        encode_new(keys[step], lengths, page_table, pages, rotation)
    expected = encode(keys[:, 1], keys[0, 1], rotation)
    found = unpack(gather_tokens(pages.codes, page_table)[1, :, :40])
    different = found != unpack(expected[0].transpose(0, 1))
    assert different.sum() <= 2, "an entry between two levels may go either way"
    torch.testing.assert_close(
        gather_tokens(pages.scales, page_table)[1, :, :40],
        expected[1].transpose(0, 1),
        rtol=0.02,
        atol=1e-3 * magnitude,
    )
    others = torch.ones(len(pages.codes), dtype=torch.bool)
    others[page_table[1]] = False
    for part, old in zip(pages, before, strict=True):
        assert torch.equal(part[others], old[others]), "a slot that is not in use writes nothing"


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 100.0])
def test_queries_become_integers_and_products_with_the_centres(magnitude: float) -> None:
    batch, kv_heads, group, dim, scale = 3, 2, 3, 16, 0.3
    pages, page_table = random_pages(batch, 4, kv_heads, dim)
    query, lse = torch.randn(batch, kv_heads * group, dim) * magnitude, torch.randn(batch, kv_heads * group)
    query[1, 4] = 0
    rotation, lengths = random_rotation(dim), torch.tensor([1, 2 * BLOCK_TOKENS + 1, 4 * BLOCK_TOKENS])
    integers, steps, offsets = quantize_query(query, pages, rotation, lse, lengths, page_table, scale)
    assert (integers.dtype, steps.dtype, offsets.dtype) == (torch.int8, torch.float32, torch.float32)
    rotated = query.double() @ rotation.double()
    torch.testing.assert_close(steps.double(), rotated.abs().amax(2) / 127, rtol=1e-4, atol=1e-20)
    rounded = integers.double() * steps.double().unsqueeze(2)
    assert ((rounded - rotated).abs() <= 0.501 * steps.unsqueeze(2)).all()
    for b, held in enumerate((1, 3, 4)):
        for h in range(kv_heads * group):
            centres = pages.centres[page_table[b, :held], h // group].double()
            expected = (centres @ query[b, h].double() * scale - lse[b, h]) / math.log(2)
            found = offsets[b, h // group, :held, h % group].double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "kv_heads", "group"), SHAPES)
def test_queries_before_rope_become_what_they_would_after_it(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype
) -> None:
    batch, scale, heads = 3, dim**-0.5, kv_heads * group
    pages, page_table = random_pages(batch, 4, kv_heads, dim)
    query = torch.randn(batch, heads + 2 * kv_heads, dim).to(dtype)[:, :heads]  # as they are projected
    angles = 9 * torch.rand(batch, dim // 2).repeat(1, 2)
    rope = Rope(angles.cos().to(dtype), 1.3 * angles.sin().to(dtype))
    lse, lengths = torch.randn(batch, heads), torch.tensor([1, 2 * BLOCK_TOKENS + 1, 4 * BLOCK_TOKENS])
    numbers = torch.complex(*query.double().chunk(2, dim=-1))
    numbers *= torch.complex(*(part.double() for part in rope))[:, None, : dim // 2]
    rotated = torch.cat((numbers.real, numbers.imag), dim=-1).float()
    arguments = pages, random_rotation(dim), lse, lengths, page_table, scale
    integers, steps, offsets = quantize_query(rotated, *arguments)
    found = quantize_query(query, *arguments, rope)
    different = (found.integers.int() - integers).abs()
    assert different.max() <= 1 and different.float().mean() < 1e-3, "between two steps it may go either way"
    torch.testing.assert_close(found.steps, steps, rtol=1e-5, atol=0)
    for b, held in enumerate((1, 3, 4)):
        torch.testing.assert_close(found.offsets[b, :, :held], offsets[b, :, :held], rtol=1e-5, atol=1e-4)


def test_scores_are_cut_from_the_weights_of_integers_and_codes() -> None:
    batch, kv_heads, group, dim, scale = 2, 2, 3, 16, 0.3
    pages, page_table = random_pages(batch, 3, kv_heads, dim)
    integers = torch.randint(-9, 10, (batch, kv_heads * group, dim), dtype=torch.int8)
    steps, offsets = torch.rand(batch, kv_heads * group) + 0.2, torch.randn(batch, kv_heads, 3, group)
    lengths, reselect = torch.tensor([24, 15]), torch.ones(batch, kv_heads, dtype=torch.bool)
    quantized = QuantizedQuery(integers, steps, offsets)
    scores = score_codes(quantized, pages, reselect, lengths, page_table, SINKS, RECENT, scale).rows
    rows = (unpack(pages.codes).double() - 1.5) * pages.scales.double().unsqueeze(3)
    gathered, queries = gather_tokens(rows, page_table), integers.double() * steps.double().unsqueeze(2)
    for b in range(batch):
        for h in range(kv_heads):
            candidates = slice(SINKS, int(lengths[b]) - RECENT)
            products = queries[b].view(kv_heads, group, dim)[h] @ gathered[b, h].T * scale
            products += offsets[b, h].repeat_interleave(BLOCK_TOKENS, 0).T.double() * math.log(2)
            weight = products.exp().sum(0)[candidates]
            found = (scores[b, h, candidates].int() << 16).view(torch.float32).double()
            assert (found <= weight * 1.0001).all() and (weight <= found * (1.0001 + 2**-7)).all()


def test_a_weight_beyond_float32_is_the_largest_score() -> None:
    pages, page_table = random_pages(1, 2, 1, 64)
    query, lse, lengths = torch.randn(1, 3, 64), torch.full((1, 3), -1000.0), torch.tensor([12])
    quantized = quantize_query(query, pages, random_rotation(64), lse, lengths, page_table, 0.1)
    selects = torch.ones(1, 1, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_codes(quantized, pages, selects, lengths, page_table, SINKS, RECENT, 0.1).rows
    infinite = int(torch.tensor(torch.inf).view(torch.int32)) >> 16
    assert scores[0, 0, : 12 - RECENT].tolist() == [NEVER] * SINKS + [infinite] * (12 - RECENT - SINKS)


def test_without_sinks_all_but_the_latest_tokens_are_candidates() -> None:
    lengths = torch.tensor([0, 1, RECENT, RECENT + 1, 9])
    scores = score_products(torch.randn(5, 2, 3, 16), torch.zeros(5, 6), lengths, 0, RECENT, 1.0)
    for b, candidates in enumerate((0, 0, 0, 1, 9 - RECENT)):
        assert (scores[b, :, :candidates] >= 0).all() and (scores[b, :, candidates:] == NEVER).all()


def test_weights_are_normalised_for_each_query_and_bounded_to_candidates() -> None:
    products, lse = torch.randn(2, 2, 3, 32) * 9, torch.randn(2, 6)
    lengths = torch.tensor([25 + RECENT, SINKS + RECENT])
    scores = score_products(products, lse, lengths, SINKS, RECENT, 0.7)
    assert (scores[1] == NEVER).all()
    assert (scores[0, :, :SINKS] == NEVER).all() and (scores[0, :, 25:] == NEVER).all()
    weight = (products[0] * 0.7 - lse[0].view(2, 3, 1)).exp().sum(1)[:, SINKS:25]
    found = (scores[0, :, SINKS:25].int() << 16).view(torch.float32)  # cut to 8 bits of mantissa
    assert (found <= weight).all() and (weight <= found * (1 + 2**-7)).all()


def as_selected(scores: list[int], successors: bool) -> list[int]:
    """By what each row of a head is selected; below 0 where it cannot be."""
    if not successors:
        return scores
    raised = scores.copy()
    for position, (before, own) in enumerate(pairwise(scores), 1):
        if position % 16 != 0 and before >= 0 and own >= 0:
            raised[position] = max(own, before - 5 * 128)
    return raised


@pytest.mark.parametrize("successors", [False, True])
@pytest.mark.parametrize(
    ("sinks", "latest", "k", "capacity", "lowest", "apart"),
    [
        (SINKS, RECENT, 6, 8, 0, 1),
        (SINKS, RECENT, 6, 8, 0, 414),
        (0, RECENT, 6, 8, 32688, 1),
        (0, RECENT, 8, 8, 0, 1),
        (0, 0, 6, 8, 0, 414),
        (0, 0, 1, 600, 0, 414),
    ],
)
def test_update_marks_resident_rows_and_replaces_those_selected_longest_ago(
    sinks: int, latest: int, k: int, capacity: int, lowest: int, apart: int, successors: bool
) -> None:
    batch, kv_heads, span = 3, 3, 64
    resident = empty_set(batch, kv_heads, 1, sinks=sinks, capacity=capacity)
    positions, last_used = resident.positions, resident.last_used
    counters = torch.zeros(batch, kv_heads, 6, dtype=torch.int64)
    for step in range(1, 60):
        lengths = torch.tensor([step, step + 3, 0])
        ranks = torch.randint(0, 80, (batch, kv_heads, span))  # with ties
        scores = (lowest + ranks * apart).to(torch.int16)
        scores[..., :sinks] = NEVER
        scores[..., 9] = -64  # what is left of a sum that is not a number: no row, and no harm
        reselect = torch.rand(batch, kv_heads) < 0.7
        before, old, counted = positions.tolist(), last_used.tolist(), counters.clone()
        fetch_list = update_resident(
            with_runs(scores, lengths, latest), reselect, lengths, latest, resident, counters, k,
            successors=successors,
        )  # fmt: skip
        assert fetch_list.entries.dtype == fetch_list.counts.dtype == torch.int32
        for b in range(batch):
            for h in range(kv_heads):
                best: list[int] = []
                if reselect[b, h] and lengths[b] > 0:
                    row = as_selected(scores[b, h].tolist(), successors)
                    candidates = [p for p in range(max(0, int(lengths[b]) - latest)) if row[p] >= 0]
                    best = sorted(sorted(candidates, key=lambda p: (-row[p], p))[:k])
                ages = [
                    int(lengths[b]) if position >= 0 and position in best else used
                    for position, used in zip(before[b][h], old[b][h], strict=True)
                ]
                missing = [p for p in best if p not in before[b][h]]
                leaving = sorted(sorted(range(capacity), key=lambda e: (ages[e], e))[: len(missing)])
                expected = before[b][h].copy()
                for entry, position in zip(leaving, missing, strict=True):
                    expected[entry], ages[entry] = position, int(lengths[b])
                assert positions[b, h].tolist() == expected
                assert last_used[b, h].tolist() == ages
                assert fetch_list.counts[b, h] == len(missing)
                assert fetch_list.entries[b, h, : len(missing)].tolist() == leaving
                assert (counters - counted)[b, h].tolist() == [0, 0, len(best), len(missing), 0, 0]


def selected(weights: dict[int, float], k: int, *, successors: bool = True) -> list[int]:
    """Which of 60 rows a head selects that weigh 2**-12 except for those given; NaN is no candidate."""
    weight = torch.full((1, 1, 64), 2.0**-12)
    weight[..., list(weights)] = torch.tensor(list(weights.values()))
    scores = (weight.view(torch.int32) >> 16).to(torch.int16)
    scores[weight.isnan()] = NEVER
    lengths, counters = torch.tensor([64]), torch.zeros(1, 1, 6, dtype=torch.int64)
    resident = empty_set(1, 1, 4, capacity=k)
    update_resident(
        with_runs(scores, lengths, RECENT), torch.ones(1, 1, dtype=torch.bool), lengths, RECENT, resident,
        counters, k, successors=successors,
    )  # fmt: skip
    assert counters.tolist() == [[[0, 0, k, k, 0, 0]]]
    return sorted(resident.positions[0, 0].tolist())


def test_a_row_is_selected_by_a_32nd_of_the_row_before_it() -> None:
    assert selected({20: 1.0, 40: 2**-6}, 2) == [20, 21]
    assert selected({20: 1.0, 40: 2**-6}, 2, successors=False) == [20, 40]
    assert selected({20: 1.0, 40: 2**-4}, 2) == [20, 40], "which weighs more"
    assert selected({20: 1.0, 21: 2**-3, 40: 2**-4}, 2) == [20, 21], "its own weight is more"
    assert selected({20: 1.0, 21: 0.0}, 2) == [20, 21], "also of no weight"
    assert selected({20: 1.0}, 1) == [20]


def test_among_raised_rows_and_others_of_the_same_score_the_lower_wins() -> None:
    assert selected({10: 2**-5, 20: 1.0}, 2) == [10, 20]
    assert selected({20: 1.0, 40: 2**-5}, 2) == [20, 21]
    assert selected({20: 1.0, 50: 1.0}, 3) == [20, 21, 50]


def test_only_a_candidate_of_the_same_run_raises_a_row_and_none_is_raised_in_turn() -> None:
    assert selected({31: 1.0, 40: 2**-11}, 2) == [31, 40], "row 32 begins a run"
    assert selected({23: 1.0, 40: 2**-11}, 2) == [23, 24], "where a thread of the kernel begins"
    assert selected({20: 32.0, 40: 2**-6}, 3) == [20, 21, 40], "row 22 would get as much from a raised one"
    assert selected({20: 1.0, 21: torch.nan, 40: 2**-11}, 2) == [20, 40]
    assert selected({20: torch.nan, 40: 2**-11}, 1) == [40]
    assert selected({59: 1.0, 40: 2**-11}, 2) == [40, 59], "row 60 is one of the latest"


def test_gate_compares_with_the_query_of_the_last_selection() -> None:
    selection_query = torch.zeros(2, 2, 3 * 16)
    threshold = torch.tensor([0.8, 2.0])
    lengths = torch.tensor([5, 0])
    counters = torch.zeros(2, 2, 6, dtype=torch.int64)
    query = torch.randn(2, 6, 16)
    first = gate(query, selection_query, threshold, lengths, 0, counters)
    assert first.tolist() == [[True, True], [False, False]]
    assert torch.equal(selection_query[0], query[0].view(2, 48))
    near = query + 0.05 * torch.randn_like(query)
    before = selection_query.clone()
    second = gate(near, selection_query, threshold, lengths, 0, counters)
    assert second.tolist() == [[False, True], [False, False]]
    assert torch.equal(selection_query[0, 0], before[0, 0]), "a reuse keeps it, so that drift adds up"
    assert torch.equal(selection_query[0, 1], near[0].view(2, 48)[1])
    assert gate(-query, selection_query, threshold, lengths, 0, counters)[0].tolist() == [True, True]
    assert counters.tolist() == [[[3, 2, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0]], [[0] * 6] * 2]


@pytest.mark.parametrize("magnitude", [1e-3, 1.0])
def test_gate_selects_where_the_cosine_is_below_the_threshold(magnitude: float) -> None:
    batch, kv_heads, group, dim = 4, 3, 2, 16
    lengths, whole = torch.tensor([5, 0, 4, 100]), 4
    active = (lengths > whole).unsqueeze(1)
    for _ in range(20):
        past = torch.randn(batch, kv_heads, group * dim) * magnitude
        now = 3 * past + 6 * torch.rand(batch, kv_heads, 1) * torch.randn(past.shape) * magnitude
        threshold, counters = torch.rand(kv_heads), torch.randint(0, 99, (batch, kv_heads, 6))
        selection_query, counted = past.clone(), counters.clone()
        query = now.view(batch, kv_heads * group, dim)
        found = gate(query, selection_query, threshold, lengths, whole, counters)
        distance = torch.cosine_similarity(now.double(), past.double(), dim=2) - threshold
        clear = distance.abs() > 1e-4
        assert found.dtype == torch.bool and torch.equal(found[clear], (active & (distance < 0))[clear])
        assert torch.equal(selection_query, now.where(found.unsqueeze(2), past))
        zeros = torch.zeros_like(found)
        expected = torch.stack((active.expand_as(found), found, *[zeros] * 4), 2)
        assert torch.equal(counters - counted, expected.long())

    query = torch.eye(16)[:1].unsqueeze(0)
    for cosine, selects in ((1.0, False), (1.01, True)):
        counters = torch.zeros(1, 1, 6, dtype=torch.int64)
        found = gate(query, query.clone(), torch.tensor([cosine]), lengths[:1], 0, counters)
        assert found.item() is selects, "a query that stays the same selects only above 1"


def test_fetch_copies_the_rows_of_the_positions_that_came_into_the_set() -> None:
    batch, kv_heads, dim, first, k = 2, 3, 16, SINKS + RECENT, 6
    arena, block_table = arena_layer(batch, 8, kv_heads, dim)
    rows = gather_tokens(arena, block_table)
    expected = torch.randn(batch, kv_heads, first + CAPACITY, 2, dim)
    resident = empty_set(batch, kv_heads, dim)._replace(rows=expected.clone())
    resident.positions.random_(0, 8 * BLOCK_TOKENS)
    counts = torch.randint(0, k + 1, (batch, kv_heads), dtype=torch.int32)
    entries = torch.rand(batch, kv_heads, CAPACITY).argsort(2)[..., :k].int()
    fetch(FetchList(entries, counts), resident, block_table, arena)
    for b in range(batch):
        for h in range(kv_heads):
            for entry in entries[b, h, : counts[b, h]].tolist():
                expected[b, h, first + entry] = rows[b, h, resident.positions[b, h, entry]]
    assert torch.equal(resident.rows, expected)


def test_a_length_past_the_page_table_touches_no_foreign_memory() -> None:
    """Loops check no bounds, so each bounds what it indexes with."""
    dim, block_tokens = 16, 8
    pages = CodePages(
        torch.zeros(3, 1, block_tokens, dim // 4, dtype=torch.uint8),
        torch.zeros(3, 1, block_tokens, dtype=torch.float16),
        torch.zeros(3, 1, dim),
    )
    table, lengths, rotation = torch.tensor([[2]]), torch.tensor([10**6]), torch.eye(dim)
    quantized = quantize_query(
        torch.randn(1, 1, dim), pages, rotation, torch.zeros(1, 1), lengths, table, 1.0
    )
    everything = torch.ones(1, 1, dtype=torch.bool)
    scores = score_codes(quantized, pages, everything, lengths, table, 0, 0, 1.0)
    assert scores.rows.shape == (1, 1, block_tokens)
    with pytest.raises(IndexError):
        encode_new(torch.randn(1, 1, dim), lengths, table, pages, rotation)
    assert not pages.codes.any() and not pages.centres.any()
