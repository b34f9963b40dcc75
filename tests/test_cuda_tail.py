"""The kernels of the tail against their references, on fresh random inputs and with poisoned outputs."""

import pytest
import torch

from clo.kernels.attend import AttentionState
from clo.kernels.attend_tail import attend_tail, tail_parts
from clo.kernels.encode_values import (
    ValuePages,
    encode_new_values,
    encode_prompt_values,
    halves_of,
    unpack_values,
)
from clo.kernels.limits import RUN
from clo.kernels.quantize_query import Rope, quantize_query
from clo.kernels.score import NEVER, Scores
from clo.kernels.update_resident import TailList, update_resident
from tests.cuda_tensors import RECENT, SINKS, inner, on_gpu, resident_set, same
from tests.kernel_calls import SHAPES, Shape, prompt_blocks_of
from tests.tail_inputs import BLOCK_TOKENS, coded, empty_tail, random_tail, with_runs

pytestmark = pytest.mark.gpu

shapes = pytest.mark.parametrize("shape", SHAPES)


def values_of(shape: Shape, pages: int) -> ValuePages:
    lines = (pages, shape.kv_heads)
    words = (BLOCK_TOKENS // RUN, halves_of(shape.head_dim), 32, 4)
    return ValuePages(
        torch.randint(-(2**15), 2**15, (*lines, *words), dtype=torch.int16),
        torch.randn(*lines, BLOCK_TOKENS).half(),
    )


def random_rope(batch: int, shape: Shape) -> Rope:
    angles = 9 * torch.rand(batch, shape.head_dim // 2).repeat(1, 2)
    return Rope(angles.cos().to(shape.dtype), angles.sin().to(shape.dtype))


def same_values(found: ValuePages, expected: ValuePages, dim: int) -> None:
    different = unpack_values(found.codes.cpu(), dim) != unpack_values(expected.codes, dim)
    assert different.float().mean() < 1e-3, "entries between two levels may go either way"
    torch.testing.assert_close(found.scales.cpu(), expected.scales, rtol=0.03, atol=1e-3)


@shapes
def test_encode_values(shape: Shape) -> None:
    lengths = [5, BLOCK_TOKENS, 3 * BLOCK_TOKENS + 9, 1]
    blocks = prompt_blocks_of(lengths, BLOCK_TOKENS)
    rows = torch.randn(sum(lengths), shape.kv_heads, 2, shape.head_dim).to(shape.dtype)
    expected = values_of(shape, len(blocks.starts) + 3)
    found = ValuePages(*(part.cuda() for part in expected))
    encode_prompt_values(rows[:, :, 1], blocks, expected)
    encode_prompt_values(rows.cuda()[:, :, 1], type(blocks)(*(part.cuda() for part in blocks)), found)
    same_values(found, expected, shape.head_dim)
    table = torch.randperm(6).view(2, 3)
    for step in range(1, 2 * BLOCK_TOKENS + 4, 7):
        new = torch.tensor([step, 0])
        kv = torch.randn(2, shape.kv_heads, 2, shape.head_dim).to(shape.dtype)
        encode_new_values(kv[:, :, 1], new, table, expected)
        encode_new_values(inner(kv)[:, :, 1], new.cuda(), table.cuda(), found)
    same_values(found, expected, shape.head_dim)


@pytest.mark.parametrize("successors", [False, True])
@pytest.mark.parametrize(
    ("span", "k", "capacity", "spread", "runs"),
    [(64, 6, 8, 9, 3), (512, 128, 256, 300, 20), (6016, 128, 1024, 2000, 128), (32768, 256, 2048, 9000, 256),
     (32768, 64, 512, 3, 256), (200_064, 256, 2048, 9000, 512)],
)  # fmt: skip
def test_update_resident_lists_the_tail(
    span: int, k: int, capacity: int, spread: int, runs: int, successors: bool
) -> None:
    batch, kv_heads, latest = 3, 3, RECENT + 1
    resident = resident_set(batch, kv_heads, capacity, 4, torch.float32)
    counters, tail = torch.zeros(batch, kv_heads, 6, dtype=torch.int64), empty_tail(batch, kv_heads, runs)
    resident_gpu, counters_gpu = on_gpu(resident), counters.cuda()
    tail_gpu = TailList(*(part.cuda() for part in tail))
    drift = torch.randn(batch, kv_heads, span)
    for step in range(8):
        lengths = torch.tensor([span - 8 + step, span // 3 + step, 0])
        drift = 0.9 * drift + 0.4 * torch.randn_like(drift)
        scores = (16000 + drift * spread / 3).clamp(0, 0x7F00).to(torch.int16)
        scores[..., :SINKS] = NEVER
        scores[..., 9::41] = -64  # what is left of a sum that is not a number
        reselect = torch.rand(batch, kv_heads) < 0.8
        scored = with_runs(scores, lengths, latest)
        update_resident(scored, reselect, lengths, latest, resident, counters, k, tail, successors=successors)
        update_resident(
            Scores(*(part.cuda() for part in scored)), reselect.cuda(), lengths.cuda(), latest, resident_gpu,
            counters_gpu, k, tail_gpu, successors=successors,
        )  # fmt: skip
        same(*zip(resident[1:3], resident_gpu[1:3], strict=True), (counters[..., :5], counters_gpu[..., :5]))
        torch.testing.assert_close(counters_gpu[..., 5:].cpu(), counters[..., 5:], rtol=1e-4, atol=9)
        same((tail.counts, tail_gpu.counts))
        torch.testing.assert_close(tail_gpu.boosts.cpu(), tail.boosts, rtol=0, atol=1e-3)
        listed = torch.arange(runs) < tail.counts.unsqueeze(2)
        for one, other in zip(tail[:2], tail_gpu[:2], strict=True):
            assert torch.equal(one[listed], other.cpu()[listed])


@shapes
@pytest.mark.parametrize("runs", [1, 30, 75])
def test_attend_tail(shape: Shape, runs: int) -> None:
    dim, kv_heads, group, _ = shape
    batch, tokens, scale = 4, 20 * BLOCK_TOKENS, 2 * dim**-0.5
    index = coded(shape, batch, tokens)
    query = torch.randn(batch, kv_heads * group, dim)
    lengths, lse = torch.tensor([tokens, tokens, tokens - 5, 0]), 3 + torch.randn(batch, kv_heads * group)
    table = index.page_table
    quantized = quantize_query(query, index.pages, index.rotation, lse, lengths, table, scale)
    tail = random_tail(batch, kv_heads, runs, tokens)

    def state(own: int, device: str) -> AttentionState:
        parts = (batch, kv_heads, 2 + own, group)
        poison = torch.full(parts, torch.nan, device=device)
        return AttentionState(torch.full((*parts, dim), torch.nan, device=device), poison, poison.clone())

    expected = state(1, "cpu")
    attend_tail(expected, quantized, index.pages, index.values, tail, lengths, table, lse, scale)
    on_device = TailList(*(part.cuda() for part in tail))
    own = tail_parts(on_device)
    found = state(own, "cuda")
    attend_tail(
        found, type(quantized)(*(part.cuda() for part in quantized)),
        type(index.pages)(*(part.cuda() for part in index.pages)),
        ValuePages(*(part.cuda() for part in index.values)), on_device,
        lengths.cuda(), table.cuda(), lse.cuda(), scale,
    )  # fmt: skip
    found = AttentionState(*(part.cpu() for part in found))
    assert all(part[:, :, :2].isnan().all() for part in found), "the other parts are not its own"
    out, sums, maxima = (part[:3, :, 2:] for part in found)
    assert out.isfinite().all()
    weights = sums.log() + maxima
    logarithm = weights.logsumexp(2)
    reference = (expected.sum.log() + expected.max)[:3, :, -1]
    torch.testing.assert_close(logarithm, reference, rtol=0, atol=2e-4)
    shares = (weights - logarithm.unsqueeze(2)).exp().nan_to_num()
    merged = (out * shares.unsqueeze(-1)).sum(2)
    torch.testing.assert_close(merged, expected.out[:3, :, -1], rtol=0, atol=2e-2)


@shapes
def test_queries_are_rounded_after_rope(shape: Shape) -> None:
    dim, kv_heads, group, dtype = shape
    batch, tokens, scale = 4, 9 * BLOCK_TOKENS, dim**-0.5
    index = coded(shape, batch, tokens)
    index.pages.centres.normal_()
    query = torch.randn(batch, kv_heads * group, dim).to(dtype)
    rope = random_rope(batch, shape)
    held = (9, 1, 5, 0)  # pages of each sequence
    lengths, lse = torch.tensor([tokens, 1, 4 * BLOCK_TOKENS + 1, 0]), torch.randn(batch, kv_heads * group)
    expected = quantize_query(query, index.pages, index.rotation, lse, lengths, index.page_table, scale, rope)
    pages = type(index.pages)(*(part.cuda() for part in index.pages))
    on_device = Rope(*(part.cuda() for part in rope))
    integers, steps, offsets = quantize_query(
        inner(query), pages, index.rotation.cuda(), lse.cuda(), lengths.cuda(), index.page_table.cuda(),
        scale, on_device,
    )  # fmt: skip
    different = (integers[:3].cpu().int() - expected.integers[:3]).abs()
    assert different.max() <= 1 and different.float().mean() < 1e-2, "between two steps it may go either way"
    torch.testing.assert_close(steps[:3].cpu(), expected.steps[:3], rtol=1e-4, atol=0)
    for b, count in enumerate(held):
        found, wanted = offsets[b, :, :count].cpu(), expected.offsets[b, :, :count]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@shapes
def test_attention_that_begins_beside_the_rounding_of_its_query(shape: Shape) -> None:
    """In a graph, again and again with other queries: it never reads those of the time before."""
    dim, kv_heads, group, _ = shape
    batch, tokens, scale = 4, 20 * BLOCK_TOKENS, 2 * dim**-0.5
    index = coded(shape, batch, tokens)
    pages = type(index.pages)(*(part.cuda() for part in index.pages))
    values = ValuePages(*(part.cuda() for part in index.values))
    tail = TailList(*(part.cuda() for part in random_tail(batch, kv_heads, 30, tokens)))
    lengths, table = torch.tensor([tokens, tokens, 0, tokens - 5]).cuda(), index.page_table.cuda()
    lse, rotation = torch.zeros(batch, kv_heads * group, device="cuda"), index.rotation.cuda()
    query = torch.randn(batch, kv_heads * group, dim).to(shape.dtype).cuda()
    rope = Rope(*(part.cuda() for part in random_rope(batch, shape)))
    parts = (batch, kv_heads, tail_parts(tail) + 1, group)  # the first one is that of the resident rows

    def attend(*, early: bool) -> AttentionState:
        state = AttentionState(*(torch.zeros(size, device="cuda") for size in ((*parts, dim), parts, parts)))
        quantized = quantize_query(query, pages, rotation, lse, lengths, table, scale, rope)
        attend_tail(state, quantized, pages, values, tail, lengths, table, lse, scale, early=early)
        return state

    attend(early=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(early=True)
    for _ in range(50):
        query.normal_()
        graph.replay()
        same(*((late.cpu(), early) for late, early in zip(attend(early=False), found, strict=True)))
