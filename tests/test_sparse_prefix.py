"""Prompts that attend to what they begin with from codes and a few exact rows."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache import layer as layer_module
from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import LayerCache
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import GREEDY, blocks_of, divergence, make_engine
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.runtime.client import Client
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.model.kv_shape import KVShape, LayerSpec
from tests.faults import WAIT_S, assert_serves
from tests.server import Server

CACHED, OWN, ROOM = 1536, 90, 2000
EXACT = 200  # of CACHED
CONFIG = CacheConfig(select_k=8, resident=64, prefix_attention="sparse")
FIRST_BLOCKS, SECOND_BLOCKS = 0, 1


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
    monkeypatch.setattr(KVCache, "least_prefix", CACHED)
    engines[1] = make_engine(decoder, CONFIG, 2, ROOM)
    assert torch.equal(again(engines[1], prompt), exact)
    for one, other in zip(*(engine.cache.sparse_layers for engine in engines), strict=True):
        for ours, its in zip(one.resident[:3], other.resident[:3], strict=True):
            assert torch.equal(ours[1], its[1])


def test_few_exact_rows_are_close_and_closer_than_none(
    decoder: Decoder, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = again(make_engine(decoder, replace(CONFIG, prefix_attention="exact"), 2, ROOM), prompt)
    few_exact_rows(monkeypatch)
    found = again(make_engine(decoder, CONFIG, 2, ROOM), prompt)
    assert not torch.equal(found, exact)
    monkeypatch.setattr(LayerCache, "fetch_best", fetch_only_what_sets_need)
    assert divergence(found, exact) < divergence(again(make_engine(decoder, CONFIG, 2, ROOM), prompt), exact)
    assert divergence(found, exact) < 1e-2


def fetch_only_what_sets_need(self: LayerCache, rows: Tensor, prompts: object, queries: Tensor) -> Tensor:
    return torch.arange(EXACT, dtype=torch.int32).expand(self.resident.kv_heads, -1).contiguous()


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
    before = [
        [part[pages].clone() for part in (*layer.index.pages, *layer.index.values)]
        for layer in engine.cache.sparse_layers
    ]
    engine.retire(0)
    for layer in engine.cache.sparse_layers:  # other sequences have had the pages meanwhile
        for part in (*layer.index.pages, *layer.index.values):
            part.zero_()
    run(engine, 1, tokens, blocks, CACHED)
    table, pages = engine.tables(1)
    for number, (layer, codes) in enumerate(zip(engine.cache.sparse_layers, before, strict=True)):
        found = [part[pages[: CACHED // size]] for part in (*layer.index.pages, *layer.index.values)]
        assert all(torch.equal(ours, its) for ours, its in zip(codes, found, strict=True))
        resident = layer.resident
        total = len(tokens)
        for head in range(resident.kv_heads):
            latest = [
                (place, row)
                for row in range(resident.sinks, resident.first)
                if (place := row + (total - 1 - row) // resident.recent * resident.recent) < total
            ]
            chosen = [
                (place, resident.first + entry)
                for entry, place in enumerate(resident.positions[1, head].tolist())
            ]
            assert len({place for place, _ in chosen}) == resident.capacity
            for place, row in [*((row, row) for row in range(resident.sinks)), *latest, *chosen]:
                assert 0 <= place < total
                its = layer.arena[table[place // size], head, place % size]
                assert torch.equal(resident.rows[1, head, row], its), f"layer {number}, token {place}"


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
    shape = KVShape((LayerSpec(),) * 32, query_heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    with_codes = replace(shape, codes=True)
    assert shape.part_bytes == shape.block_tokens * shape.row_bytes
    assert with_codes.token_bytes == shape.token_bytes and with_codes.block_tokens == shape.block_tokens
    assert 0.13 < with_codes.block_bytes / shape.block_bytes - 1 < 0.14


LINE = ("--kv-size", "4MiB", "--select-k", "16", "--resident", "64", "--prefix-attention", "sparse")


def test_a_server_goes_on_with_codes_from_memory_and_from_disk(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path, prompt: list[int], tmp_path: Path
) -> None:
    """1536 tokens are more than a head has exactly. Other answers are not asked for, as codes lose a little:
    these are the same wherever the codes come from."""
    line = ("--model", str(tiny_model), *LINE, "--kv-disk", str(tmp_path / "kv"), "--kv-disk-size", "16MiB")
    answers = []
    for restarted in (False, True):
        with launch(*line) as server, Client(server.address, timeout=WAIT_S) as client:
            for turn in range(2):
                answer = client.generate(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
                assert answer.usage.cached_tokens == (CACHED if restarted or turn else 0)
                answers.append(answer.tokens)
            while client.info().stores[0].disk_blocks < 3:
                pass
            assert client.info().stores[0].disk_hits == (3 if restarted else 0)
            assert_serves(server)
    assert answers[1] == answers[2] == answers[3]
    exact = [part for part in line if part not in ("--prefix-attention", "sparse")]
    with launch(*exact) as server, Client(server.address, timeout=WAIT_S) as client:
        answer = client.generate(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
        assert answer.usage.cached_tokens == 0, (
            "rows that were computed from codes are not those of exact ones"
        )
