"""The last tokens of a prompt by graphs of a layer each: as the prefill that is launched kernel by kernel."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache import layer as layer_module
from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import GREEDY, blocks_of, divergence, make_engine, prefill, wait_for
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.prefill import Prefill
from clo.gpu_worker.suffix_graphs import SIZES, SuffixPrefill, most_tokens
from clo.kernels.attend_prompt import attend_prompt, attend_suffix, suffix_lse
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.model.kv_shape import KVShape, LayerSpec

SOURCES = (QuerySource.OWN, QuerySource.INPUT, QuerySource.MIDDLE, QuerySource.INPUT)
ROOM, CONFIG = 3000, CacheConfig(select_k=16, resident=200, tail=512)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def decoder(tiny_model: str, request: pytest.FixtureRequest) -> Decoder:
    config = ModelConfig(model=str(tiny_model), device="cpu")
    if request.param == "cuda":
        config = ModelConfig(model=str(tiny_model), device="cuda", dtype="bfloat16")
    return load_decoder(resolve(config))


@pytest.fixture
def engine(decoder: Decoder) -> Engine:
    return made(decoder, CONFIG)


def made(decoder: Decoder, config: CacheConfig) -> Engine:
    engine = make_engine(decoder, config, 2, ROOM, SOURCES)
    engine.capture()
    if decoder.device.type == "cpu":  # where there are no graphs, but layers all the same
        engine.suffix_graphs.prepare()
    return engine


def random_tokens(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(
        0, 512, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return tokens


def run(work: Prefill | SuffixPrefill) -> Tensor:
    while (logits := work.advance(work.unit(torch.inf)[0])) is None:
        assert work.done < work.total and work.remaining_flops > 0
    if isinstance(work, SuffixPrefill):
        assert work.done == work.total and work.remaining_flops == 0
    return logits.clone()


def tolerance(engine: Engine) -> float:
    return 1e-6 if engine.decoder.shape.dtype == torch.float32 else 5e-3


@pytest.mark.parametrize(
    ("total", "blocks"), [(700, 1), (1024 + 64, 2), (2500, 4), (512 + 300, 1), (1000, 0), (2049, 1)]
)
def test_it_gives_what_the_kernels_alone_give(engine: Engine, total: int, blocks: int) -> None:
    size = engine.decoder.shape.block_tokens
    prompt, cached = random_tokens(total, total), blocks * size
    shared = blocks_of(engine, 0, ROOM)
    whole = prefill(engine, 0, prompt, ROOM).clone()
    own = blocks_of(engine, 1, ROOM)
    work = engine.prefill(1, prompt, shared[:blocks] + own[blocks:], cached=cached)
    assert isinstance(work, SuffixPrefill)
    assert divergence(run(work), whole) < tolerance(engine)
    engine.activate(1, total, GREEDY, 0)
    (_, mine), (_, theirs) = engine.tables(1), engine.tables(0)
    used = -(-total // size)
    for cache in engine.cache.sparse_layers:
        resident, index = cache.resident, cache.index
        assert isinstance(index, TwoBitIndex) and index.values is not None
        for part in (index.pages.codes, index.values.codes):
            if engine.decoder.device.type == "cpu":  # keys of another batch size round in another way
                assert torch.equal(part[mine[: used - 1]], part[theirs[: used - 1]])
            assert torch.equal(part[mine[:blocks]], part[theirs[:blocks]])
        held, exact = resident.positions.cpu()
        for head in range(resident.kv_heads):
            found = set(exact[head].tolist())
            assert len(found) == resident.capacity and min(found) >= resident.sinks
            assert max(found) < total - resident.recent
            # both rank by what the last tokens attend to, one of them by codes
            assert len(found & set(held[head].tolist())) > resident.capacity // 3
        arena = cache.arena[torch.tensor(shared[:blocks] + own[blocks:used])].transpose(0, 1).flatten(1, 2)
        rows, heads = resident.rows[1].cpu(), torch.arange(resident.kv_heads)[:, None]
        set_rows = rows[:, resident.first :]
        assert torch.equal(set_rows, arena.cpu()[heads, exact.long()]), "they are the arena's"
    for _ in range(4):  # and both go on
        assert len(wait_for(engine, engine.step([0, 1], total + 8))) == 2


@pytest.mark.parametrize("exact", [ROOM, 900, 300])
def test_behind_codes_it_is_as_close_as_kernels_alone_are(
    decoder: Decoder, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whatever is resident is exact."""
    monkeypatch.setattr(layer_module, "EXACT_ROWS", exact)
    config = replace(CONFIG, prefix_attention="sparse")
    engine, eager = made(decoder, config), make_engine(decoder, config, 2, ROOM, SOURCES)
    size, prompt = decoder.shape.block_tokens, random_tokens(1800, 6)
    shared, own = blocks_of(engine, 0, ROOM), blocks_of(engine, 1, ROOM)
    expected = run(engine.prefill(0, prompt, shared))
    run(eager.prefill(0, prompt, shared))
    for blocks in (3, 1):
        table = shared[:blocks] + own[blocks:]
        work = engine.prefill(1, prompt, table, cached=blocks * size)
        assert isinstance(work, SuffixPrefill)
        lost = divergence(run(work), expected)
        alone = divergence(run(eager.prefill(1, prompt, table, cached=blocks * size)), expected)
        eager.retire(1)
        assert lost < 1.5 * alone + tolerance(engine)
        assert blocks * size <= exact or lost > 0, "codes were attended to"
        engine.activate(1, len(prompt), GREEDY, 0)
        for cache in engine.cache.sparse_layers:
            resident = cache.resident
            arena = cache.arena[torch.tensor(table)].transpose(0, 1).flatten(1, 2).cpu()
            places = resident.positions[1].long().cpu()
            latest = torch.arange(len(prompt) - resident.recent, len(prompt))
            ring = resident.sinks + (latest - resident.sinks) % resident.recent
            rows, heads = resident.rows[1].cpu(), torch.arange(resident.kv_heads)[:, None]
            assert torch.equal(rows[:, resident.first :], arena[heads, places])
            assert torch.equal(rows[:, : resident.sinks], arena[:, : resident.sinks])
            assert torch.equal(rows[:, ring], arena[:, latest])
        engine.retire(1)


def test_a_prompt_after_another_finds_nothing_of_it(engine: Engine) -> None:
    size, prompt = engine.decoder.shape.block_tokens, random_tokens(1500, 1)
    shared, own = blocks_of(engine, 0, ROOM), blocks_of(engine, 1, ROOM)
    expected = prefill(engine, 0, prompt, ROOM).clone()
    for longer in (random_tokens(1024 + 900, 2), random_tokens(400, 3)):
        work = engine.prefill(1, longer, own, cached=0)
        if isinstance(work, SuffixPrefill):
            run(work)
        del work
        engine.retire(1)
        found = engine.prefill(1, prompt, shared[:2] + own[2:], cached=2 * size)
        assert isinstance(found, SuffixPrefill)
        assert divergence(run(found), expected) < tolerance(engine)
        del found
        engine.retire(1)


def test_one_prompt_uses_the_graphs_at_a_time(engine: Engine) -> None:
    size, prompt = engine.decoder.shape.block_tokens, random_tokens(1500, 4)
    blocks = [blocks_of(engine, slot, ROOM) for slot in (0, 1)]
    expected = run(engine.prefill(0, prompt, blocks[0]))
    first = engine.prefill(0, prompt, blocks[0], cached=2 * size)
    first.advance()
    second = engine.prefill(1, prompt, blocks[0][:2] + blocks[1][2:], cached=2 * size)
    assert isinstance(first, SuffixPrefill) and isinstance(second, Prefill)
    assert divergence(run(second), expected) < tolerance(engine)
    assert divergence(run(first), expected) < tolerance(engine)
    del first  # as where a request is cancelled
    assert isinstance(engine.prefill(1, prompt, blocks[1]), SuffixPrefill)


def test_a_prompt_that_must_not_be_stored_is_not_for_them(engine: Engine) -> None:
    """As when a worker warms up beside others that use the arena."""
    arena = engine.cache.sparse_layers[0].arena
    arena.fill_(3.0)
    with engine.cache.storing_nothing():
        work = engine.prefill(0, random_tokens(700), blocks_of(engine, 0, ROOM))
        assert isinstance(work, Prefill), "a graph stores what it stored when it was captured"
        run(work)
        engine.cache.join_prompts()
    engine.retire(0)
    engine.warm_up()
    if engine.decoder.device.type == "cuda":
        torch.cuda.synchronize()
    assert bool((arena == 3.0).all())
    run(engine.prefill(0, random_tokens(700), blocks_of(engine, 0, ROOM)))
    engine.cache.join_prompts()
    if engine.decoder.device.type == "cuda":
        torch.cuda.synchronize()
    assert not bool((arena == 3.0).all())


@pytest.mark.parametrize(
    ("total", "cached", "taken"),
    [(299, 0, True), (268, 0, False), (SIZES[-1], 0, True), (SIZES[-1] + 1, 0, False), (ROOM, 1024, True),
     (ROOM, 512, False), (1024 + 31, 1024, False), (ROOM + 1, 1024, False)],
)  # fmt: skip
def test_it_takes_what_there_is_a_graph_for(engine: Engine, total: int, cached: int, taken: bool) -> None:
    """A prompt that fits into its set is for other graphs, and so is a suffix without enough queries."""
    assert engine.cache.fitting_tokens == 268
    assert engine.suffix_graphs.takes(total, cached) is taken


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "before"), [(1, 0), (64, 0), (7, 1), (64, 3), (33, 1000)])
def test_attention_of_a_suffix(device: str, count: int, before: int) -> None:
    """In pieces of which some are empty."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query = torch.randn(64, 6, 64, device=device).to(dtype)
    rows = torch.randn(before + 100, 2, 2, 64, device=device).to(dtype)
    pieces, own = (
        torch.tensor(bounds, dtype=torch.int32, device=device)
        for bounds in ([before * piece // 4 for piece in range(5)], [before, before + count])
    )
    found, sums = attend_suffix(query, rows, pieces, own, 0.1)
    expected, lse = attend_prompt(query[:count], rows[: before + count], 0.1)
    assert torch.allclose(found[:count].float(), expected.float(), atol=1e-5 if device == "cpu" else 0.02)
    assert torch.allclose(sums[:count], lse, atol=1e-3)
    asking = torch.randint(0, count, (32,), device=device)
    some = suffix_lse(query[asking], asking, rows[before : before + 64], rows, pieces, 0.1)
    assert torch.allclose(some, lse[asking], atol=1e-3)


def test_they_take_what_memory_is_left() -> None:
    """At the Llama-3-8B shape."""
    shape = KVShape((LayerSpec(),) * 32, query_heads=32, kv_heads=8, head_dim=128, dtype_name="bfloat16")
    most = [
        most_tokens(shape, 131_072, spare, codes=codes)
        for spare, codes in (
            (None, False),
            (None, True),
            (2**31, False),
            (2**29, False),
            (2**28, False),
        )
    ]
    assert most[:3] == [65_536, 131_072, 65_536] and 4096 < most[3] < 32_768 and most[4] == 0
    assert most_tokens(shape, 1000, None, codes=False) == 1000
