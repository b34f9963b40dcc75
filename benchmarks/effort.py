"""How many runs of the tail would do, if each head took as many as it needs: on a real model and real text.

    python -m benchmarks.effort

Keys and queries are those of ``benchmarks.indexes``. The resident rows of a head are those that the prompt's
last queries weigh most, as where a prompt ends. What is left is summed for each run of 16 tokens, from true
weights; the tail has the runs with the largest sums. Twilight (Lin et al. 2025) takes as many rows for each
head as hold a given share of its weight; here that is asked of the tail.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.indexes import LENGTH, exact, prompts, weights
from benchmarks.result import Result, write
from clo.kernels.limits import RUN
from clo.runtime.config import CacheConfig

CONFIG = CacheConfig()
RUNS = CONFIG.tail_tokens(LENGTH) // RUN
RESIDENT = CONFIG.sizes(LENGTH, 1)[0].resident
ENOUGH = 0.95  # of what the whole tail holds


def run_sums() -> Iterator[Tensor]:
    """For each layer and prompt, what weighs beside the resident rows, as a share of all attention: [heads *
    queries, runs], the largest first."""
    for queries, keys, group in (prompt for layer in prompts() for prompt in layer):
        dim = keys.shape[2]
        true = weights(exact(keys)(queries), group, dim) / group
        resident = true.sum(1, keepdim=True).topk(RESIDENT, dim=2).indices
        rest = true.scatter(2, resident.expand(-1, true.shape[1], -1), 0.0)
        rest = rest[..., : rest.shape[2] // RUN * RUN]
        yield rest.unflatten(2, (-1, RUN)).sum(3).flatten(0, 1).sort(1, descending=True).values


def main() -> None:
    sums = torch.cat(list(run_sums()))
    left, tail = sums.sum(1), sums[:, :RUNS].sum(1)
    needed = (sums[:, :RUNS].cumsum(1) < ENOUGH * tail.unsqueeze(1)).sum(1) + 1
    results = [
        Result("beside the resident rows", "mean", float(left.mean()), "of attention"),
        Result("beside the resident rows", "median", float(left.median()), "of attention"),
        Result("beside the resident rows", "below .01", float((left < 0.01).float().mean()), "of heads"),
        Result(f"tail of {RUNS} runs", "weight", float(tail.sum() / left.sum()), "of what is left"),
    ]
    for share in (0.1, 0.5, 0.9):
        value = float(needed.float().quantile(share))
        results.append(Result(f"runs for {ENOUGH} of the tail", f"p{round(100 * share)}", value, "runs"))
    results.append(Result(f"runs for {ENOUGH} of the tail", "mean", float(needed.float().mean()), "runs"))
    write("effort", results)


if __name__ == "__main__":
    main()
