"""Dense and sparse prefills of the same prompts, and what follows them with full attention."""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from benchmarks.quality.forcing import Numbers
from benchmarks.quality.metrics import Estimate, blocks, estimate, share_right
from benchmarks.result import Result
from benchmarks.sparse_prefill.context import Attend, Context, divergence
from benchmarks.sparse_prefill.estimators import ESTIMATORS
from benchmarks.tasks import Item
from clo.gpu_worker.model.decoder import Decoder
from clo.kernels.sparse_prompt import (
    DENSE_TOKENS,
    Budget,
    Weigh,
    attend_prompt_sparse,
    default_budget,
)
from clo.kernels.weigh_blocks import weigh_blocks

SHARES = (0.1, 0.2, 0.3)
_DENSITY_UNIT = "of earlier chunks', where blocks are chosen"
COMPARED = 0.2  # of the blocks, for all estimators


class Method(NamedTuple):
    """A sparse prefill; see ``attend_prompt_sparse``."""

    name: str
    budget: Budget
    weigh: Weigh = weigh_blocks
    dense_tokens: int = 0


def share_of(share: float) -> Budget:
    """The same share of any number of blocks."""
    return lambda blocks: share * blocks


def times(factor: float) -> Budget:
    """So many times the default budget."""
    return lambda blocks: factor * default_budget(blocks)


DEFAULT = Method("default", default_budget, dense_tokens=DENSE_TOKENS)
BY_BUDGET = (
    DEFAULT,
    Method("default, at all lengths", default_budget),
    *(Method(f"{factor:g} x the blocks", times(factor), dense_tokens=DENSE_TOKENS) for factor in (0.7, 1.4)),
    *(Method(f"{share:.0%} of blocks", share_of(share)) for share in SHARES),
)
BY_ESTIMATOR = tuple(
    Method(f"{COMPARED:.0%} of blocks, {name}", share_of(COMPARED), weigh)
    for name, weigh in ESTIMATORS.items()
)


class Density:
    """The share of the blocks of earlier chunks that a method may attend to."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._chosen = self._all = 0.0

    def budget(self, blocks: int) -> float:
        """That of the method, noted."""
        count = self._method.budget(blocks)
        self._chosen += count
        self._all += blocks
        return count

    @property
    def share(self) -> float:
        """Where the method chooses at all; 1 where it never does."""
        return self._chosen / self._all if self._all else 1.0


def sparse(method: Method, scale: float, density: Density) -> Attend:
    """The method as an ``Attend`` that notes what it attends to."""

    def attend(layer: int, query: Tensor, rows: Tensor) -> Tensor:
        return attend_prompt_sparse(query, rows, scale, density.budget, method.weigh, method.dense_tokens)[0]

    return attend


class Comparison(NamedTuple):
    """A method's prefill beside the dense one of the same item."""

    full: Tensor  # [N, vocab] log-probabilities at the answer's tokens after a dense prefill
    other: Tensor  # [N, vocab], after the method's
    density: float  # share of the earlier blocks that was attended


def compared(
    decoder: Decoder, context: Context, item: Item, chunk: int, methods: tuple[Method, ...], full: Tensor
) -> Iterator[Comparison]:
    """What each method says about the answer of an item. full: what the dense prefill says."""
    for method in methods:
        density = Density(method)
        first = context.prefill(item.prompt, chunk, sparse(method, decoder.scale, density))
        yield Comparison(full, context.forced(first, item.answer), density.share)


def text_results(case: str, comparisons: list[Comparison]) -> list[Result]:
    """KL and density of one method over several texts."""
    kl = blocks(_stacked([divergence(full, other) for full, other, _ in comparisons]))
    agree = [(full.argmax(-1) == other.argmax(-1)).float() for full, other, _ in comparisons]
    return [
        *_interval(case, "KL(dense || sparse prefill)", estimate(kl), "nats"),
        Result(case, "same top token", float(torch.cat(agree).mean()), "of tokens"),
        Result(case, "blocks attended", mean(each.density for each in comparisons), _DENSITY_UNIT),
    ]


def task_results(case: str, items: list[Item], comparisons: list[Comparison]) -> list[Result]:
    """Right answer tokens of one method over the items of a task, beside those of the dense prefill."""

    def shares(of: Callable[[Comparison], Tensor]) -> Numbers:
        rows = []
        for item, each in zip(items, comparisons, strict=True):
            best = of(each).argmax(-1)
            rows.append((best == torch.tensor(item.answer, device=best.device)).float()[1:])
        return share_right(items, _stacked(rows))

    full, found = shares(lambda each: each.full), shares(lambda each: each.other)
    own, gap = estimate(full), estimate(found - full)
    return [
        Result(case, "right", float(found.mean()), "of answer tokens", own.value),
        *_interval(case, "dense prefill's right", own, "of answer tokens"),
        *_interval(case, "right - dense prefill's", gap, "of answer tokens"),
        Result(case, "blocks attended", mean(each.density for each in comparisons), _DENSITY_UNIT),
    ]


def _interval(case: str, metric: str, of: Estimate, unit: str) -> list[Result]:
    ends = (("", of.value), (", 95% low", of.low), (", 95% high", of.high))
    return [Result(case, metric + end, value, unit) for end, value in ends]


def _stacked(rows: list[Tensor]) -> Numbers:
    """Rows of different lengths with NaN behind the shorter ones."""
    longest = max(len(row) for row in rows)
    figures = numpy.full((len(rows), longest), numpy.nan)
    for target, row in zip(figures, rows, strict=True):
        target[: len(row)] = row.double().cpu().numpy()
    return figures
