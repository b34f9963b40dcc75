"""Every kernel against a naive loop, on fresh random inputs."""

import pytest
import torch
from torch import Tensor

from kernels.append import append
from kernels.attend import attend, attend_all, attend_prompt
from kernels.encode import encode, unpack
from kernels.fetch import fetch
from kernels.gate import gate
from kernels.paging import gather_tokens
from kernels.sample import sample, uniform
from kernels.select import choose, scan, scan_exact

SINKS, RECENT, CAPACITY = 2, 4, 8
SHAPES = [
    (64, 1, 3),
    (64, 3, 3),
    (80, 2, 1),
    (96, 2, 4),
    (128, 1, 8),
    (256, 2, 2),
]  # head_dim, kv heads, group
BLOCK_TOKENS = 8


def softmax_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query [D], keys and values [T, D] in float64."""
    weights = (keys.double() @ query.double() * scale).softmax(0)
    return weights @ values.double()


def paged(batch: int, pages: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """A random arena layer with more blocks than needed, and a table of shuffled distinct blocks."""
    blocks = batch * pages + 3
    table = torch.randperm(blocks)[: batch * pages].view(batch, pages)
    return torch.randn(blocks, kv_heads, BLOCK_TOKENS, 2, dim), table


@pytest.mark.parametrize(("dim", "kv_heads", "group"), SHAPES)
def test_attention_over_everything_and_over_a_chunk(dim: int, kv_heads: int, group: int) -> None:
    arena, table = paged(3, 4, kv_heads, dim)
    lengths = torch.tensor([1, 17, 32])
    query = torch.randn(3, kv_heads * group, dim)
    out = attend_all(query, arena, table, lengths, 0.3)
    rows = gather_tokens(arena, table)
    for b in range(3):
        for h in range(kv_heads * group):
            keys, values = rows[b, h // group, : lengths[b]].unbind(1)
            torch.testing.assert_close(
                out[b, h].double(), softmax_attention(query[b, h], keys, values, 0.3), rtol=1e-4, atol=1e-5
            )

    prompt = torch.randn(10, kv_heads, 2, dim)
    queries = torch.randn(4, kv_heads * group, dim)
    out = attend_prompt(queries, prompt, 0.3)
    for i in range(4):
        for h in range(kv_heads * group):
            keys, values = prompt[: 7 + i, h // group].unbind(1)
            torch.testing.assert_close(
                out[i, h].double(), softmax_attention(queries[i, h], keys, values, 0.3), rtol=1e-4, atol=1e-5
            )


def test_append_keeps_sinks_ring_and_set_in_step_with_the_arena() -> None:
    batch, kv_heads, dim = 3, 2, 16
    arena, table = paged(batch, 4, kv_heads, dim)
    resident = torch.full((batch, kv_heads, SINKS + RECENT + CAPACITY, 2, dim), torch.nan)
    members = torch.full((batch, kv_heads, CAPACITY), -1)
    stamps = members.clone()
    history = torch.randn(30, batch, kv_heads, 2, dim)
    joins = torch.tensor([0, 5, 30])  # step at which a sequence begins; the last one never does
    lengths = torch.zeros(batch, dtype=torch.int64)
    for step in range(30):
        lengths += step >= joins
        append(history[step], lengths, table, arena, resident, members, stamps, SINKS, RECENT)
    written = gather_tokens(arena, table)
    for b in range(2):
        mine = history[joins[b] :, b]
        assert torch.equal(written[b, :, : len(mine)], mine.transpose(0, 1))
        assert torch.equal(resident[b, :, :SINKS], mine[:SINKS].transpose(0, 1))
        for position in range(len(mine) - RECENT, len(mine)):
            place = SINKS + (position - SINKS) % RECENT
            assert torch.equal(resident[b, :, place], mine[position])
        for slot in range(CAPACITY):  # while there was room, what left the ring entered the set
            assert (members[b, :, slot] == SINKS + slot).all()
            assert torch.equal(resident[b, :, SINKS + RECENT + slot], mine[SINKS + slot])
    assert (members[2] == -1).all()
    assert resident[2].isnan().all()


def test_attention_sees_only_rows_that_are_held() -> None:
    kv_heads, dim = 2, 32
    for length, held in ((1, 0), (3, 0), (SINKS + RECENT + 3, 3), (50, CAPACITY)):
        resident = torch.full((1, kv_heads, SINKS + RECENT + CAPACITY, 2, dim), 1e4)  # poison
        valid = [*range(min(length, SINKS + RECENT)), *range(SINKS + RECENT, SINKS + RECENT + held)]
        resident[:, :, valid] = torch.randn(1, kv_heads, len(valid), 2, dim)
        members = torch.full((1, kv_heads, CAPACITY), -1)
        members[..., :held] = torch.arange(held) + SINKS
        query = torch.randn(1, 6, dim)
        out = attend(query, resident, members, torch.tensor([length]), SINKS, RECENT, 0.2)
        for h in range(6):
            keys, values = resident[0, h // 3, valid].unbind(1)
            torch.testing.assert_close(
                out[0, h].double(), softmax_attention(query[0, h], keys, values, 0.2), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(("dim", "kv_heads", "group"), SHAPES)
def test_scan_of_codes_equals_products_with_the_decoded_keys(dim: int, kv_heads: int, group: int) -> None:
    arena, table = paged(2, 3, kv_heads, dim)
    keys = arena[:, :, :, 0]
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q
    centres = keys.mean(2)
    codes, scales = encode(keys, centres.unsqueeze(2), rotation)
    assert codes.shape == (*keys.shape[:-1], dim // 4)
    decoded = ((unpack(codes).float() - 1.5) * scales.float().unsqueeze(-1)) @ rotation.T + centres.unsqueeze(
        2
    )
    query = torch.randn(2, kv_heads * group, dim)
    grouped = query.view(2, kv_heads, group, dim)
    products = scan(query, codes, scales, centres, rotation, table)
    expected = grouped @ gather_tokens(decoded, table).transpose(-1, -2)
    torch.testing.assert_close(products, expected, rtol=1e-3, atol=1e-2)
    exact = scan_exact(query, arena, table)
    torch.testing.assert_close(
        exact, grouped @ gather_tokens(keys, table).transpose(-1, -2), rtol=1e-4, atol=1e-4
    )
    error = (products - exact).square().mean() / exact.square().mean()
    assert error < 0.16, "a Gaussian in 2 bits loses about 12 % of its energy"


def test_choose_takes_the_heaviest_rows_outside_sinks_and_ring() -> None:
    lengths = torch.tensor([30, 9, 3])
    products = torch.randn(3, 2, 3, 32) * 3
    miss = torch.tensor([[True, False], [True, True], [True, True]])
    chosen = choose(products, miss, lengths, 5, SINKS, RECENT, 0.7)
    assert chosen.shape == (3, 2, 5)
    for b in range(3):
        candidates = list(range(SINKS, max(SINKS, int(lengths[b]) - RECENT)))
        for h in range(2):
            got = sorted(p for p in chosen[b, h].tolist() if p >= 0)
            if not miss[b, h] or not candidates:
                assert got == []
                continue
            weight = (products[b, h][:, candidates] * 0.7).softmax(-1).mean(0)
            best = weight.topk(min(5, len(candidates))).indices.tolist()
            assert got == sorted(candidates[i] for i in best)


def test_gate_compares_with_the_query_of_the_last_selection() -> None:
    label = torch.zeros(2, 2, 3 * 16)
    threshold = torch.tensor([0.8, 2.0])
    lengths = torch.tensor([5, 0])
    query = torch.randn(2, 6, 16)
    assert gate(query, label, threshold, lengths).tolist() == [[True, True], [False, False]]
    assert torch.equal(label[0], query[0].view(2, 48))
    near = query + 0.05 * torch.randn_like(query)
    before = label.clone()
    assert gate(near, label, threshold, lengths).tolist() == [[False, True], [False, False]]
    assert torch.equal(label[0, 0], before[0, 0]), "a reuse keeps the label, so that drift adds up"
    assert torch.equal(label[0, 1], near[0].view(2, 48)[1])
    assert gate(-query, label, threshold, lengths)[0].tolist() == [True, True]


def test_fetch_moves_only_missing_rows_into_the_oldest_slots() -> None:
    batch, kv_heads, dim, first, k = 2, 3, 16, SINKS + RECENT, 6
    arena, table = paged(batch, 8, kv_heads, dim)
    rows = gather_tokens(arena, table)
    resident = torch.zeros(batch, kv_heads, first + CAPACITY, 2, dim)
    members = torch.full((batch, kv_heads, CAPACITY), -1)
    stamps = members.clone()
    for step in range(20, 60):
        lengths = torch.tensor([step, step + 3])
        chosen = torch.full((batch, kv_heads, k), -1)
        expected = torch.zeros(batch, kv_heads, dtype=torch.int64)
        for b in range(batch):
            for h in range(kv_heads):
                count = int(torch.randint(0, k + 1, ()))
                picks = (torch.randperm(40)[:count] + SINKS).tolist()
                chosen[b, h, torch.randperm(k)[:count]] = torch.tensor(picks, dtype=torch.int64)
                expected[b, h] = len(set(picks) - set(members[b, h].tolist()))
        selected, moved = fetch(chosen, lengths, table, arena, resident, members, stamps, first)
        assert torch.equal(selected, (chosen >= 0).sum(2))
        assert torch.equal(moved, expected)
        for b in range(batch):
            for h in range(kv_heads):
                now = [p for p in members[b, h].tolist() if p >= 0]
                assert len(set(now)) == len(now), "a position is resident once"
                assert set(chosen[b, h].tolist()) - {-1} <= set(now)
                for slot, position in enumerate(members[b, h].tolist()):
                    if position >= 0:
                        assert torch.equal(resident[b, h, first + slot], rows[b, h, position])


def test_fetch_evicts_the_row_selected_longest_ago() -> None:
    arena, table = paged(1, 8, 1, 16)
    resident = torch.zeros(1, 1, 3, 2, 16)
    members = torch.full((1, 1, 3), -1)
    stamps = members.clone()

    def select(length: int, *positions: int) -> set[int]:
        chosen = torch.tensor([[[*positions, *[-1] * (2 - len(positions))]]])
        fetch(chosen, torch.tensor([length]), table, arena, resident, members, stamps, 0)
        return set(members.flatten().tolist())

    assert select(50, 10, 11) == {10, 11, -1}
    assert select(51, 12, 10) == {10, 11, 12}
    assert select(52, 13) == {10, 12, 13}, "11 was selected longest ago"
    assert select(53, 10) == {10, 12, 13}
    assert select(54, 14, 15) == {10, 14, 15}, "12 and 13 are older than 10"


def test_sampling_is_greedy_repeatable_and_follows_the_distribution() -> None:
    logits = torch.randn(4, 50) * 2
    zero, ones = torch.zeros(4), torch.ones(4)
    no_k, seed = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    assert torch.equal(sample(logits, zero, ones, no_k, seed, seed), logits.argmax(-1))

    draws = 20_000
    row = logits[:1].expand(draws, -1)
    position = torch.arange(draws)
    seeds = torch.full((draws,), 7)
    warm, all_p = torch.ones(draws), torch.ones(draws)
    k0 = torch.zeros(draws, dtype=torch.int64)
    drawn = sample(row, warm, all_p, k0, seeds, position)
    alone = sample(row[:1], warm[:1], all_p[:1], k0[:1], seeds[:1], position[5:6])
    assert alone[0] == drawn[5], "the draw does not depend on the batch"
    share = torch.bincount(drawn, minlength=50) / draws
    assert (share - logits[0].softmax(-1)).abs().max() < 0.015

    top = sample(row, warm, all_p, k0 + 3, seeds, position)
    assert set(top.tolist()) == set(logits[0].topk(3).indices.tolist())
    order = logits[0].softmax(-1).sort(descending=True)
    nucleus = int((order.values.cumsum(0) < 0.5).sum()) + 1
    drawn = sample(row, warm, all_p * 0.5, k0, seeds, position)
    assert set(drawn.tolist()) == set(order.indices[:nucleus].tolist())


def test_uniform_numbers_are_uniform_for_any_seed() -> None:
    for seed in (0, 1, 2**62):
        numbers = uniform(torch.full((10_000,), seed), torch.arange(10_000))
        assert numbers.min() >= 0 and numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 0.02
        assert abs(numbers.var() - 1 / 12) < 0.005
