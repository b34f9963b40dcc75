"""Attention of a prompt over chosen blocks: what is chosen, what is attended, and that all of it is exact."""

import pytest
import torch
from torch import Tensor

from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.sparse_prompt import (
    Budget,
    ChosenBlocks,
    attend_chosen,
    attend_prompt_sparse,
    choose_blocks,
)
from clo.kernels.weigh_blocks import BLOCK, SAMPLED, weigh_blocks

SCALE = 0.2
shapes = pytest.mark.parametrize(("kv_heads", "group", "dim"), [(3, 1, 64), (2, 4, 128), (1, 8, 64)])
NUMBERS = [[0, 2, 3, 9], [4, 9, 9, 9], [0, 1, 2, 3]]  # of which 9 is none


def exactly(count: float) -> Budget:
    return lambda blocks: count


def random_prompt(count: int, total: int, kv_heads: int, group: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, kv_heads * group, dim), torch.randn(total, kv_heads, 2, dim)


@shapes
@pytest.mark.parametrize(
    ("count", "total"),
    [
        (64, 64),  # nothing before it
        (20, 83),  # no whole block before it
        (128, 384),
        (1, 200),
        (77, 301),  # neither queries nor keys fill their blocks
    ],
)
def test_all_blocks_are_exact(kv_heads: int, group: int, dim: int, count: int, total: int) -> None:
    query, rows = random_prompt(count, total, kv_heads, group, dim)
    found, found_lse = attend_prompt_sparse(query, rows, SCALE, float, dense_tokens=0, own_tokens=0)
    expected, lse = attend_prompt(query, rows, SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_lse, lse)


def test_what_little_comes_before_a_chunk_is_all_attended() -> None:
    query, rows = random_prompt(64, 64 + 5 * BLOCK, 2, 2, 16)
    expected, _ = attend_prompt(query, rows, SCALE)
    for dense_tokens, exact in ((5 * BLOCK, True), (5 * BLOCK - 1, False)):
        found, _ = attend_prompt_sparse(
            query, rows, SCALE, exactly(1), dense_tokens=dense_tokens, own_tokens=0
        )
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5) is exact


def test_the_latest_tokens_are_all_attended_however_short_a_chunk_is() -> None:
    """Chunks of a few tokens are no further from dense attention than a long one that has all of theirs."""
    _, rows = random_prompt(0, 12 * BLOCK, 2, 2, 16)
    own = 4 * BLOCK
    query = torch.randn(own, 4, 16)
    expected, _ = attend_prompt(query, rows, SCALE)
    whole, _ = attend_prompt_sparse(query, rows, SCALE, exactly(3), dense_tokens=0, own_tokens=own)
    error = (whole - expected).norm()
    assert error > 0
    short = []
    for end in range(BLOCK, own + 1, BLOCK):
        part, seen = query[end - BLOCK : end], rows[: len(rows) - own + end]
        short.append(attend_prompt_sparse(part, seen, SCALE, exactly(3), dense_tokens=0, own_tokens=own)[0])
    assert (torch.cat(short) - expected).norm() < error
    # its past has two blocks, the first and the last one, which are always chosen
    last, _ = attend_prompt_sparse(query[-1:], rows, SCALE, exactly(1), dense_tokens=0, own_tokens=10 * BLOCK)
    torch.testing.assert_close(last, expected[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [64, 100])
def test_weights_are_the_largest_shares_of_attention_of_sampled_queries(count: int) -> None:
    kv_heads, group, dim, blocks = 2, 3, 16, 2 * 16 + 3  # a segment is as many blocks as a head has entries
    query, rows = random_prompt(count, blocks * BLOCK + count, kv_heads, group, dim)
    keys, own = rows[: blocks * BLOCK, :, 0], rows[blocks * BLOCK :]
    _, own_lse = attend_prompt(query, own, SCALE)
    weights = weigh_blocks(query, keys, own_lse, SCALE)
    assert weights.shape == (kv_heads * group, -(-count // BLOCK), blocks)
    every = BLOCK // SAMPLED
    for head in range(kv_heads * group):
        for number, start in enumerate(range(0, count, BLOCK)):
            shares = []
            for place in range(start + every - 1, start + BLOCK, every):
                sample = min(place, count - 1)
                before = (keys[:, head // group] @ query[sample, head]).double() * SCALE
                after = (own[: sample + 1, head // group, 0] @ query[sample, head]).double() * SCALE
                softmax = torch.cat((before, after)).softmax(0)
                shares.append(softmax[: blocks * BLOCK].view(blocks, BLOCK).sum(1))
            expected = torch.stack(shares).amax(0).float()
            torch.testing.assert_close(weights[head, number], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("count", "sorted_weights"), [(0.5, 2**21), (7.0, 2**21), (7.0, 100)])
def test_the_blocks_of_most_weight_are_chosen_and_the_first_and_last_one(
    count: float, sorted_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all heads and queries together: a head whose weights are larger takes more."""
    monkeypatch.setattr("clo.kernels.sparse_prompt._SORTED", sorted_weights)
    weights = torch.rand(5, 3, 40) * torch.tensor([1.0, 2.0, 1.0, 1.0, 0.1])[:, None, None]
    weights[0, 0] = 0.0  # all of its attention is elsewhere
    numbers, counts = choose_blocks(weights, count)
    assert numbers.dtype == counts.dtype == torch.int32
    lines = 3 if sorted_weights > weights.numel() else 1
    decisive = weights[:, ::3] if lines == 1 else weights
    rank = round(count / 40 * decisive.numel())
    least = decisive.flatten().sort(descending=True).values[rank - 1]
    for head in range(5):
        for row in range(3):
            expected = {0, 39} | set((weights[head, row] >= least).nonzero().flatten().tolist())
            assert numbers[head, row, : counts[head, row]].tolist() == sorted(expected)
    assert counts[0, 0] == 2 and counts[1].sum() > counts[4].sum() + 2
    if lines == 3:
        assert abs(int((weights >= least).sum()) - count * 15) <= 1


def test_no_block_without_weight_is_chosen() -> None:
    weights = torch.zeros(2, 3, 10)
    weights[0, 1, 4] = 1.0
    numbers, counts = choose_blocks(weights, 8.0)
    assert counts.tolist() == [[2, 3, 2], [2, 2, 2]] and numbers[0, 1, :3].tolist() == [0, 4, 9]
    everything = choose_blocks(torch.rand(2, 3, 10) + 0.1, 10.0)
    assert (everything.counts == 10).all()
    only = choose_blocks(torch.rand(2, 3, 1), 1.0)
    assert (only.counts == 1).all() and (only.numbers[..., 0] == 0).all()


@shapes
def test_each_block_of_queries_attends_to_its_own_blocks(kv_heads: int, group: int, dim: int) -> None:
    count, heads = 2 * BLOCK + 30, kv_heads * group
    query, rows = random_prompt(count, 5 * BLOCK, kv_heads, group, dim)
    order = [torch.randperm(3) for _ in range(heads)]
    numbers = torch.stack([torch.tensor(NUMBERS, dtype=torch.int32)[each] for each in order])
    counts = torch.stack([torch.tensor([3, 1, 4], dtype=torch.int32)[each] for each in order])
    out, lse = attend_chosen(query, rows, ChosenBlocks(numbers, counts), SCALE)
    for head in range(heads):
        for number, start in enumerate(range(0, count, BLOCK)):
            listed = numbers[head, number, : counts[head, number]].tolist()
            keys, values = rows.unflatten(0, (5, BLOCK))[listed, :, head // group].flatten(0, 1).unbind(1)
            part = slice(start, min(start + BLOCK, count))
            scores = query[part, head] @ keys.T * SCALE
            torch.testing.assert_close(lse[part, head], scores.logsumexp(1))
            torch.testing.assert_close(out[part, head], scores.softmax(1) @ values, rtol=1e-4, atol=1e-5)


def test_what_a_prompt_repeats_is_found_and_little_else() -> None:
    """The queries of each block look for one earlier passage of their own, as heads that copy do."""
    kv_heads, group, dim, blocks = 2, 2, 64, 24
    rows = torch.randn(blocks * BLOCK + 128, kv_heads, 2, dim)
    rows[:, :, 0] /= rows[:, :, 0].norm(dim=-1, keepdim=True)
    passages = {0: 7 * BLOCK + 11, BLOCK: 15 * BLOCK + 40}
    query = torch.empty(128, kv_heads * group, dim)
    for start, passage in passages.items():
        found = rows[passage : passage + BLOCK, :, 0].repeat_interleave(group, 1)
        query[start : start + BLOCK] = found * 100
    _, own_lse = attend_prompt(query, rows[blocks * BLOCK :], SCALE)
    chosen = choose_blocks(weigh_blocks(query, rows[: blocks * BLOCK, :, 0], own_lse, SCALE), 2.0)
    for number, blocks_of in enumerate(([0, 7, 8, 23], [0, 15, 16, 23])):
        for head in range(kv_heads * group):
            assert chosen.numbers[head, number, : chosen.counts[head, number]].tolist() == blocks_of
    found, _ = attend_prompt_sparse(query, rows, SCALE, exactly(2.0), dense_tokens=0, own_tokens=0)
    expected, _ = attend_prompt(query, rows, SCALE)
    assert (found - expected).norm() < 0.01 * expected.norm()
