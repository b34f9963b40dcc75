"""The quality benchmark: what it computes from figures, and the default cache's bar on real text."""

from pathlib import Path

import numpy
import pytest

from benchmarks.quality.__main__ import probe
from benchmarks.quality.forcing import FULL, Reference
from benchmarks.quality.metrics import BLOCK, blocks, estimate, share_exact, share_right
from benchmarks.quality.report import figures_of, results_of, tables_of
from benchmarks.quality.ruler import Ruler, ruler_item
from benchmarks.quality.settings import DEFAULT, Setting, parse_setting
from benchmarks.tasks import Item, documents, make_item
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

BAR = 0.02  # nats


def letters(text: str) -> list[int]:
    """A token for each character."""
    return list(text.encode())


def test_an_interval_holds_the_mean_and_narrows_with_more_units() -> None:
    figures = numpy.random.default_rng(1).normal(3.0, 1.0, (400, 5))
    few, many = estimate(figures[:25]), estimate(figures)
    for part in (few, many):
        assert part.low < part.value < part.high
        assert part.low < 3.0 < part.high
    assert many.value == pytest.approx(figures.mean())
    assert many.high - many.low < (few.high - few.low) / 2
    assert estimate(figures) == many


def test_an_interval_of_equal_units_is_a_point() -> None:
    alike = estimate(numpy.full((7, 3), 0.25))
    assert (alike.value, alike.low, alike.high) == (0.25, 0.25, 0.25)


def test_tokens_that_depend_on_each_other_count_as_one_unit() -> None:
    """One draw per unit and the same figure for all its tokens: as wide as the units alone."""
    units = numpy.random.default_rng(2).normal(size=(50, 1))
    repeated = estimate(numpy.repeat(units, BLOCK, axis=1))
    alone = estimate(units)
    assert repeated.low == pytest.approx(alone.low)
    assert repeated.high == pytest.approx(alone.high)


def test_blocks_do_not_mix_items_and_leave_out_what_is_no_figure() -> None:
    figures = numpy.full((2, BLOCK + 3), numpy.nan)
    figures[0] = 1.0
    figures[1, :2] = 2.0
    found = blocks(figures)
    assert found.shape == (3, BLOCK)
    assert numpy.nanmin(found, axis=1).tolist() == numpy.nanmax(found, axis=1).tolist() == [1.0, 1.0, 2.0]
    assert estimate(found).value == pytest.approx((BLOCK + 3 + 4) / (BLOCK + 5))


def test_shares_count_scored_tokens_and_whole_answers() -> None:
    """Two answers of two tokens; of the second item the last one lies beyond what was forced."""
    scored = [False, True, True, False, True, True]
    items = [Item([1], [0] * 6, scored)] * 2
    right = numpy.array([[1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    assert share_right(items, right).tolist() == [[0.75], [0.75]]
    assert share_exact(items, right).tolist() == [[0.5], [0.5]]
    assert share_exact(items, right[:, :4]).tolist() == [[1.0], [0.5]]


@pytest.mark.parametrize("kind", ["lookup", "track", "count", "list", "copy"])
def test_a_task_repeats_by_its_seed_and_fits(kind: Ruler) -> None:
    text = letters("What stands here is of no use to any question. " * 400)
    item = ruler_item(kind, text, 6000, 3, letters)
    assert item == ruler_item(kind, text, 6000, 3, letters)
    assert item.prompt != ruler_item(kind, text, 6000, 4, letters).prompt
    assert 5000 < len(item.prompt) <= 6000
    assert len(item.answer) == len(item.scored)
    prompt, answer = bytes(item.prompt).decode(), bytes(item.answer).decode()
    marked = "".join(character for character, scored in zip(answer, item.scored, strict=True) if scored)
    assert all(word.strip(".") in prompt for word in marked.split())


def test_counted_words_stand_more_often_than_others() -> None:
    item = ruler_item("count", [], 6000, 0, letters)
    lines = [line.split(". ")[1] for line in bytes(item.prompt).decode().splitlines() if ". " in line[:6]]
    asked = [line.split(". ")[1] for line in bytes(item.answer).decode().strip().splitlines()]
    times = {word: lines.count(word) for word in lines}
    assert len(asked) == 10
    assert min(times[word] for word in asked) > max(times[word] for word in times if word not in asked)


def test_settings_by_text() -> None:
    assert parse_setting("k=64,tail=32,gate=.9").config == CacheConfig(select_k=64, tail=32, gate=0.9)
    assert parse_setting("C=2048,prefetch=off").config == CacheConfig(resident=2048, prefetch="off")
    for wrong in ("k=64,c=1", "prefetch=no", "k"):
        with pytest.raises(ValueError):
            parse_setting(wrong)


def test_full_attention_by_steps_is_the_pass_over_all_tokens(tiny_model: Path) -> None:
    """Items of unequal prompts, one of whose answers ends before the other, as slots of one engine."""
    decoder = load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))
    text = letters("What stands here is of no use to any question. " * 50)
    items = [ruler_item("count", text, 1500, 0, letters), ruler_item("lookup", text, 1300, 1, letters)]
    reference = Reference(decoder, items, tokens=200)
    assert len(items[0].answer) < reference.steps
    rows = {}
    for setting in (
        Setting("full, by steps", FULL),
        Setting("small", CacheConfig(select_k=8, resident=32, tail=0)),
    ):
        engine = reference.engine(setting.config)
        scores = reference.force(engine)
        forced = len(items[0].answer) - 1 + reference.steps
        assert numpy.isfinite(scores.kl).sum() == numpy.isfinite(scores.loss).sum() == forced
        rows[setting.name] = figures_of("count", 1500, setting, reference, scores, engine.cache)
    exact, small = rows.values()
    assert abs(exact.kl.value) < 1e-5
    assert exact.agree.value == 1.0
    assert exact.right is not None
    assert exact.right.cache == exact.right.full.value
    assert small.kl.value > 0.01
    assert small.right is not None
    assert small.right.gap.low <= small.right.cache - small.right.full.value <= small.right.gap.high
    assert 0 < small.rows <= 8
    figures = list(rows.values())
    cases = {result.case for result in results_of(figures, {"small": 0.5})}
    assert cases == {"prefetch/small", *(f"count/1500/{name}" for name in rows)}
    assert tables_of("tiny", 200, figures, {"small": 0.5}).count("| count |") == len(rows)


def test_without_prefetching_all_that_is_fetched_comes_late(tiny_model: Path) -> None:
    decoder = load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))
    text = letters("What stands here is of no use to any question. " * 50)
    reference = Reference(decoder, [ruler_item("lookup", text, 1300, 1, letters)], tokens=40)
    off = Setting("off", CacheConfig(select_k=8, resident=32, prefetch="off"))
    engine = reference.engine(off.config)
    fetched = figures_of("text", 1300, off, reference, reference.force(engine), engine.cache).rows
    assert float(probe(reference, off).late.mean()) == pytest.approx(fetched, rel=0.05)
    whole = Setting("whole", CacheConfig(select_k=8, resident=2048, prefetch="off"))
    assert not probe(reference, whole).late.any()


def test_the_default_cache_stays_within_its_bar(smollm2: Path) -> None:
    decoder = load_decoder(resolve(ModelConfig(device="cpu")))
    tokenizer = Tokenizer(smollm2, decoder.vocab)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**9, continues=True)

    reference = Reference(decoder, [make_item("text", documents(encode)[0], 1200, 0, encode)], tokens=48)
    rows = []
    for setting in (DEFAULT, Setting("small", CacheConfig(select_k=32, resident=256))):
        engine = reference.engine(setting.config)
        rows.append(figures_of("text", 1200, setting, reference, reference.force(engine), engine.cache))
    default, small = rows
    assert default.kl.value <= BAR
    assert default.kl.value < small.kl.value
    assert 0 < default.rows < 0.1 * DEFAULT.config.sizes(1248, 1)[0].select_k
