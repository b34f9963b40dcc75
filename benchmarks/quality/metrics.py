"""From figures of tokens to means with intervals, and from tokens to right answers."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from benchmarks.quality.forcing import Numbers
from benchmarks.tasks import Item

BLOCK = 16  # successive tokens, which depend on each other: one unit of the bootstrap
_DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def divergences(one: Iterable[Tensor], other: Iterable[Tensor]) -> Numbers:
    """KL(one || other) in nats at each position of logits [items, N, vocab] float32: [items, N]."""
    rows = []
    for a, b in zip(one, other, strict=True):  # item by item, for they are large
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        rows.append((p.exp() * (p - q)).sum(-1).clamp_min(0))  # below 0 it is rounding
    figures: Numbers = torch.stack(rows).double().cpu().numpy()
    return figures


def estimate(figures: Numbers) -> Estimate:
    """The mean of all figures; the interval is a percentile bootstrap (Efron 1979) over units.

    Args:
        figures: [units, any], NaN where there is none; a unit has one at least.
    """
    sums, counts = numpy.nansum(figures, axis=1), (~numpy.isnan(figures)).sum(axis=1)
    draws = numpy.random.default_rng(0).integers(len(figures), size=(_DRAWS, len(figures)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = numpy.percentile(means, (2.5, 97.5))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def blocks(figures: Numbers) -> Numbers:
    """Figures of tokens [items, N] as units of ``BLOCK`` successive tokens of an item: [units, BLOCK]."""
    padding = -figures.shape[1] % BLOCK
    padded = numpy.pad(figures, ((0, 0), (0, padding)), constant_values=numpy.nan).reshape(-1, BLOCK)
    return padded[~numpy.isnan(padded).all(axis=1)]


def share_right(items: list[Item], right: Numbers) -> Numbers:
    """Share of the scored tokens of each item that are right: [items, 1].

    Args:
        right: [items, N], of all tokens of the answers but the first.
    """
    shares = [row[_scored(item, row)].mean() for item, row in zip(items, right, strict=True)]
    return numpy.array(shares)[:, None]


def share_exact(items: list[Item], right: Numbers) -> Numbers:
    """Share of the answers of each item that are right in every token: [items, 1].

    The answers are what greedy decoding would say to the questions: as long as each forced token is also the
    most likely one, both read the same.
    """
    shares = []
    for item, row in zip(items, right, strict=True):
        edges = numpy.flatnonzero(numpy.diff(numpy.pad(_scored(item, row), 1)))
        shares.append(numpy.mean([row[a:b].all() for a, b in zip(edges[::2], edges[1::2], strict=True)]))
    return numpy.array(shares)[:, None]


def _scored(item: Item, row: Numbers) -> numpy.ndarray:
    """Which tokens of a row [N] count: [N] bool."""
    marks = numpy.zeros(len(row), dtype=bool)
    own = item.scored[1 : 1 + len(row)]
    marks[: len(own)] = own
    return marks
