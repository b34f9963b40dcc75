"""Prefill on a GPU: attention against plain products, and short prompts together against each alone."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import (
    GREEDY,
    blocks_of,
    divergence,
    make_arena,
    make_engine,
    prefill,
    wait_for,
)
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.prefill import LEAST_FLOPS
from clo.gpu_worker.prompt_graphs import SIZES
from clo.kernels.attend_prompt import attend_prompt, attend_prompts
from clo.runtime.config import Attention, CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from tests.cuda_tensors import error, random_prompt

pytestmark = pytest.mark.gpu

SOURCES = (QuerySource.OWN, QuerySource.INPUT, QuerySource.MIDDLE, QuerySource.INPUT)
LONGEST = 900
CONFIG = CacheConfig(select_k=16, resident=LONGEST)


@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(3, 3, 64), (8, 4, 128), (2, 7, 128), (4, 1, 96)])
@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 1000), (77, 77), (300, 1333), (512, 512)])
def test_attention_of_a_chunk(kv_heads: int, group: int, dim: int, count: int, total: int) -> None:
    query, rows = random_prompt(count, total, kv_heads, group, dim)
    out, lse = attend_prompt(query, rows, 0.1)
    expected, sums = attend_prompt(query.float(), rows.float(), 0.1)
    assert error(out, expected) < 0.01
    torch.testing.assert_close(lse, sums, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(3, 3, 64), (2, 7, 128), (1, 2, 80), (2, 2, 256)])
@pytest.mark.parametrize(("count", "total"), [(1, 1), (1, 1000), (77, 77), (300, 1333)])
def test_attention_in_float32(kv_heads: int, group: int, dim: int, count: int, total: int) -> None:
    query, rows = (part.float() for part in random_prompt(count, total, kv_heads, group, dim))
    out, lse = attend_prompt(query, rows, 0.1)
    keys, values = (part.double().repeat_interleave(group, 1) for part in rows.unbind(2))
    scores = torch.einsum("nhd,thd->nht", query.double(), keys) * 0.1
    later = torch.arange(total).view(1, 1, -1) > torch.arange(total - count, total).view(-1, 1, 1)
    scores.masked_fill_(later.cuda(), -torch.inf)
    assert error(out, torch.einsum("nht,thd->nhd", scores.softmax(-1), values)) < 1e-5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(3, 3, 64), (8, 4, 128), (2, 7, 128)])
def test_attention_of_several_prompts_at_once(kv_heads: int, group: int, dim: int) -> None:
    bounds = [0, 1, 130, 130, 257, 400, 400]
    query, rows = random_prompt(512, 512, kv_heads, group, dim)
    query[400:], rows[400:] = torch.nan, torch.nan  # no prompt's
    out, lse = attend_prompts(query, rows, torch.tensor(bounds, dtype=torch.int32, device="cuda"), 0.1)
    for start, end in pairwise(bounds):
        if start < end:
            part = slice(start, end)
            expected, sums = attend_prompt(query[part].float(), rows[part].float(), 0.1)
            assert error(out[part], expected) < 0.01
            torch.testing.assert_close(lse[part], sums, rtol=1e-3, atol=2e-3)


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cuda", dtype="bfloat16")))


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(0, 512, (count,), generator=generator)]


def forced(engine: Engine, slots: list[int], longest: int, tokens: Tensor) -> list[Tensor]:
    """Logits [slots, vocab] of decode steps that read the tokens [steps, slots]."""
    logits = []
    for step, row in enumerate(tokens, 1):
        engine.feed(slice(len(slots)), row)
        handle = engine.step(slots, longest + step)
        wait_for(engine, handle)
        logits.append(handle.logits[: len(slots)].clone())
    return logits


@pytest.mark.parametrize("lengths", [(5,), (1, 2, 3), (256,), (300, 63, 64, 65), (512, 511, 700, 9)])
def test_short_prompts_together_are_as_each_alone(decoder: Decoder, lengths: tuple[int, ...]) -> None:
    prompts = [random_tokens(length, seed) for seed, length in enumerate(lengths)]
    longest, slots = max(lengths), list(range(len(lengths)))
    engines = [make_engine(decoder, CONFIG, 6, LONGEST + 20, SOURCES) for _ in range(2)]
    together, alone = engines
    for engine in engines:
        engine.capture()
    assert together.prompt_graphs.longest >= longest
    blocks = [blocks_of(together, slot, LONGEST + 20) for slot in slots]
    # former sequences of the slots leave nothing behind
    together.prefill_short(slots, [random_tokens(80, 50)] * len(slots), blocks)
    logits = together.prefill_short(slots, prompts, blocks).clone()
    expected = torch.cat([prefill(alone, slot, prompts[slot], LONGEST + 20) for slot in slots])
    for slot in slots:
        assert divergence(logits[slot : slot + 1], expected[slot : slot + 1]) < 2e-3
        together.activate(slot, lengths[slot], GREEDY, 0)
    torch.cuda.synchronize()
    for mine, theirs in zip(together.cache.sparse_layers, alone.cache.sparse_layers, strict=True):
        used = slice(len(slots))
        assert torch.equal(mine.resident.positions[used], theirs.resident.positions[used])
        assert torch.equal(mine.resident.last_used[used], theirs.resident.last_used[used])
        assert torch.equal(mine.state.selection_query[used], theirs.state.selection_query[used])
        torch.testing.assert_close(mine.state.lse[used], theirs.state.lse[used], rtol=0.02, atol=0.1)
        for slot in slots:
            held = mine.resident.tokens(slot, lengths[slot]) >= 0
            assert error(mine.resident.rows[slot][held], theirs.resident.rows[slot][held]) < 0.02
            rows = [engine_rows(engine, layer.arena, slot, lengths[slot])
                    for engine, layer in ((together, mine), (alone, theirs))]  # fmt: skip
            assert error(*rows) < 0.02
        assert isinstance(mine.index, TwoBitIndex) and isinstance(theirs.index, TwoBitIndex)
    tokens = torch.randint(512, (8, len(slots)), device="cuda")
    found, wanted = (forced(engine, slots, longest, tokens) for engine in engines)
    for logits, reference in zip(found, wanted, strict=True):
        assert divergence(logits, reference) < 5e-3


def engine_rows(engine: Engine, arena: Tensor, slot: int, length: int) -> Tensor:
    """The rows of a sequence in one layer of the arena: [kv_heads, length, 2, head_dim]."""
    blocks, _ = engine.tables(slot)
    count = -(-length // arena.shape[2])
    return arena[blocks[:count].cpu().to(arena.device)].transpose(0, 1).flatten(1, 2)[:, :length]


def test_a_graph_takes_no_more_than_it_can(decoder: Decoder) -> None:
    engine = make_engine(decoder, CacheConfig(select_k=16, resident=200), 2, LONGEST, SOURCES)
    assert engine.prompt_graphs.longest == 0, "nothing is captured"
    engine.capture()
    assert engine.prompt_graphs.longest == 268, "such a prompt fills set, sinks and ring"
    assert engine.prompt_graphs.size(SIZES[-1]) == SIZES[-1]
    assert engine.prompt_graphs.size(SIZES[-1] + 1) is None
    slots, blocks = [0, 1, 0], [blocks_of(engine, slot, 9) for slot in (0, 1, 0)]
    with pytest.raises(ValueError, match="No graph takes these 3"):
        engine.prefill_short(slots, [[1] * 9] * 3, blocks)


@pytest.mark.parametrize("last", [1, 40])
def test_units_of_any_size_give_the_same_logits(
    decoder: Decoder, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LEAST_FLOPS, "cuda", 0.0)  # this model is small
    engine = make_engine(decoder, CacheConfig(select_k=16, resident=32), 1, 6000, SOURCES)
    prompt, found = random_tokens(5500, 3), []
    for flops in (0.0, 3e6, 1e8, torch.inf):
        work = engine.prefill(0, prompt, blocks_of(engine, 0, 6000), last)
        while (logits := work.advance(work.unit(flops)[0])) is None:
            pass
        found.append(logits)
    for logits in found:
        assert logits.shape == (last, 512) and divergence(logits, found[-1]) < 2e-3


@pytest.mark.parametrize("attention", ["clo", "full"])
def test_a_prompt_that_begins_with_rows_that_are_there(decoder: Decoder, attention: Attention) -> None:
    """Its logits are those of the whole prefill, and so are those of the steps that follow."""
    size, config = decoder.shape.block_tokens, CacheConfig(attention=attention, select_k=16, resident=200)
    prompt, room = random_tokens(5500, 4), 5600
    engine = make_engine(decoder, config, 2, room, SOURCES)
    expected = prefill(engine, 0, prompt, room)
    for cached in (size, len(prompt) // size * size):
        own = blocks_of(engine, 1, room)
        blocks = blocks_of(engine, 0, room)[: cached // size] + own[cached // size :]
        work = engine.prefill(1, prompt, blocks, cached=cached)
        while (logits := work.advance()) is None:
            pass
        engine.activate(1, len(prompt), GREEDY, 0)
        assert divergence(logits, expected) < 2e-3
        for cached_layer in engine.cache.sparse_layers:
            index = cached_layer.index
            assert isinstance(index, TwoBitIndex)
            pages = [engine.tables(slot)[1][: cached // size] for slot in (0, 1)]
            assert torch.equal(index.pages.codes[pages[0]], index.pages.codes[pages[1]])
        for one in forced(
            engine, [0, 1], len(prompt), torch.randint(512, (8, 1), device="cuda").expand(8, 2)
        ):
            assert divergence(one[:1], one[1:]) < 5e-3
        engine.retire(1)
        engine.retire(0)
        expected = prefill(engine, 0, prompt, room)


def test_a_warm_up_leaves_the_arena_as_it_is(decoder: Decoder) -> None:
    """As others may be using it: a worker that is started again warms up, too."""
    arena = make_arena(decoder, 1, 4096)
    arena.fill_(3.0)
    engine = Engine(decoder, arena, CacheConfig(), 1, 4096)
    engine.warm_up()
    torch.cuda.synchronize()
    assert bool((arena == 3.0).all())
