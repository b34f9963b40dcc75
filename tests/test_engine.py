"""The decode path on a tiny random model: exact where nothing is dropped, and the algorithm where it is."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.layer import PROMPT_QUERIES
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import (
    GREEDY,
    blocks_of,
    divergence,
    make_arena,
    make_engine,
    prefill,
    stats_of,
    teacher_force,
    wait_for,
)
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.prefill import LEAST_FLOPS, Prefill, PromptAttention
from clo.kernels.blocks import gather_tokens
from clo.kernels.score import Scores, sum_runs
from clo.kernels.sparse_prompt import attend_prompt_sparse
from clo.runtime.config import Attention, CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from tests.reference import load_transformers, transformers_greedy

SOURCES = (QuerySource.OWN, QuerySource.INPUT, QuerySource.MIDDLE, QuerySource.INPUT)


@pytest.fixture(scope="module")
def decoder(tiny_model: str) -> Decoder:
    return load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))


def random_tokens(decoder: Decoder, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, decoder.vocab, (count,), generator=generator).tolist()
    return tokens


def greedy(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy continuations of all prompts in one batch."""
    lengths = [len(prompt) for prompt in prompts]
    total = max(lengths) + count
    generated = [
        wait_for(engine, engine.start([slot], prefill(engine, slot, prompt, total)))
        for slot, prompt in enumerate(prompts)
    ]
    slots = list(range(len(prompts)))
    for step in range(1, count):
        for slot, token in enumerate(wait_for(engine, engine.step(slots, max(lengths) + step))):
            generated[slot].append(token)
    return generated


@pytest.mark.parametrize("attention", ["full", "clo", "topk"])
def test_a_prompt_may_leave_the_arena_as_it_is(decoder: Decoder, attention: str) -> None:
    """As a worker warms up beside others that use the arena."""
    config = CacheConfig(attention=attention, resident=64, select_k=16)  # type: ignore[arg-type]
    arena = make_arena(decoder, 1, 700).uniform_()
    before = arena.clone()
    engine = Engine(decoder, arena, config, 1, 700)
    with engine.cache.storing_nothing():
        prefill(engine, 0, random_tokens(decoder, 600), 700)
        engine.cache.join_prompts()
    engine.retire(0)
    assert torch.equal(arena, before)
    prefill(engine, 0, random_tokens(decoder, 600), 700)
    assert not torch.equal(arena, before)


@pytest.mark.parametrize("attention", ["full", "clo"])
def test_greedy_tokens_are_those_of_transformers_alone_and_batched(
    decoder: Decoder, tiny_model: str, attention: str
) -> None:
    config = CacheConfig(attention=attention, resident=1600, select_k=64)  # type: ignore[arg-type]
    lengths = (1, 3, 63, 70, 511, 512, 700, 1300)
    prompts = [random_tokens(decoder, count, seed) for seed, count in enumerate(lengths)]
    model = load_transformers(str(tiny_model))
    expected = [transformers_greedy(model, prompt, 20) for prompt in prompts]
    assert greedy(make_engine(decoder, config, 8, 1600), prompts, 20) == expected
    alone = make_engine(decoder, config, 1, 1600)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert greedy(alone, [prompt], 20) == [tokens]
        alone.retire(0)


@pytest.mark.parametrize("prefetch", ["off", "verified", "predicted"])
def test_a_set_as_large_as_the_context_loses_nothing(decoder: Decoder, prefetch: str) -> None:
    prompt, continuation = random_tokens(decoder, 300), random_tokens(decoder, 300, seed=1)
    full = teacher_force(make_engine(decoder, CacheConfig(attention="full"), 1, 600), prompt, continuation)
    config = CacheConfig(resident=600, prefetch=prefetch)  # type: ignore[arg-type]
    engine = make_engine(decoder, config, 1, 600, SOURCES)
    torch.testing.assert_close(teacher_force(engine, prompt, continuation), full, rtol=1e-3, atol=1e-4)
    stats = stats_of(engine, 599, 299)
    assert stats.fetched_rows == 0, "whatever leaves the ring stays resident while there is room"
    assert stats.hit_rate == 1.0


def test_a_context_that_outgrows_the_set_goes_on(decoder: Decoder) -> None:
    """A prompt that fits entirely, generation far past the set: rows are fetched back from the arena."""
    prompt, continuation = random_tokens(decoder, 50), random_tokens(decoder, 400, seed=1)
    full = teacher_force(make_engine(decoder, CacheConfig(attention="full"), 1, 450), prompt, continuation)
    config = CacheConfig(select_k=32, resident=64, recent=16)
    engine = make_engine(decoder, config, 1, 450)
    logits = teacher_force(engine, prompt, continuation)
    stats = stats_of(engine, 449, 399)
    assert stats.fetched_rows > 0
    window = make_engine(decoder, CacheConfig(select_k=1, resident=1, recent=16), 1, 450)
    dropped = divergence(teacher_force(window, prompt, continuation), full)
    assert divergence(logits, full) < dropped, "64 chosen rows are worth more than one"


@pytest.mark.parametrize(
    ("prefetch", "late"), [("predicted", [0]), ("off", [0, 1, 2, 3]), ("verified", None)]
)
def test_late_rows_are_those_of_layers_that_choose_for_themselves(
    decoder: Decoder, prefetch: str, late: list[int] | None
) -> None:
    config = CacheConfig(select_k=8, resident=8, prefetch=prefetch)  # type: ignore[arg-type]
    engine = make_engine(decoder, config, 1, 350, SOURCES)
    teacher_force(engine, random_tokens(decoder, 300), random_tokens(decoder, 40, seed=1))
    counters = engine.cache.head_counters(0).clone()
    assert engine.late_rows == (None if late is None else 0), "no sequence has ended"
    engine.cache.add_ended(counters)
    assert counters[0, :, 3].sum() > 0 < counters[1, :, 3].sum()
    assert engine.late_rows == (None if late is None else int(counters[late, :, 3].sum()))


@pytest.mark.parametrize("length", [70, 1018, 1536])
def test_a_prompt_in_units_of_any_size_is_as_one_in_whole_chunks(decoder: Decoder, length: int) -> None:
    """Rows, codes and resident sets, and the logits, though no unit ends where a block does."""
    prompt, config = random_tokens(decoder, length), CacheConfig(select_k=8, resident=48)
    whole, cut = (make_engine(decoder, config, 1, 1600) for _ in range(2))
    expected = prefill(whole, 0, prompt, 1600)
    work = cut.prefill(0, prompt, blocks_of(cut, 0, 1600))
    units = itertools.cycle((97, 64, 230))
    logits: Tensor | None = None
    while logits is None:
        tokens, _ = work.unit(next(units) * decoder.layer_flops(1, 0))
        logits = work.advance(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    blocks = torch.tensor([blocks_of(cut, 0, length)])
    for mine, its in zip(cut.cache.sparse_layers, whole.cache.sparse_layers, strict=True):
        rows = (gather_tokens(layer.arena, blocks)[0, :, :length] for layer in (mine, its))
        torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)
        assert isinstance(mine.index, TwoBitIndex) and isinstance(its.index, TwoBitIndex)
        pages = (
            [gather_tokens(part, layer_pages)[0] for part in (index.pages.codes, index.pages.scales)]
            for index, layer_pages in (
                (mine.index, cut.tables(0)[1].unsqueeze(0)), (its.index, whole.tables(0)[1].unsqueeze(0)),
            )
        )  # fmt: skip
        (codes, scales), (other_codes, other_scales) = pages
        differing = codes[:, :length] != other_codes[:, :length]
        assert differing.float().mean() < 1e-3, "an entry between two levels may go either way"
        torch.testing.assert_close(scales[:, :length], other_scales[:, :length], rtol=0.02, atol=1e-3)
        assert torch.equal(mine.resident.positions.sort(-1)[0], its.resident.positions.sort(-1)[0])


def test_a_unit_is_worth_its_launch(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little time is left for it, and however little the model computes."""
    monkeypatch.setitem(LEAST_FLOPS, "cpu", 300 * decoder.layer_flops(1, 0))
    engine = make_engine(decoder, CacheConfig(), 1, 1600)
    units = [
        engine.prefill(0, random_tokens(decoder, 1536), blocks_of(engine, 0, 1600)).unit(f)
        for f in (0.0, 1e18)
    ]
    (least, arithmetic), (most, _) = units
    assert 290 <= least <= 300 and arithmetic >= 290 * decoder.layer_flops(1, 0)
    assert most == 512, "a whole chunk"


def test_a_prompt_that_attends_to_all_blocks_is_as_a_dense_one(decoder: Decoder) -> None:
    prompt = random_tokens(decoder, 1300)
    dense, sparse = (make_engine(decoder, CacheConfig(resident=1400), 1, 1400) for _ in range(2))
    expected = prefill(dense, 0, prompt, 1400)
    attend = partial(attend_prompt_sparse, budget=float, dense_tokens=0, own_tokens=0)
    blocks = blocks_of(sparse, 0, 1400)
    sparse.place(0, blocks)
    work = Prefill(
        decoder, sparse.cache, 0, prompt, blocks, *sparse.tables(0), attention=PromptAttention(attend, float)
    )
    while (logits := work.advance()) is None:
        pass
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prompt_length", [2, 10, 40, 300])
def test_every_resident_row_is_that_of_the_token_it_is_said_to_hold(
    decoder: Decoder, prompt_length: int
) -> None:
    """Shorter than the sinks, than the ring and than the set, and far longer than all."""
    prompt, continuation = random_tokens(decoder, prompt_length), random_tokens(decoder, 30)
    engine = make_engine(decoder, CacheConfig(select_k=8, resident=48, recent=16), 1, 330, SOURCES)
    teacher_force(engine, prompt, continuation)
    length = prompt_length + len(continuation) - 1  # the last token is predicted, not fed
    block_table = torch.tensor([blocks_of(engine, 0, length)])
    for layer in engine.cache.sparse_layers:
        every_row = gather_tokens(layer.arena, block_table)[0]  # [kv_heads, T, 2, head_dim]
        tokens = layer.resident.tokens(0, length)
        for head, positions in enumerate(tokens):
            filled = positions >= 0
            held = positions[filled]
            assert len(held.unique()) == len(held) == min(length, 4 + 16 + 48), "each token once"
            assert torch.equal(layer.resident.rows[0, head, filled], every_row[head, held])


def test_the_gate_saves_selections_and_counts_them(decoder: Decoder) -> None:
    prompt, continuation = random_tokens(decoder, 400), random_tokens(decoder, 50, seed=1)
    reuse = {}
    for gate in (None, 0.5, 0.0):
        engine = make_engine(decoder, CacheConfig(select_k=16, resident=16, gate=gate), 1, 450)
        teacher_force(engine, prompt, continuation)
        stats = stats_of(engine, 449, 49)
        assert stats.gate_checks == stats.head_steps
        assert stats.selected_rows == 16 * stats.selections
        reuse[gate] = stats.reuse_rate
    assert reuse[None] == 0.0
    assert 0.0 < reuse[0.5] < reuse[0.0]


def test_exact_topk_attends_what_it_selects(decoder: Decoder) -> None:
    """With k as large as the context, exact top-k is full attention; with a small k it is not."""
    prompt, continuation = random_tokens(decoder, 300), random_tokens(decoder, 20, seed=1)
    full = teacher_force(make_engine(decoder, CacheConfig(attention="full"), 1, 320), prompt, continuation)
    everything = CacheConfig(attention="topk", select_k=320)
    logits = teacher_force(make_engine(decoder, everything, 1, 320), prompt, continuation)
    torch.testing.assert_close(logits, full, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("attention", "second"), [("topk", 40), ("clo", 21)])
def test_only_sets_that_keep_rows_select_those_after_the_ones_that_weigh_most(
    decoder: Decoder, attention: Attention, second: int
) -> None:
    engine = make_engine(decoder, CacheConfig(attention=attention, select_k=2), 1, 400)
    layer, kv_heads = engine.cache.sparse_layers[0], decoder.shape.kv_heads
    scores = torch.full((1, kv_heads, 400), 1 << 7, dtype=torch.int16)  # rows of no weight but two
    scores[..., 20], scores[..., 40] = 127 << 7, 121 << 7
    batch = Batch(torch.tensor([300]), *(torch.zeros(1, 1, dtype=torch.int64) for _ in range(2)))
    every = torch.ones(1, kv_heads, dtype=torch.bool)
    fetched = layer.update_resident(Scores(scores, sum_runs(scores)), every, batch, 64)
    for head in range(kv_heads):
        entries = fetched.entries[0, head, : fetched.counts[0, head]].long()
        assert layer.resident.positions[0, head, entries].tolist() == [20, second]


def test_a_slot_keeps_nothing_of_its_predecessor(decoder: Decoder) -> None:
    config = CacheConfig(select_k=32, resident=64)
    first, second = random_tokens(decoder, 600), random_tokens(decoder, 200, seed=1)
    fresh = greedy(make_engine(decoder, config, 1, 700), [second], 30)
    used = make_engine(decoder, config, 1, 700)
    greedy(used, [first], 30)
    used.retire(0)
    assert greedy(used, [second], 30) == fresh


def test_two_sequences_go_on_differently_from_blocks_that_they_share(decoder: Decoder) -> None:
    """Both hold the first block of their common prompt, and each one of its own for what follows."""
    block_tokens = decoder.shape.block_tokens
    prompt = random_tokens(decoder, block_tokens + PROMPT_QUERIES)
    ways = [random_tokens(decoder, 20, seed) for seed in (1, 2)]
    total = len(prompt) + 20
    expected = [
        teacher_force(make_engine(decoder, CacheConfig(attention="full"), 1, total), prompt, way)[1:]
        for way in ways
    ]
    engine = make_engine(decoder, CacheConfig(resident=total, select_k=64), 2, total, SOURCES)
    prefill(engine, 0, prompt, total)
    shared, own = blocks_of(engine, 0, total)
    work = engine.prefill(1, prompt, [shared, own + 1], cached=block_tokens)
    while work.advance() is None:
        pass
    engine.activate(1, len(prompt), GREEDY, 0)
    found: list[list[Tensor]] = [[], []]
    for step, pair in enumerate(zip(*(way[:-1] for way in ways), strict=True), 1):
        for slot, token in enumerate(pair):
            engine.feed(slot, token)
        logits = engine.forward(2, len(prompt) + step)
        for slot, rows in enumerate(found):
            rows.append(logits[slot])
    for rows, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.stack(rows), reference, rtol=1e-3, atol=1e-4)
    engine.retire(0)
    engine.check_integrity()
    follow = engine.forward(2, total)[1]
    assert follow.isfinite().all(), "the other one goes on"
    engine.retire(1)
    engine.check_integrity()


@pytest.mark.parametrize("top", [0, 3, 20])
def test_log_probabilities_of_a_vocabulary_smaller_than_asked_for(decoder: Decoder, top: int) -> None:
    """All of it is returned then; another number would end the worker."""
    engine = make_engine(decoder, CacheConfig(attention="full"), 1, 100)
    logits = torch.tensor([0.0, 2.0, 1.0, -torch.inf])
    found = engine.logprob(logits, engine.event(), 2, top)
    expected = logits.log_softmax(-1)
    assert found.logprob == expected[2]
    assert [token for token, _ in found.top] == [1, 2, 0, 3][:top]
    assert [value for _, value in found.top] == [float(expected[token]) for token, _ in found.top]
