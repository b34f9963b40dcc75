"""Figures of one setting over the items of one kind, as results and as tables."""

import math
from dataclasses import dataclass

import numpy
import torch

from benchmarks.quality.forcing import Numbers, Reference, Scores
from benchmarks.quality.metrics import BLOCK, Estimate, blocks, estimate, share_exact, share_right
from benchmarks.quality.ruler import COPIED
from benchmarks.quality.settings import Setting
from benchmarks.result import Result
from clo.gpu_worker.cache.kv_cache import KVCache


@dataclass(frozen=True)
class Answers:
    """Mean shares over items, full attention's own, and the mean difference over the same items."""

    cache: float
    full: Estimate
    gap: Estimate


@dataclass(frozen=True)
class Figures:
    """Means over all tokens forced by decode steps. Rows are per step and KV head; bytes are per token, and
    those of 16-bit rows, whatever the run's own dtype."""

    kind: str
    length: int
    setting: str
    items: int
    kl: Estimate
    agree: Estimate
    loss: Estimate
    full_loss: float
    rows: float
    kib: float
    hits: float  # of selected rows, those that were resident
    right: Answers | None  # of answer tokens; None for text
    exact: Answers | None  # of answers


def figures_of(
    kind: str, length: int, setting: Setting, reference: Reference, scores: Scores, cache: KVCache
) -> Figures:
    """What ``cache`` did and how well, since its engine was made."""
    items, full, shape = reference.items, reference.full, cache.shape
    steps = int(numpy.isfinite(scores.kl).sum())
    counters = torch.stack([cache.counters(slot) for slot in range(len(items))])
    _, _, selected, fetched, *_ = counters.sum(0).tolist()
    rows = (selected if setting.whole else fetched) / (steps * shape.layers * shape.kv_heads)
    right = exact = None
    if kind != "text":
        right = _answers(share_right(items, scores.right), share_right(items, full.right))
        exact = _answers(share_exact(items, scores.right), share_exact(items, full.right))
    return Figures(
        kind, length, setting.name, len(items), estimate(blocks(scores.kl)), estimate(blocks(scores.agree)),
        estimate(blocks(scores.loss)), estimate(full.loss).value, rows,
        rows * shape.token_bytes * 2 / shape.dtype.itemsize / 1024,
        1 - fetched / max(1, selected), right, exact,
    )  # fmt: skip


def _answers(cache: Numbers, full: Numbers) -> Answers:
    return Answers(float(cache.mean()), estimate(full), estimate(cache - full))


def results_of(figures: list[Figures], late: dict[str, float]) -> list[Result]:
    """Every figure; an interval is two results more. late: rows that come too late, by setting."""
    results = [
        Result(f"prefetch/{setting}", "too late", rows, "rows per step and head")
        for setting, rows in late.items()
    ]
    for row in figures:
        case = f"{row.kind}/{row.length}/{row.setting}"

        def interval(metric: str, of: Estimate, unit: str, case: str = case) -> list[Result]:
            ends = (("", of.value), (", 95% low", of.low), (", 95% high", of.high))
            return [Result(case, metric + end, value, unit) for end, value in ends]

        results += interval("KL(full || cache)", row.kl, "nats")
        results += interval("same top token", row.agree, "of tokens")
        results += [
            Result(case, "loss", row.loss.value, "nats", row.full_loss, row.loss.value / row.full_loss),
            Result(case, "rows moved", row.rows, "per step and head"),
            Result(case, "KiB moved", row.kib, "per token"),
            Result(case, "hit rate", row.hits, "of selected rows"),
        ]
        for metric, unit, answers in (
            ("right", "of answer tokens", row.right),
            ("exact", "of answers", row.exact),
        ):
            if answers is not None:
                own = answers.full.value
                ratio = answers.cache / own if own else None
                results.append(Result(case, metric, answers.cache, unit, own, ratio))
                results += interval(f"full's {metric}", answers.full, unit)
                results += interval(f"{metric} - full's", answers.gap, unit)
    return results


def tables_of(model: str, tokens: int, figures: list[Figures], late: dict[str, float]) -> str:
    """Markdown. late: as in ``results_of``."""
    text = ["tokens", "cache", "KL to full (nats)", "same top token", "perplexity", "ratio to full's",
            "rows moved per step and head", "KiB moved per token", "hit rate"]  # fmt: skip
    tasks = ["tokens", "task", "items", "cache", "tokens right", "full's", "difference", "answers right",
             "full's", "difference", "KL to full (nats)"]  # fmt: skip
    parts = [
        f"# {model}: what a cache loses against full attention, and what it moves",
        f"Made by `python -m benchmarks.quality`. Of each answer {tokens} tokens at most are forced by "
        f"decode steps, of a copied passage {COPIED}. In brackets are 95 % intervals: for text a bootstrap "
        f"over blocks of {BLOCK} successive tokens, for answers over items, paired for the differences.",
        "## Text",
        _table(text, [_text_line(row) for row in figures if row.right is None]),
        "Rows per step and head that a layer's own query wants and that are neither resident nor on their "
        f"way, at the longest text: {', '.join(f'{rows:.2f} ({name})' for name, rows in late.items())}.",
        "## Tasks",
        "Shares over the items, of the answers' tokens that are right and of whole answers that are, beside "
        "full attention's own on the same items.",
        _table(tasks, [_task_line(row, row.right, row.exact) for row in figures if row.right and row.exact]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def _text_line(row: Figures) -> list[str]:
    ratio = math.exp(row.loss.value - row.full_loss)
    return [
        str(row.length), row.setting, _bracketed(row.kl, ".5f"), _bracketed(row.agree, ".3f"),
        f"{math.exp(row.loss.value):.3f}", f"{ratio:.4f}", f"{row.rows:.1f}", f"{row.kib:.0f}",
        f"{row.hits:.3f}",
    ]  # fmt: skip


def _task_line(row: Figures, right: Answers, exact: Answers) -> list[str]:
    shares = []
    for answers in (right, exact):
        shares += [f"{answers.cache:.3f}", _bracketed(answers.full, ".3f"), _bracketed(answers.gap, "+.3f")]
    return [str(row.length), row.kind, str(row.items), row.setting, *shares, f"{row.kl.value:.5f}"]


def _bracketed(of: Estimate, form: str) -> str:
    return f"{of.value:{form}} [{of.low:{form}}, {of.high:{form}}]"
