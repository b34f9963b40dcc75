"""gather/N: N rows a head of 12 sequences x 8 heads x 32K, one layer after another, fresh rows each time."""

from functools import partial

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
    results = []
    for rows in (2048, 256, 64):
        slots = torch.arange(rows, device="cuda").int().expand(sequences, 8, rows).contiguous()
        counts = torch.full((sequences, 8), rows, dtype=torch.int32, device="cuda")
        draws = []
        for _ in range(2 * layers):
            drawn = torch.rand(sequences, 8, CONTEXT, device="cuda").argsort(-1)[..., :rows].sort(-1).values
            draws.append(torch.nn.functional.pad(drawn.int(), (0, capacity - rows)))

        def work(draws: list[Tensor], fresh: Fresh) -> None:
            for turn, members in enumerate(draws):
                fetch(fresh, members, table, arena[:, turn % layers], resident, 0)

        graph = graph_of(partial(work, draws, Fresh(slots, counts)))
        rate = len(draws) * sequences * 8 * rows * 512 / seconds(graph.replay)
        results.append(
            Result(f"gather/{rows}", "rate", rate / 1e9, "GB/s", machine.to_gpu / 1e9, rate / machine.to_gpu)
        )
    return results
