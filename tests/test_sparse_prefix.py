"""Prompts that attend to what they begin with from codes and a few exact rows."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache import layer as layer_module
from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import EXACT_ROWS
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import GREEDY, blocks_of, divergence, make_engine
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.startup import check_model
from clo.runtime.client import Client
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.model.kv_shape import KVShape, LayerSpec
from clo.runtime.wire.errors import ConfigError
from tests.faults import WAIT_S, assert_serves
from tests.server import Server

CACHED, OWN, ROOM = 1536, 90, 2000
EXACT = 200  # of CACHED
CONFIG = CacheConfig(select_k=8, resident=64, prefix_attention="sparse")


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))


@pytest.fixture
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, 300, (CACHED + OWN,), generator=generator).tolist()


def run(engine: Engine, slot: int, tokens: list[int], blocks: list[int], cached: int) -> Tensor:
    """Logits of the last token."""
    work = engine.prefill(slot, tokens, blocks, cached=cached)
    while (logits := work.advance()) is None:
        pass
    engine.activate(slot, len(tokens), GREEDY, 0)
    return logits.clone()


def again(engine: Engine, prompt: list[int], cached: int = CACHED) -> Tensor:
    """Compute a prompt in slot 0, and again in slot 1 with the blocks of its first tokens; the second
    logits."""
    size = engine.decoder.shape.block_tokens
    own = [blocks_of(engine, slot, ROOM) for slot in range(2)]
    run(engine, 0, prompt, own[0], 0)
    return run(engine, 1, prompt, own[0][: cached // size] + own[1][cached // size :], cached)


def codes_in(engine: Engine) -> list[list[Tensor]]:
    """All that the pages of each layer's index hold."""
    parts = []
    for layer in engine.cache.sparse_layers:
        assert isinstance(layer.index, TwoBitIndex) and layer.index.values is not None
        parts.append([*layer.index.pages, *layer.index.values])
    return parts


def few_exact_rows(monkeypatch: pytest.MonkeyPatch, rows: int = EXACT) -> None:
    monkeypatch.setattr(layer_module, "EXACT_ROWS", rows)


def test_a_prefix_that_is_fetched_as_a_whole_is_as_an_exact_one(
    decoder: Decoder, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and resident sets, bit for bit."""
    engines = [
        make_engine(decoder, config, 2, ROOM)
        for config in (replace(CONFIG, prefix_attention="exact"), CONFIG)
    ]
    few_exact_rows(monkeypatch, CACHED)
    exact, unused = again(engines[0], prompt), again(engines[1], prompt)
    assert torch.equal(exact, unused), "a prefix of no more rows than are fetched is read as it is"
    engines[1] = make_engine(decoder, CONFIG, 2, ROOM)
    monkeypatch.setattr(KVCache, "least_prefix", CACHED)
    assert torch.equal(again(engines[1], prompt), exact)
    for one, other in zip(*(engine.cache.sparse_layers for engine in engines), strict=True):
        for ours, its in zip(one.resident[:3], other.resident[:3], strict=True):
            assert torch.equal(ours[1], its[1])


def test_the_more_rows_are_exact_the_closer_it_is(
    decoder: Decoder, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights attend to nearly all tokens alike, so that only nearly all rows are close."""
    exact = again(make_engine(decoder, replace(CONFIG, prefix_attention="exact"), 2, ROOM), prompt)
    losses = []
    for rows in (EXACT, 800, 1500):
        few_exact_rows(monkeypatch, rows)
        losses.append(divergence(again(make_engine(decoder, CONFIG, 2, ROOM), prompt), exact))
    assert losses[0] > losses[1] > losses[2] > 0 and losses[2] < 1e-2


@pytest.mark.parametrize("own", [33, OWN, 400])
def test_all_that_is_resident_is_exact_and_the_index_is_that_of_the_prefix(
    decoder: Decoder, prompt: list[int], own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_exact_rows(monkeypatch)
    tokens = [*prompt[:CACHED], *([9] * own)]
    engine = make_engine(decoder, CONFIG, 2, ROOM)
    size, (first, second) = decoder.shape.block_tokens, (blocks_of(engine, slot, ROOM) for slot in range(2))
    blocks = first[: CACHED // size] + second[CACHED // size :]
    run(engine, 0, prompt, first, 0)
    pages = engine.tables(0)[1][: CACHED // size].clone()
    before = [[part[pages] for part in parts] for parts in codes_in(engine)]
    engine.retire(0)
    for parts in codes_in(engine):  # other sequences have had the pages meanwhile
        for part in parts:
            part.zero_()
    run(engine, 1, tokens, blocks, CACHED)
    table, pages = engine.tables(1)
    for codes, parts in zip(before, codes_in(engine), strict=True):
        for ours, its in zip(codes, parts, strict=True):
            assert torch.equal(ours, its[pages[: CACHED // size]])
    total = len(tokens)
    for layer in engine.cache.sparse_layers:
        resident = layer.resident
        ring = [
            (row + (total - 1 - row) // resident.recent * resident.recent, row)
            for row in range(resident.sinks, resident.first)
        ]
        for head in range(resident.kv_heads):
            chosen = resident.positions[1, head].tolist()
            assert len(set(chosen)) == resident.capacity
            places = [*((row, row) for row in range(resident.sinks)), *ring]
            for place, row in [*places, *((place, resident.first + e) for e, place in enumerate(chosen))]:
                its = layer.arena[table[place // size], head, place % size]
                assert torch.equal(resident.rows[1, head, row], its), f"token {place}"


def test_units_of_any_size_give_the_same(
    decoder: Decoder, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_exact_rows(monkeypatch)
    tokens = [*prompt, *prompt[:300]]
    logits = []
    for most in (None, 64):
        engine = make_engine(decoder, CONFIG, 2, ROOM)
        size, (first, second) = (
            decoder.shape.block_tokens,
            (blocks_of(engine, slot, ROOM) for slot in range(2)),
        )
        run(engine, 0, prompt, first, 0)
        blocks = first[: CACHED // size] + second[CACHED // size :]
        work = engine.prefill(1, tokens, blocks, cached=CACHED)
        while (found := work.advance(most and work.unit(0.0)[0])) is None:
            pass
        logits.append(found.clone())
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_blocks_with_codes_are_larger_and_others_as_before() -> None:
    shape = KVShape((LayerSpec(),) * 32, query_heads=32, kv_heads=8, head_dim=128, dtype_name="bfloat16")
    with_codes = replace(shape, codes=True)
    assert shape.part_bytes == shape.block_tokens * shape.row_bytes
    assert with_codes.token_bytes == shape.token_bytes and with_codes.block_tokens == shape.block_tokens
    assert 0.13 < with_codes.block_bytes / shape.block_bytes - 1 < 0.14


SERVED = 2560  # tokens in whole blocks, more than a head has exactly


def test_a_server_goes_on_with_codes_from_memory_and_from_disk(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path, tmp_path: Path
) -> None:
    """Wherever the codes come from, answers are the same."""
    assert EXACT_ROWS < SERVED
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randint(4, 300, (SERVED + OWN,), generator=generator).tolist()
    line = [
        "--model", str(tiny_model), "--kv-size", "16MiB", "--select-k", "16", "--resident", "64",
        "--kv-disk", str(tmp_path / "kv"), "--kv-disk-size", "64MiB",
    ]  # fmt: skip
    answers = []
    for restarted in (False, True):
        with launch(*line, "--prefix-attention", "sparse") as server:
            with Client(server.address, timeout=WAIT_S) as client:
                for turn in range(2):
                    answer = client.generate(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
                    assert answer.usage.cached_tokens == (SERVED if restarted or turn else 0)
                    answers.append(answer.tokens)
                while client.info().stores[0].disk_blocks < 5:
                    pass
                assert client.info().stores[0].disk_hits == (5 if restarted else 0)
            assert_serves(server)
    assert answers[1] == answers[2] == answers[3]


def test_a_context_without_a_tail_is_refused(tiny_model: Path) -> None:
    model = resolve(ModelConfig(model=str(tiny_model), device="cpu", max_model_len=300))
    with pytest.raises(ConfigError, match="sparse needs a tail, and at --max-model-len 300"):
        check_model(model, CacheConfig(prefix_attention="sparse"))
