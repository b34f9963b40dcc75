"""The quality benchmark: what it computes from figures, and the default cache's bar on real text."""

from pathlib import Path

import numpy
import pytest

from benchmarks.quality.forcing import FULL, Reference
from benchmarks.quality.metrics import BLOCK, blocks, estimate, share_exact, share_right
from benchmarks.quality.report import figures_of, results_of, tables_of
from benchmarks.quality.ruler import Ruler, ruler_item
from benchmarks.quality.settings import DEFAULT, Setting, parse_setting
from benchmarks.tasks import Item, documents, make_item
from gpu_worker.loader import load_decoder, resolve
from runtime.config import CacheConfig, ModelConfig
from runtime.messages import Text
from runtime.text import Tokenizer

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


@pytest.mark.parametrize("kind", ["lookup", "track", "count", "list"])
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
    assert parse_setting("k=64,gate=.9").config == CacheConfig(select_k=64, gate=0.9, prefetch="off")
    assert parse_setting("C=2048,prefetch=accept").config == CacheConfig(resident=2048, prefetch="accept")
    for wrong in ("k=64,c=1", "prefetch=no", "k"):
        with pytest.raises(ValueError):
            parse_setting(wrong)


def test_the_default_cache_stays_within_its_bar(smollm2: Path) -> None:
    """One document, and one task as a second prompt of another length."""
    decoder = load_decoder(resolve(ModelConfig(device="cpu")))
    tokenizer = Tokenizer(smollm2, decoder.vocab)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**9, add_special_tokens=False)

    text = documents(encode)[0]
    items = [make_item("text", text, 1200, 0, encode), ruler_item("lookup", text, 1100, 0, encode)]
    reference = Reference(decoder, items, tokens=48)
    small = Setting("small", CacheConfig(select_k=32, resident=256))
    rows = {}
    for setting in (Setting("full, by steps", FULL), DEFAULT, small):
        engine = reference.engine(setting.config)
        scores = reference.force(engine)
        rows[setting.name] = figures_of("lookup", 1200, setting, reference, scores, engine.cache)
    exact, default, small_set = rows.values()
    assert abs(exact.kl.value) < 1e-5
    assert exact.agree.value == 1.0
    assert default.kl.value <= BAR
    assert default.kl.value < small_set.kl.value
    assert 0 < default.rows < 0.1 * DEFAULT.config.select_k
    assert default.right is not None
    assert default.right.gap.low <= default.right.cache - default.right.full <= default.right.gap.high
    results = results_of(list(rows.values()))
    assert {result.case for result in results} == {f"lookup/1200/{name}" for name in rows}
    assert tables_of("model", 48, list(rows.values())).count("| lookup |") == len(rows)
