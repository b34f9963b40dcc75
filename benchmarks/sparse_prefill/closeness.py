"""Dense and sparse prefills of the same prompts, and what follows them with full attention."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from benchmarks.quality.forcing import Numbers
from benchmarks.quality.metrics import Estimate, blocks, estimate, share_right
from benchmarks.result import Result
from benchmarks.sparse_prefill.context import Attend, Context, divergence
from benchmarks.sparse_prefill.estimators import ESTIMATORS, counted, densest
from benchmarks.tasks import Item
from clo.gpu_worker.model.decoder import Decoder
from clo.kernels.sparse_prompt import LEAST_WEIGHT, Weigh, attend_prompt_sparse, weigh_blocks

LEAST_WEIGHTS = (0.0005, 0.001, 0.002, 0.004, 0.008)
SHARES = (0.1, 0.2, 0.3)
COMPARED = 0.2  # of the blocks, for all estimators


class Method(NamedTuple):
    """A sparse prefill: the blocks to which ``weigh`` gives at least so much weight."""

    name: str
    weigh: Weigh
    least_weight: float


DEFAULT = Method(f"weight {LEAST_WEIGHT:g}", weigh_blocks, LEAST_WEIGHT)
BY_WEIGHT = tuple(Method(f"weight {least:g}", weigh_blocks, least) for least in LEAST_WEIGHTS)
BY_SHARE = tuple(Method(f"{share:.0%} of blocks", densest(share, weigh_blocks), 0.5) for share in SHARES)
BY_ESTIMATOR = tuple(
    Method(f"{COMPARED:.0%} of blocks, {name}", densest(COMPARED, weigh), 0.5)
    for name, weigh in ESTIMATORS.items()
)


class Density:
    """The share of the blocks of earlier chunks that was attended, for each layer."""

    def __init__(self, layers: int) -> None:
        self._chosen: list[Tensor | float] = [0.0] * layers
        self._all = [0] * layers

    def add(self, layer: int, chosen: Tensor) -> None:
        """chosen: [query_heads, Q, K] bool."""
        self._chosen[layer] = self._chosen[layer] + chosen.sum()
        self._all[layer] += chosen.numel()

    def by_layer(self) -> list[float]:
        pairs = zip(self._chosen, self._all, strict=True)
        return [float(chosen) / every if every else 1.0 for chosen, every in pairs]


def sparse(method: Method, scale: float, density: Density) -> Attend:
    """The method as an ``Attend`` that notes what it attends to."""

    def attend(layer: int, query: Tensor, rows: Tensor) -> Tensor:
        weigh = counted(method.weigh, method.least_weight, partial(density.add, layer))
        return attend_prompt_sparse(query, rows, method.least_weight, scale, weigh)[0]

    return attend


class Comparison(NamedTuple):
    """A method's prefill beside the dense one of the same item."""

    full: Tensor  # [N, vocab] log-probabilities at the answer's tokens after a dense prefill
    other: Tensor  # [N, vocab], after the method's
    density: list[float]  # of each layer


def compared(
    decoder: Decoder, context: Context, item: Item, chunk: int, methods: tuple[Method, ...], full: Tensor
) -> Iterator[Comparison]:
    """What each method says about the answer of an item. full: what the dense prefill says."""
    for method in methods:
        density = Density(decoder.shape.layers)
        first = context.prefill(item.prompt, chunk, sparse(method, decoder.scale, density))
        yield Comparison(full, context.forced(first, item.answer), density.by_layer())


def text_results(case: str, comparisons: list[Comparison], *, layers: bool) -> list[Result]:
    """KL and density of one method over several texts; with ``layers`` the density of each layer too."""
    kl = blocks(_stacked([divergence(full, other) for full, other, _ in comparisons]))
    agree = [(full.argmax(-1) == other.argmax(-1)).float() for full, other, _ in comparisons]
    density = torch.tensor([each.density for each in comparisons]).mean(0)
    by_layer = [
        Result(case, f"blocks attended, layer {number}", share, "of earlier chunks'")
        for number, share in enumerate(density.tolist())
    ]
    return [
        *_interval(case, "KL(dense || sparse prefill)", estimate(kl), "nats"),
        Result(case, "same top token", float(torch.cat(agree).mean()), "of tokens"),
        Result(case, "blocks attended", float(density.mean()), "of earlier chunks'"),
        *(by_layer if layers else []),
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
    density = torch.tensor([each.density for each in comparisons]).mean()
    return [
        Result(case, "right", float(found.mean()), "of answer tokens", own.value),
        *_interval(case, "dense prefill's right", own, "of answer tokens"),
        *_interval(case, "right - dense prefill's", gap, "of answer tokens"),
        Result(case, "blocks attended", float(density), "of earlier chunks'"),
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
