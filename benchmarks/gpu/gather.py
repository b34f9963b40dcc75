"""gather/N: N rows a head of 12 sequences x 8 heads x 32K, one layer after another, fresh rows each time.

What the same kernel reaches on rows that follow one another is a second ceiling: the copy engine asks for
larger pieces than any kernel does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import graph_of, seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import Model, arena_of
from benchmarks.result import Result
from kernels.fetch import fetch
from kernels.select import Fresh

CONTEXT = 32768
ARENA_GIB = 13


def measure(machine: Machine) -> list[Result]:
    sequences, layers, capacity = 12, 8, 2048
    model = Model("gather", layers, 32, 8, 4096, 14336, 128256)
    arena = arena_of(machine.memory, model, sequences, CONTEXT)
    table = torch.arange(len(arena), device="cuda").view(sequences, -1)
    resident = torch.zeros(sequences, 8, capacity, 2, 128, dtype=torch.bfloat16, device="cuda")

    def rate(rows: int, draw: Callable[[int], Tensor]) -> float:
        slots = torch.arange(rows, device="cuda").int().expand(sequences, 8, rows).contiguous()
        counts = torch.full((sequences, 8), rows, dtype=torch.int32, device="cuda")
        fresh = Fresh(slots, counts)
        draws = [torch.nn.functional.pad(draw(rows).int(), (0, capacity - rows)) for _ in range(2 * layers)]

        def work() -> None:
            for turn, members in enumerate(draws):
                fetch(fresh, members, table, arena[:, turn % layers], resident, 0)

        return len(draws) * sequences * 8 * rows * 512 / seconds(graph_of(work).replay)

    def scattered(rows: int) -> Tensor:
        """[sequences, 8, rows] positions, in order."""
        return torch.rand(sequences, 8, CONTEXT, device="cuda").argsort(-1)[..., :rows].sort(-1).values

    def consecutive(rows: int) -> Tensor:
        start = int(torch.randint(CONTEXT - rows, ()))
        return torch.arange(start, start + rows, device="cuda").expand(sequences, 8, rows)

    def result(case: str, metric: str, reached: float) -> Result:
        return Result(case, metric, reached / 1e9, "GB/s", machine.to_gpu / 1e9, reached / machine.to_gpu)

    ceiling = rate(2048, consecutive)
    return [
        result("ceiling", "consecutive rows", ceiling),
        *(result(f"gather/{rows}", "rate", rate(rows, scattered)) for rows in (2048, 256, 64)),
    ]
