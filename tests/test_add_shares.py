"""Ranks that leave their shares of a sum where all of them read, as threads of a process."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.meetings import add_up, expected, places, take_all

ROWS, WIDTH, SUMS = 5, 64, 30


def together(work: Callable[[int], list[torch.Tensor]], ranks: int) -> list[list[torch.Tensor]]:
    """What each rank finds, in a thread of its own."""
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(work, range(ranks)))


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

    everyone = together(late, ranks)
    for found in everyone:
        for mine, first, right in zip(found, everyone[0], expected(hidden, weight, given), strict=True):
            assert torch.equal(mine, first), "all ranks have the same"
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ranks", "sources"), [(1, 1), (2, 1), (2, 2), (4, 3)])
def test_ranks_take_what_the_first_ones_leave(ranks: int, sources: int) -> None:
    """Time and again from the same memory, between sums, whoever is late."""
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH)
    given = [[torch.randn(ROWS, WIDTH) for _ in range(SUMS)] for _ in range(ranks)]
    memory = places(ranks, ROWS, WIDTH, torch.float32, "cpu")

    def late(rank: int) -> list[torch.Tensor]:
        found, draw = [], random.Random(rank)
        for number, share in enumerate(given[rank]):
            time.sleep(draw.choice((0.0, 0.0, 0.002)))
            found.append(take_all(rank, memory[rank][0], share, sources))
            if number % 3 == 2:
                add_up(rank, memory[rank], hidden.clone(), weight, [share, share])
        return found

    for found in together(late, ranks):
        for taken, *shares in zip(found, *given, strict=True):
            assert torch.equal(taken, torch.stack(shares[:sources]))
