"""The index of a layer: prompts are written page by page, and both indexes score as their operations do."""

import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.index import ExactIndex, TwoBitIndex, random_rotation
from clo.kernels.blocks import PromptBlocks
from clo.kernels.encode import CodePages, encode, encode_new
from clo.kernels.encode_values import ValuePages, encode_new_values, encode_prompt_values
from clo.kernels.limits import RUN
from clo.kernels.quantize_query import quantize_query
from clo.kernels.score import score_codes, score_exact
from clo.runtime.model.kv_shape import KVShape, LayerSpec

SHAPE = KVShape((LayerSpec(),) * 3, query_heads=6, kv_heads=2, head_dim=256, dtype_name="float32")
CPU = torch.device("cpu")
BLOCK_TOKENS, KV_HEADS, DIM, SCALE = 16, 2, 16, 0.25
SINKS, TAIL = 2, 3


def two_bit_index(pages: int = 12) -> TwoBitIndex:
    """An index whose pages are full of something else."""
    codes = torch.randint(0, 256, (pages, KV_HEADS, BLOCK_TOKENS, DIM // 4), dtype=torch.uint8)
    scales = torch.rand(pages, KV_HEADS, BLOCK_TOKENS).half()
    memory = CodePages(codes, scales, torch.randn(pages, KV_HEADS, DIM))
    words = torch.randint(-99, 99, (pages, KV_HEADS, 1, 1, 32, 4), dtype=torch.int16)
    values = ValuePages(words, torch.rand(pages, KV_HEADS, BLOCK_TOKENS).half())
    return TwoBitIndex(memory, values, random_rotation(DIM, CPU), SCALE)


def copy(pages: CodePages) -> CodePages:
    return CodePages(*(part.clone() for part in pages))


def copy_values(index: TwoBitIndex) -> ValuePages:
    assert index.values is not None
    return ValuePages(*(part.clone() for part in index.values))


def random_batch() -> Batch:
    """Two sequences and a slot not in use, whose blocks have other pages."""
    blocks, pages = torch.randperm(12).view(3, 4), torch.randperm(12).view(3, 4)
    return Batch(torch.tensor([19, 0, 32]), blocks, pages)


def random_query() -> tuple[Tensor, Tensor]:
    """A query for each slot of a batch, and the log-sum-exp of an attention."""
    return torch.randn(3, 6, DIM), torch.randn(3, 6)


def test_each_layer_has_its_own_pages_of_as_many_bytes_as_it_says() -> None:
    layers = TwoBitIndex.allocate(SHAPE, 5, CPU, values=True)
    assert len(layers) == 3
    for (codes, scales, centres), values in layers:
        assert values is not None
        assert codes.shape == (5, 2, SHAPE.block_tokens, 64) and codes.dtype == torch.uint8
        assert scales.shape == (5, 2, SHAPE.block_tokens) and scales.dtype == torch.float16
        assert centres.shape == (5, 2, 256) and centres.dtype == torch.float32
        for part in (codes, scales, centres, *values):
            assert part.is_contiguous() and part.device == CPU
    keys, of_values = ([part for layer in layers for part in layer[which] or ()] for which in range(2))
    parts = [*keys, *of_values]
    assert len({part.data_ptr() for part in parts}) == len(parts)
    for both, held in ((True, parts), (False, keys)):
        size = sum(part.nbytes for part in held)
        assert TwoBitIndex.bytes_per_token(SHAPE, values=both) == size // (5 * SHAPE.block_tokens)
    assert all(values is None for _, values in TwoBitIndex.allocate(SHAPE, 5, CPU, values=False))


def test_a_prompt_is_written_page_by_page_each_around_its_own_mean() -> None:
    for tokens in (
        1,
        BLOCK_TOKENS - 1,
        BLOCK_TOKENS,
        BLOCK_TOKENS + 1,
        3 * BLOCK_TOKENS,
        4 * BLOCK_TOKENS - 2,
    ):
        for dtype in (torch.float32, torch.bfloat16):
            index = two_bit_index()
            expected, page_table = copy(index.pages), torch.randperm(12)[:4]
            rows = torch.randn(tokens, KV_HEADS, 2, DIM).to(dtype)
            keys, of_values = rows[:, :, 0], copy_values(index)
            for start in range(0, tokens, BLOCK_TOKENS):
                page, part = (
                    page_table[start // BLOCK_TOKENS],
                    keys[start : start + BLOCK_TOKENS].transpose(0, 1),
                )
                centre = part.float().mean(1)
                codes, scales = encode(part, centre.unsqueeze(1), random_rotation(DIM, CPU))
                expected.centres[page] = centre
                expected.codes[page, :, : part.shape[1]] = codes
                expected.scales[page, :, : part.shape[1]] = scales
            starts = torch.arange(0, tokens, BLOCK_TOKENS)
            counts = (tokens - starts).clamp_max(BLOCK_TOKENS)
            pages = page_table[: len(starts)]
            blocks = PromptBlocks(starts, counts, pages, pages)
            index.write_prompts(rows, blocks)
            encode_prompt_values(rows[:, :, 1], blocks, of_values)
            assert index.values is not None
            assert all(map(torch.equal, index.values, of_values))
            torch.testing.assert_close(index.pages.centres, expected.centres, rtol=1e-5, atol=1e-6)
            different = index.pages.codes != expected.codes
            assert different.sum() <= 2, "an entry between two levels may go either way"
            torch.testing.assert_close(index.pages.scales, expected.scales, rtol=0.02, atol=1e-3)


def test_two_bit_codes_are_written_and_scored_by_their_operations_through_the_page_table() -> None:
    index, batch, rotation = two_bit_index(), random_batch(), random_rotation(DIM, CPU)
    expected, of_values = copy(index.pages), copy_values(index)
    kv = torch.randn(3, KV_HEADS, 2, DIM)
    index.write(kv, batch)
    encode_new(kv[:, :, 0], batch.lengths, batch.pages, expected, rotation)
    encode_new_values(kv[:, :, 1], batch.lengths, batch.pages, of_values)
    for found, part in zip((*index.pages, *(index.values or ())), (*expected, *of_values), strict=True):
        assert torch.equal(found, part)
    (query, lse), reselect = random_query(), torch.tensor([[True, False], [False, False], [True, True]])
    prepared = index.prepare(query, lse, batch)
    quantized = quantize_query(query, expected, rotation, lse, batch.lengths, batch.pages, SCALE)
    assert torch.equal(prepared.integers, quantized.integers) and torch.equal(prepared.steps, quantized.steps)
    found = index.score(prepared, reselect, batch, SINKS, TAIL)
    wanted = score_codes(quantized, expected, reselect, batch.lengths, batch.pages, SINKS, TAIL, SCALE)
    for b in (0, 2):
        end = int(batch.lengths[b]) - TAIL
        assert torch.equal(found.rows[b, reselect[b], :end], wanted.rows[b, reselect[b], :end])
        runs = slice(-(-end // RUN))
        assert torch.equal(found.runs[b, reselect[b], runs], wanted.runs[b, reselect[b], runs])


def test_memory_is_where_it_is_asked_for() -> None:
    meta = torch.device("meta")
    layers = TwoBitIndex.allocate(SHAPE, 5, meta, values=True)
    parts = [part for keys, values in layers for part in (*keys, *(values or ()))]
    assert all(part.device == meta for part in [*parts, random_rotation(64, meta)])


def test_the_exact_index_scores_the_keys_in_the_arena() -> None:
    arena, batch = torch.randn(12, KV_HEADS, BLOCK_TOKENS, 2, DIM), random_batch()
    index, before, (query, lse) = ExactIndex(arena, SCALE), arena.clone(), random_query()
    starts = torch.zeros(1, dtype=torch.int64)
    parts = PromptBlocks(starts, starts + 2, starts, starts)
    index.write_prompts(torch.randn(20, KV_HEADS, 2, DIM), parts)
    index.write(torch.randn(3, KV_HEADS, 2, DIM), batch)
    assert torch.equal(arena, before), "the keys are there already"
    found = index.score(
        index.prepare(query, lse, batch), torch.ones(3, KV_HEADS, dtype=torch.bool), batch, SINKS, TAIL
    )
    wanted = score_exact(query, arena, batch.blocks, lse, batch.lengths, SINKS, TAIL, SCALE)
    assert all(torch.equal(part, other) for part, other in zip(found, wanted, strict=True))


def test_the_rotation_is_orthogonal_and_always_the_same() -> None:
    for dim in (4, 64, 80, 256):
        rotation = random_rotation(dim, CPU)
        error = rotation.double() @ rotation.double().T - torch.eye(dim)
        assert error.abs().max() < 2**-23, "nothing but the rounding to float32"
        assert rotation.dtype == torch.float32 and rotation.is_contiguous()
        torch.randn(dim)  # which changes the state of torch's own generator
        assert torch.equal(rotation, random_rotation(dim, CPU))
        assert rotation.abs().max() < 1, "it mixes all entries"
