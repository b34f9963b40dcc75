"""Ranks that leave their shares of a sum where all of them read, as threads of a process."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.meetings import add_up, expected, places

ROWS, WIDTH, SUMS = 5, 64, 30


@pytest.mark.parametrize("blocks", [ROWS, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_add_up_what_all_of_them_have(ranks: int, blocks: int) -> None:
    """However long one is late, and nobody's share is overwritten before it is read."""
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH)
    given = [[torch.randn(ROWS - number % 2, WIDTH) for number in range(SUMS)] for _ in range(ranks)]
    memory = places(ranks, ROWS, WIDTH, torch.float32, "cpu", blocks)

    def late(rank: int) -> list[torch.Tensor]:
        found, state = [], hidden.clone()
        draw = random.Random(rank)
        for number, share in enumerate(given[rank]):
            time.sleep(draw.choice((0.0, 0.0, 0.002)))
            turn = memory[rank][number % 2 :] + memory[rank][: number % 2]
            found += add_up(rank, turn, state, weight, [share])
        return found

    with ThreadPoolExecutor(ranks) as threads:
        everyone = list(threads.map(late, range(ranks)))
    for found in everyone:
        for mine, first, right in zip(found, everyone[0], expected(hidden, weight, given), strict=True):
            assert torch.equal(mine, first), "all ranks have the same"
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
