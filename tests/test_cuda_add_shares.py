"""What ranks add up and take from one another by kernels, with the ranks as streams of one GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clo.kernels.meeting import MOST_BLOCKS
from tests.meetings import add_up, expected, places, take_all

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


def captured(
    ranks: int, work: Callable[[int], list[Tensor]]
) -> tuple[Callable[[], None], list[list[Tensor]]]:
    """What lets all ranks do their work at the same time, a graph each, and what each of them then finds."""
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(ranks)]
    found: list[list[Tensor]] = []
    for rank, (graph, stream) in enumerate(zip(graphs, streams, strict=True)):
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found.append(work(rank))

    def replay() -> None:
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()

    return replay, found


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (24, 4096, torch.bfloat16),
        (MOST_BLOCKS // 4, 8192, torch.float16),
        (3, 576, torch.bfloat16),
        (7, 16 * 1024, torch.float32),
        (2, 8, torch.float32),
        (5 * MOST_BLOCKS + 3, 4096, torch.bfloat16),
    ],
)
def test_ranks_add_up_what_all_of_them_have(ranks: int, rows: int, width: int, dtype: torch.dtype) -> None:
    """Many sums by graphs, whose kernels run at the same time and wait for one another."""
    hidden = torch.randn(rows, width, device="cuda").to(dtype)
    weight = torch.randn(width, device="cuda").to(dtype)
    # those of an even number, as the places take turns over replays, too
    given = [
        [torch.randn(rows - number % 2, width, device="cuda").to(dtype) / 4 for number in range(8)]
        for _ in range(ranks)
    ]
    memory = places(ranks, rows, width, dtype, "cuda")
    states = [hidden.clone() for _ in range(ranks)]
    replay, found = captured(
        ranks, lambda rank: add_up(rank, memory[rank], states[rank], weight, given[rank])
    )
    for _ in range(3):
        for state in states:
            state.copy_(hidden)
        replay()
        right = expected(hidden, weight, given)
        for rank in range(ranks):
            for number, norm in enumerate(found[rank]):
                assert torch.equal(norm, found[0][number]), "all ranks have the same"
                torch.testing.assert_close(
                    norm.float(), right[number], rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
                )


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 1000), (24, 32064)])
@pytest.mark.parametrize(("ranks", "sources"), [(1, 1), (2, 1), (2, 2), (3, 3)])
def test_ranks_take_what_the_first_ones_leave(ranks: int, sources: int, rows: int, width: int) -> None:
    """Time and again from the same memory, between sums."""
    given = [[torch.randn(rows, width, device="cuda") for _ in range(6)] for _ in range(ranks)]
    weight, memory = torch.ones(width, device="cuda"), places(ranks, rows, width, torch.float32, "cuda")

    def work(rank: int) -> list[Tensor]:
        taken = []
        for number, share in enumerate(given[rank]):
            taken.append(take_all(rank, memory[rank][0], share, sources))
            if number % 3 == 2:
                add_up(rank, memory[rank], share.clone(), weight, [share, share])
        return taken

    replay, found = captured(ranks, work)
    for _ in range(3):
        for shares in given:
            for share in shares:
                share.normal_()
        replay()
        for rank in range(ranks):
            for taken, *shares in zip(found[rank], *given, strict=True):
                assert torch.equal(taken, torch.stack(shares[:sources]))
