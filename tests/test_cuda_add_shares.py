"""The sum of all ranks' shares by its kernel, with the ranks as streams of one GPU."""

import pytest
import torch
from torch import Tensor

from clo.kernels.add_shares import MOST_BLOCKS
from tests.meetings import add_up, expected, places

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}


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
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    graphs = []
    for rank, stream in enumerate(streams):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream, capture_error_mode="thread_local"):
            found[rank] = add_up(rank, memory[rank], states[rank], weight, given[rank])
    for _ in range(3):
        for state in states:
            state.copy_(hidden)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        right = expected(hidden, weight, given)
        for rank in range(ranks):
            for number, norm in enumerate(found[rank]):
                assert torch.equal(norm, found[0][number]), "all ranks have the same"
                torch.testing.assert_close(
                    norm.float(), right[number], rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
                )
