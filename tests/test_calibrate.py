"""The search for a profile, on made-up costs."""

import torch

from benchmarks.calibrate import GRID, SIZES, Costs, scaled, solve
from clo.runtime.config import Sizes

LAYERS, HEADS = 12, 2
KEPT = torch.tensor([1.0] * len(GRID) + [resident for _, resident in SIZES])


def costs_of(seed: int) -> Costs:
    """Random ones: what moves fewer rows errs more."""
    random = torch.Generator().manual_seed(seed)
    options = (len(GRID) + len(SIZES), LAYERS, HEADS)
    rows = 10 * torch.rand(options, generator=random, dtype=torch.float64)
    error = torch.rand(options, generator=random, dtype=torch.float64) / (1 + rows) / KEPT.view(-1, 1, 1)
    return Costs(error, rows, torch.ones_like(rows))


def test_a_profile_meets_its_target_keeps_no_more_and_beats_equal_sizes() -> None:
    for seed in range(10):
        costs = costs_of(seed)
        base = costs.of(torch.zeros(LAYERS, HEADS, dtype=torch.int64))
        choice = solve(costs, float(base.rows.mean()), None)
        found = costs.of(choice)
        assert found.rows.mean() <= base.rows.mean()
        assert KEPT[choice].mean() <= 1
        assert found.error.sum() < base.error.sum()
        for heads in choice:
            assert heads.unique().numel() == 1 or (heads < len(GRID)).all(), "heads of a layer share sizes"


def test_an_error_can_be_the_target() -> None:
    costs = costs_of(0)
    base = costs.of(torch.zeros(LAYERS, HEADS, dtype=torch.int64))
    found = costs.of(solve(costs, None, float(base.error.sum())))
    assert found.error.sum() <= base.error.sum()
    assert found.rows.mean() < base.rows.mean()


def test_sizes_scale() -> None:
    assert scaled(Sizes(128, 1024), (0.25, 2)) == Sizes(32, 2048)
