"""Every CUDA kernel against its reference on the CPU, on fresh random inputs and with poisoned outputs."""

import pytest
import torch
from torch import Tensor

from clo.kernels import fetch as fetch_module
from clo.kernels.append import append
from clo.kernels.attend import attend_resident, merge_fetched
from clo.kernels.encode import CODES_PER_BYTE, CodePages, encode, encode_new, unpack
from clo.kernels.fetch import fetch
from clo.kernels.gate import gate
from clo.kernels.launch import block_shared_bytes
from clo.kernels.limits import RUN, UPDATE_STATIC_BYTES, update_shared_bytes
from clo.kernels.quantize_query import quantize_query
from clo.kernels.resident import ResidentSet
from clo.kernels.score import NEVER, Scores, score_codes, sum_runs
from clo.kernels.store import store_new, store_prompt
from clo.kernels.update_resident import FetchList, update_resident
from tests.cuda_tensors import RECENT, SINKS, inner, mapped, on_gpu, resident_set, same
from tests.kernel_calls import SHAPES
from tests.tail_inputs import with_runs

pytestmark = pytest.mark.gpu

BLOCK_TOKENS = 64
shapes = pytest.mark.parametrize(("dim", "kv_heads", "group", "dtype"), SHAPES)


def table_of(batch: int, max_blocks: int) -> Tensor:
    """Distinct blocks in random order, out of a few more than needed."""
    return torch.randperm(batch * max_blocks + 3)[: batch * max_blocks].view(batch, max_blocks)


@shapes
def test_append_and_store_new(dim: int, kv_heads: int, group: int, dtype: torch.dtype) -> None:
    batch = 4
    block_table = table_of(batch, 3)
    arena = torch.randn(len(block_table.flatten()) + 3, kv_heads, BLOCK_TOKENS, 2, dim).to(dtype)
    resident = resident_set(batch, kv_heads, 20, dim, dtype)
    arena_gpu, resident_gpu = mapped(arena), on_gpu(resident)
    starts = torch.tensor([0, 3, SINKS + RECENT - 2, 0])
    for step in range(1, 100):
        lengths = starts + step
        lengths[3] = 0
        kv = torch.randn(batch, kv_heads, 2, dim).to(dtype)
        for _ in range(1 + step % 2):  # every second step is repeated
            append(kv, lengths, resident)
            append(inner(kv), lengths.cuda(), resident_gpu)
        store_new(kv, lengths, block_table, arena)
        store_new(inner(kv), lengths.cuda(), block_table.cuda(), arena_gpu)
    same((arena, arena_gpu), *zip(resident[:3], resident_gpu[:3], strict=True))


@shapes
@pytest.mark.parametrize("in_order", [False, True])
def test_store(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both layouts of an arena; no copy goes over the end of a registered range, of 10,000 bytes here."""
    monkeypatch.setattr("clo.kernels.store.REGISTERED_BYTES", 10_000)
    arena = torch.randn(7, kv_heads, BLOCK_TOKENS, 2, dim).to(dtype)
    if in_order:
        arena = arena.transpose(0, 1).contiguous().transpose(0, 1)
    arena_gpu = mapped(arena.transpose(0, 1)).transpose(0, 1) if in_order else mapped(arena)
    assert arena_gpu[:, 0].stride() == arena[:, 0].stride()
    for total in (1, BLOCK_TOKENS, 3 * BLOCK_TOKENS + 7):
        for blocks in ([2, 3, 4, 5], [6, 0, 1, 3]):
            rows = torch.randn(total, kv_heads, 2, dim).to(dtype)
            store_prompt(rows, blocks, arena)
            store_prompt(rows.cuda(), blocks, arena_gpu)
            same((arena, arena_gpu))


@shapes
def test_encode_new(dim: int, kv_heads: int, group: int, dtype: torch.dtype) -> None:
    batch = 3
    page_table = table_of(batch, 3)
    pool = (len(page_table.flatten()) + 3, kv_heads)
    pages = CodePages(
        torch.randint(0, 256, (*pool, BLOCK_TOKENS, dim // CODES_PER_BYTE), dtype=torch.uint8),
        torch.randn(*pool, BLOCK_TOKENS).half(),
        torch.randn(*pool, dim),
    )
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()
    pages_gpu = CodePages(*(tensor.cuda() for tensor in pages))
    for step in range(1, 2 * BLOCK_TOKENS + 4):
        lengths = torch.tensor([step, step + 37, 0])
        rows = torch.randn(batch, kv_heads, 2, dim).to(dtype)
        encode_new(rows[:, :, 0], lengths, page_table, pages, rotation)
        encode_new(inner(rows)[:, :, 0], lengths.cuda(), page_table.cuda(), pages_gpu, rotation.cuda())
    same((pages.centres, pages_gpu.centres))
    different = unpack(pages.codes) != unpack(pages_gpu.codes.cpu())
    assert different.float().mean() < 1e-3, "entries between two levels may go either way"
    torch.testing.assert_close(pages_gpu.scales.cpu(), pages.scales, rtol=0.03, atol=1e-3)


@shapes
def test_gate(dim: int, kv_heads: int, group: int, dtype: torch.dtype) -> None:
    batch = 5
    selection_query = torch.randn(batch, kv_heads, group * dim).to(dtype)
    selection_query[0] = 0
    query = (
        selection_query.float() + torch.rand(batch, kv_heads, 1) * torch.randn_like(selection_query.float())
    ).to(dtype)
    query = query.view(batch, kv_heads * group, dim)
    threshold = torch.rand(kv_heads) * 0.4 + 0.6
    lengths, whole = torch.tensor([9, 4, 5, 0, 7]), 4
    counters = torch.randint(0, 99, (batch, kv_heads, 6))
    selection_gpu, counters_gpu = selection_query.cuda(), counters.cuda()
    found = gate(inner(query), selection_gpu, threshold.cuda(), lengths.cuda(), whole, counters_gpu)
    reselect = gate(query, selection_query, threshold, lengths, whole, counters)
    same((reselect, found), (selection_query, selection_gpu), (counters, counters_gpu))


@shapes
@pytest.mark.parametrize("block_tokens", [64, 256, 512])
def test_score_codes(dim: int, kv_heads: int, group: int, dtype: torch.dtype, block_tokens: int) -> None:
    batch = 4
    page_table = table_of(batch, 1300 // block_tokens + 1)
    blocks = len(page_table.flatten()) + 3
    keys = torch.randn(blocks, kv_heads, block_tokens, dim) * 2
    centres = torch.randn(blocks, kv_heads, dim)
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()
    pages = CodePages(*encode(keys, centres.unsqueeze(2), rotation), centres)
    query = torch.randn(batch, kv_heads * group, dim).to(dtype)
    lse = torch.randn(batch, kv_heads * group) * 3
    reselect = torch.rand(batch, kv_heads) < 0.8
    lengths = torch.tensor([1300, RECENT + SINKS + 9, 3, 700])
    scale = dim**-0.5
    quantized = quantize_query(query, pages, rotation, lse, lengths, page_table, scale)
    expected = score_codes(quantized, pages, reselect, lengths, page_table, SINKS, RECENT, scale).rows
    pages_gpu = CodePages(*(tensor.cuda() for tensor in pages))
    shared = lengths.cuda(), page_table.cuda()
    quantized = quantize_query(inner(query), pages_gpu, rotation.cuda(), lse.cuda(), *shared, scale)
    scores = score_codes(quantized, pages_gpu, reselect.cuda(), *shared, SINKS, RECENT, scale)
    found, runs = (part.cpu() for part in scores)
    wanted = with_runs(found, lengths, RECENT).runs
    for b in range(batch):
        end = max(0, int(lengths[b]) - RECENT)
        for h in range(kv_heads):
            if reselect[b, h] and end > SINKS:
                assert (found[b, h, :SINKS] == NEVER).all()
                difference = found[b, h, SINKS:end].int() - expected[b, h, SINKS:end].int()
                # a query entry between two 8-bit steps may go either way
                assert difference.abs().max() <= 12 and difference.abs().float().mean() < 1
                there = slice(-(-end // RUN))
                assert torch.equal(runs[b, h, there], wanted[b, h, there])


@pytest.mark.parametrize("successors", [False, True])
@pytest.mark.parametrize(
    ("span", "k", "capacity", "spread"),
    [(64, 6, 8, 9), (512, 128, 1024, 300), (6016, 128, 1024, 2000), (32768, 256, 2048, 9000),
     (32768, 256, 2048, 3), (70016, 1500, 4096, 32767)],
)  # fmt: skip
def test_update_resident(span: int, k: int, capacity: int, spread: int, successors: bool) -> None:
    batch, kv_heads, latest = 3, 3, 5
    resident = resident_set(batch, kv_heads, capacity, 4, torch.float32)
    counters = torch.zeros(batch, kv_heads, 6, dtype=torch.int64)
    resident_gpu, counters_gpu = on_gpu(resident), counters.cuda()
    drift = torch.randn(batch, kv_heads, span)
    for step in range(12):
        lengths = torch.tensor([span - 12 + step, span // 3 + step, 0])
        drift = 0.9 * drift + 0.4 * torch.randn_like(drift)
        scores = (16000 + drift * spread / 3).clamp(0, 0x7F80).to(torch.int16)
        scores[..., :SINKS] = NEVER
        scores[..., 9::41] = -64  # what is left of a sum that is not a number
        reselect = torch.rand(batch, kv_heads) < 0.8
        scored = with_runs(scores, lengths, latest)
        fetch_list = update_resident(
            scored, reselect, lengths, latest, resident, counters, k, successors=successors
        )
        scored = Scores(*(part.cuda() for part in scored))
        found = update_resident(
            scored, reselect.cuda(), lengths.cuda(), latest, resident_gpu, counters_gpu, k,
            successors=successors,
        )  # fmt: skip
        same(*zip(resident[1:3], resident_gpu[1:3], strict=True), (counters, counters_gpu))
        same((fetch_list.counts, found.counts))
        valid = torch.arange(k) < fetch_list.counts.unsqueeze(2)
        assert torch.equal(fetch_list.entries[valid], found.entries.cpu()[valid])


def test_a_set_that_just_exceeds_the_shared_memory_is_refused() -> None:
    spare = block_shared_bytes() - UPDATE_STATIC_BYTES - update_shared_bytes(1, 0, 64)
    scores = torch.full((1, 1, 64), NEVER, dtype=torch.int16, device="cuda")
    scores[..., 5] = 9
    scored = Scores(scores, sum_runs(scores))
    reselect = torch.ones(1, 1, dtype=torch.bool, device="cuda")
    lengths, counters = torch.tensor([64]).cuda(), torch.zeros(1, 1, 6, dtype=torch.int64, device="cuda")
    largest, larger = (on_gpu(resident_set(1, 1, spare // 4 + more, 4, torch.float32)) for more in (0, 1))

    def missing(resident: ResidentSet) -> Tensor:
        return update_resident(scored, reselect, lengths, 0, resident, counters, 1, successors=True).counts

    assert missing(largest).item() == 1
    with pytest.raises(ValueError, match=r"update_resident needs \d+ bytes of shared memory"):
        missing(larger)


@shapes
@pytest.mark.parametrize("most", [0, 3, 60])
@pytest.mark.parametrize(("patient", "many"), [(False, 2**30), (True, 2**30), (False, 1)])
def test_fetch(
    dim: int, kv_heads: int, group: int, dtype: torch.dtype, most: int, patient: bool, many: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fetch_module, "_MANY", many)
    batch, max_blocks, capacity = 70, 3, 80
    block_table = table_of(batch, max_blocks)
    arena = torch.randn(kv_heads, len(block_table.flatten()) + 3, BLOCK_TOKENS, 2, dim).to(dtype)
    arena, arena_gpu = arena.transpose(0, 1), mapped(arena).transpose(0, 1)
    resident = resident_set(batch, kv_heads, capacity, dim, dtype)
    resident.positions.random_(0, max_blocks * BLOCK_TOKENS)
    resident_gpu = on_gpu(resident)
    counts = torch.randint(0, most + 1, (batch, kv_heads), dtype=torch.int32)
    entries = torch.rand(batch, kv_heads, capacity).argsort(2)[..., :64].int()
    fetch(FetchList(entries, counts), resident, block_table, arena)
    fetch_list = FetchList(entries.cuda(), counts.cuda())
    fetch(fetch_list, resident_gpu, block_table.cuda(), arena_gpu, patient=patient)
    same((resident.rows, resident_gpu.rows))


@shapes
@pytest.mark.parametrize("capacity", [1, 100, 1024])
def test_attend(dim: int, kv_heads: int, group: int, dtype: torch.dtype, capacity: int) -> None:
    batch, first, k, scale = 4, SINKS + RECENT, 200, dim**-0.5
    lengths = torch.tensor([3, first + capacity // 2, 5000, 0])
    resident = resident_set(batch, kv_heads, capacity, dim, torch.float32)
    resident.positions[1, :, : capacity // 2] = resident.positions[2] = 7
    if capacity > 1:  # there is room for the row that the new one displaces from the ring
        home = capacity // 2 - 1
        resident.positions[1, :, home], resident.rows[1, :, first + home] = -1, torch.nan
    resident.rows[0, :, 3:] = resident.rows[1, :, first + capacity // 2 :] = resident.rows[3] = torch.nan
    resident = resident._replace(rows=resident.rows.to(dtype))
    query = 3 * torch.randn(batch, kv_heads * group, dim).to(dtype)
    kv = torch.randn(batch, kv_heads, 2, dim).to(dtype)
    counts = torch.zeros(batch, kv_heads, dtype=torch.int32)
    counts[2] = torch.randint(0, min(k, capacity) + 1, (kv_heads,))
    entries = torch.zeros(batch, kv_heads, k, dtype=torch.int32)
    drawn = torch.rand(batch, kv_heads, capacity).argsort(2)[..., :k].int()
    entries[..., : drawn.shape[2]] = drawn
    lse = torch.randn(batch, kv_heads * group)
    lse_gpu = lse.cuda()

    query_gpu, resident_gpu, lengths_gpu = inner(query), on_gpu(resident), lengths.cuda()
    late = on_gpu(resident)  # NaN where rows have not arrived yet
    in_float = resident._replace(rows=resident.rows.float().nan_to_num())
    fetch_list = FetchList(entries, counts)
    state = attend_resident(query.float(), kv.float(), in_float, lengths, fetch_list, scale)
    expected = merge_fetched(state, query.float(), in_float, lengths, fetch_list, lse, scale)

    fetch_list_gpu = FetchList(entries.cuda(), counts.cuda())
    for h in range(kv_heads):
        late.rows[2, h, first + entries[2, h, : counts[2, h]].long()] = torch.nan
    state = attend_resident(query_gpu, inner(kv), late, lengths_gpu, fetch_list_gpu, scale)
    found = merge_fetched(state, query_gpu, resident_gpu, lengths_gpu, fetch_list_gpu, lse_gpu, scale)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found[:3].cpu().float(), expected[:3], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse_gpu.cpu(), lse, rtol=1e-4, atol=1e-4)
    for _ in range(2):  # before the new rows are appended, and afterwards
        state = attend_resident(query_gpu, inner(kv), resident_gpu, lengths_gpu, None, scale)
        whole = merge_fetched(state, query_gpu, resident_gpu, lengths_gpu, None, lse_gpu, scale)
        torch.testing.assert_close(whole[:3].cpu().float(), expected[:3], rtol=tolerance, atol=tolerance)
        append(inner(kv), lengths_gpu, resident_gpu)
