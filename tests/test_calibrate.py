"""What thresholds and sizes cost, and the search for a profile, on made-up costs."""

from pathlib import Path

import torch

from benchmarks.calibrate import GRID, SIZES, Bench, Costs, scaled, solve
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import ModelConfig, Sizes
from clo.runtime.model.files import resolve

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


def test_a_lower_threshold_selects_less_and_a_larger_set_errs_less(tiny_model: Path) -> None:
    decoder = load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))
    tokens = torch.randint(decoder.vocab, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(0)  # draws the tokens whose gradients count
    costs = Bench(decoder, Sizes(8, 32), tokens, [1] * 16).run()  # alike, and so are their queries
    selections, error = costs.selections.sum((1, 2)), costs.error.sum((1, 2))
    assert (costs.selections[0] == 1).all(), "the first threshold selects in every step"
    assert (selections[: len(GRID)].diff() <= 0).all()
    assert selections[len(GRID) - 1] < selections[0]
    of_sizes = dict(zip([(1, 1), *SIZES], [error[0], *error[len(GRID) :]], strict=True))
    assert of_sizes[0.5, 2] < of_sizes[0.5, 1] < of_sizes[0.5, 0.5]
    assert of_sizes[2, 1] < of_sizes[0.5, 1]
