"""The tail on the CPU: codes of values, its list, and attention to it, each against its definition."""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.layer import LayerCache
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.in_process import make_engine, stats_of, teacher_force
from clo.gpu_worker.model.decoder import load_decoder
from clo.kernels.attend import AttentionState
from clo.kernels.attend_tail import attend_tail
from clo.kernels.blocks import PromptBlocks
from clo.kernels.encode_values import (
    ValuePages,
    decode_values,
    encode_new_values,
    encode_prompt_values,
    encode_values,
    halves_of,
    pack_values,
    unpack_values,
)
from clo.kernels.limits import RUN
from clo.kernels.quantize_query import QuantizedQuery, Rope, quantize_query
from clo.kernels.resident import ResidentSet
from clo.kernels.score import NEVER
from clo.kernels.update_resident import FetchList, update_resident
from clo.runtime.config import CacheConfig, ModelConfig, Prefetch
from clo.runtime.model.files import resolve
from tests.kernel_calls import Shape
from tests.tail_inputs import BLOCK_TOKENS, check_tail, coded, empty_tail, random_tail, tokens_of, with_runs
from tests.test_model import load, save

DIMS = pytest.mark.parametrize("dim", [8, 16, 64, 80, 96, 128, 192, 256])


@DIMS
def test_words_hold_the_levels_of_a_run(dim: int) -> None:
    levels = torch.randint(0, 4, (2, 3 * RUN, dim), dtype=torch.uint8)
    words = pack_values(levels)
    assert words.shape == (2, 3, halves_of(dim), 32, 4)
    assert torch.equal(unpack_values(words, dim), levels)
    run, token, chunk = 1, 11, dim // 8 - 1
    word = int(words[1, run, chunk // 8, 4 * (chunk % 8) + token % 8 // 2, token % 2 + 2 * (token // 8)])
    expected = sum(int(levels[1, run * RUN + token, chunk * 8 + place]) << 2 * place for place in range(8))
    assert word & 0xFFFF == expected


@DIMS
def test_a_code_is_as_long_along_its_value_as_the_value(dim: int) -> None:
    values = torch.randn(500, dim) * torch.logspace(-2, 2, 500).unsqueeze(1)
    levels, scales = encode_values(values)
    decoded = decode_values(levels, scales)
    along = (decoded * values).sum(1) / values.square().sum(1)
    torch.testing.assert_close(along, torch.ones(500), rtol=2e-3, atol=0)
    assert ((decoded - values).norm() / values.norm()).item() < 0.4
    assert encode_values(torch.zeros(3, dim))[1].eq(0).all()


@DIMS
def test_values_of_prompts_and_new_ones_are_encoded_alike(dim: int) -> None:
    kv_heads, tokens = 2, BLOCK_TOKENS + 7
    lines = (4, kv_heads)
    first = ValuePages(
        torch.randint(-99, 99, (*lines, BLOCK_TOKENS // RUN, halves_of(dim), 32, 4), dtype=torch.int16),
        torch.randn(*lines, BLOCK_TOKENS).half(),
    )
    values, table = torch.randn(tokens + 3, kv_heads, dim), torch.tensor([[2, 1], [3, 3]])
    pages = ValuePages(*(part.clone() for part in first))
    for length in range(1, tokens + 1):
        new = torch.stack((values[length + 2], values[0]))
        encode_new_values(new, torch.tensor([length, 0]), table, pages)
    prompts = ValuePages(*(part.clone() for part in first))
    parts = PromptBlocks(
        torch.tensor([3, 2**40, 3 + BLOCK_TOKENS]), torch.tensor([BLOCK_TOKENS, 0, 7]),
        torch.tensor([0, 0, 0]), torch.tensor([2, 2**40, 1]),
    )  # fmt: skip
    encode_prompt_values(values, parts, prompts)
    for page, count in ((2, BLOCK_TOKENS), (1, 7), (0, 0), (3, 0)):
        one, other, held = (unpack_values(each.codes[page], dim) for each in (pages, prompts, first))
        different = one[:, :count] != other[:, :count]
        assert different.float().sum() <= 2, "entries between two levels may go either way"
        assert torch.equal(one[:, count:], held[:, count:]) and torch.equal(other[:, count:], held[:, count:])
        torch.testing.assert_close(pages.scales[page], prompts.scales[page], rtol=5e-3, atol=0)


@pytest.mark.parametrize(("successors", "spread"), [(False, 2), (True, 2), (True, 6)])
def test_the_tail_is_what_weighs_most_and_is_not_resident(successors: bool, spread: int) -> None:
    batch, kv_heads, tokens, capacity, k, runs = 3, 2, 512, 40, 12, 9
    sinks, recent, latest = 4, 20, 21
    rows = torch.zeros(batch, kv_heads, sinks + recent + capacity, 2, 8)
    nowhere = torch.full((batch, kv_heads, capacity), -1, dtype=torch.int32)
    resident = ResidentSet(rows, nowhere.clone(), nowhere, sinks, recent)
    tail, counters = empty_tail(batch, kv_heads, runs), torch.zeros(batch, kv_heads, 6, dtype=torch.int64)
    for step in range(40):
        lengths = torch.tensor([300 + step, 24 + 3 * step, 0])
        weights = (spread * torch.randn(batch, kv_heads, tokens)).exp()
        scores = weights.view(torch.int16)[..., 1::2].contiguous()
        scores[..., :sinks] = NEVER
        reselect, before = torch.rand(batch, kv_heads) < 0.8, resident.positions.clone()
        kept = [part.clone() for part in tail]
        counters.zero_()
        scored = with_runs(scores, lengths, latest)
        update_resident(scored, reselect, lengths, latest, resident, counters, k, tail, successors=successors)
        for line in [(b, h) for b in range(batch) for h in range(kv_heads)]:
            if reselect[line] and lengths[line[0]] > 0:
                check_tail(tail, scores[line], int(lengths[line[0]]), latest, before[line], resident, line)
            else:
                assert all(torch.equal(part[line], old[line]) for part, old in zip(tail, kept, strict=True))


def test_raised_scores_change_the_selection_and_not_what_the_tail_counts() -> None:
    """Where the set held the same rows before."""
    batch, kv_heads, tokens, capacity, k, runs, latest = 2, 2, 512, 40, 20, 9, 21
    scores = (6 * torch.randn(batch, kv_heads, tokens)).exp().view(torch.int16)[..., 1::2].contiguous()
    lengths, every = torch.tensor([tokens, 200]), torch.ones(batch, kv_heads, dtype=torch.bool)
    scored = with_runs(scores, lengths, latest)
    held = torch.stack([torch.randperm(170)[:capacity].int() for _ in range(batch * kv_heads)])
    results = []
    for successors in (False, True):
        rows = torch.zeros(batch, kv_heads, 24 + capacity, 2, 8)
        positions = held.view(batch, kv_heads, capacity).clone()
        resident = ResidentSet(rows, positions, torch.zeros_like(positions), 4, 20)
        tail, counters = empty_tail(batch, kv_heads, runs), torch.zeros(batch, kv_heads, 6, dtype=torch.int64)
        update_resident(scored, every, lengths, latest, resident, counters, k, tail, successors=successors)
        results.append((tail, counters, resident))
    (tail, counters, plain), (other_tail, other_counters, raised) = results
    assert not torch.equal(plain.positions, raised.positions)
    assert torch.equal(tail.runs, other_tail.runs) and torch.equal(tail.counts, other_tail.counts)
    others = [0, 1, 2, 4, 5]  # all but the rows to fetch
    assert torch.equal(counters[..., others], other_counters[..., others]) and counters[..., 5].min() > 0


@pytest.mark.parametrize("shape", [Shape(64, 3, 3, torch.float32), Shape(80, 2, 5, torch.float32)])
def test_attention_to_the_tail_is_that_to_what_its_codes_say(shape: Shape) -> None:
    batch, tokens, scale = 3, 10 * BLOCK_TOKENS, shape.head_dim**-0.5
    index = coded(shape, batch, tokens)
    query = torch.randn(batch, shape.kv_heads * shape.group, shape.head_dim)
    lengths, lse = (
        torch.tensor([tokens, tokens, tokens - 5]),
        torch.randn(batch, shape.kv_heads * shape.group),
    )
    quantized = quantize_query(query, index.pages, index.rotation, lse, lengths, index.page_table, scale)
    tail = random_tail(batch, shape.kv_heads, 11, tokens)
    parts = (batch, shape.kv_heads, 3, shape.group)
    state = AttentionState(torch.ones(*parts, shape.head_dim), torch.ones(parts), torch.ones(parts))
    attend_tail(state, quantized, index.pages, index.values, tail, lengths, index.page_table, lse, scale)
    assert all(part[:, :, :2].eq(1).all() for part in state), "the other parts are not its own"
    counted = tokens_of(tail, tokens).bool()
    grouped = query.view(batch, shape.kv_heads, shape.group, -1)
    scores = grouped @ index.keys.transpose(-1, -2) * scale
    scores = scores.masked_fill(~counted.unsqueeze(2), -torch.inf)
    lines = counted.any(-1)
    assert state.sum[:, :, 2][~lines].eq(0).all() and state.max[:, :, 2][~lines].eq(-torch.inf).all()
    found = state.max[:, :, 2] + state.sum[:, :, 2].log() - tail.boosts.unsqueeze(2) * math.log(2)
    torch.testing.assert_close(found[lines], scores.logsumexp(-1)[lines], rtol=0, atol=0.02)
    expected = scores.softmax(-1) @ index.attended
    torch.testing.assert_close(state.out[:, :, 2][lines], expected[lines], rtol=0, atol=0.03)


class CountingLayer(LayerCache):
    """Counts how many times each token is attended to, after every attention."""

    seen: ClassVar[list[Tensor]] = []  # [kv_heads, length] of all layers and steps

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        batch: Batch,
        fetch_list: FetchList | None,
        begun: AttentionState | None = None,
        *,
        select: bool,
    ) -> Tensor:
        out = super().attend(query, kv, batch, fetch_list, begun, select=select)
        assert self.state.tail is not None
        length = int(batch.lengths[0])
        counted = tokens_of(self.state.tail.slots(1), length)[0]
        resident = self.resident.tokens(0, length)
        counted.scatter_add_(1, resident.clamp_min(0), (resident >= 0).long())
        self.seen.append(counted)
        return out


class CheckedLayer(LayerCache):
    """Compares the query that begins to attend to the tail with the one that attends to the rows."""

    before_rope: ClassVar[list[bool]] = []  # of all tails that have begun

    def __init__(self, *args: Any) -> None:  # those of ``LayerCache``
        super().__init__(*args)
        self._begun: QuantizedQuery | None = None

    def begin_tail(self, query: Tensor, batch: Batch, rope: Rope | None = None) -> AttentionState:
        self._begun = self._quantized(query, batch, rope)
        self.before_rope.append(rope is not None)
        return super().begin_tail(query, batch, rope)

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        batch: Batch,
        fetch_list: FetchList | None,
        begun: AttentionState | None = None,
        *,
        select: bool,
    ) -> Tensor:
        own = self._quantized(query, batch, None)
        out = super().attend(query, kv, batch, fetch_list, begun, select=select)
        if not select:
            assert self._begun is not None
            assert (self._begun.integers.int() - own.integers).abs().max() <= 1
            torch.testing.assert_close(self._begun.steps, own.steps, rtol=1e-5, atol=0)
        return out

    def _quantized(self, query: Tensor, batch: Batch, rope: Rope | None) -> QuantizedQuery:
        assert isinstance(self.index, TwoBitIndex)
        return self.index.prepare(query, self.state.lse[: len(query)], batch, rope)


@pytest.mark.parametrize(("name", "waits"), [("llama-biases-yarn", False), ("qwen3-tied", True)])
def test_the_tail_is_attended_with_the_layers_own_query_whether_or_not_it_waits_for_rope(
    tmp_path: Path, name: str, waits: bool
) -> None:
    decoder = load(save(name, tmp_path))
    config = CacheConfig(select_k=8, resident=48, recent=16, tail=200, prefetch="predicted")
    sources = (QuerySource.OWN, QuerySource.INPUT, QuerySource.MIDDLE)
    prompt, continuation = (torch.randint(0, decoder.vocab, (count,)).tolist() for count in (300, 21))
    engine = make_engine(decoder, config, 1, 321, sources, CheckedLayer)
    CheckedLayer.before_rope.clear()
    teacher_force(engine, prompt, continuation)
    assert CheckedLayer.before_rope == [not waits] * 20 * 2, "in every step two of three layers prefetch"


@pytest.mark.parametrize("gate", [None, 0.7])
@pytest.mark.parametrize("prefetch", ["off", "predicted", "verified"])
@pytest.mark.parametrize("tail", [64, 1000])
def test_no_token_is_ever_counted_twice_and_none_is_left_out_where_there_is_room(
    tiny_model: Path, tail: int, prefetch: Prefetch, gate: float | None
) -> None:
    """Over 200 steps, in which tokens leave the ring, enter the set and leave it again."""
    decoder = load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))
    config = CacheConfig(select_k=8, resident=48, recent=16, tail=tail, prefetch=prefetch, gate=gate)
    prompt, continuation = (torch.randint(0, decoder.vocab, (count,)).tolist() for count in (300, 201))
    sources = (QuerySource.OWN, QuerySource.INPUT, QuerySource.MIDDLE, QuerySource.INPUT)
    engine = make_engine(decoder, config, 1, 501, sources, CountingLayer)
    CountingLayer.seen.clear()
    teacher_force(engine, prompt, continuation)
    assert len(CountingLayer.seen) == 200 * len(engine.cache.layers)
    for counted in CountingLayer.seen:
        assert counted.max() == 1
        if tail == 1000 and gate is None:
            # a predicted selection knows no score of the token that is about to leave the ring
            others = torch.arange(counted.shape[1]) != counted.shape[1] - 17
            assert counted[:, others].min() == 1
    stats = stats_of(engine, 500, 200)
    assert 0 < stats.tail_share < 1
    assert (stats.dropped_share < 1e-3) == (tail == 1000)
