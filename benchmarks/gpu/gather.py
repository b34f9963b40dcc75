"""gather/N: N rows a head of 12 sequences x 8 heads x 32K, one layer after another, new rows each time.

The reference is the copy engine, which takes turns with them. What the same kernel reaches on rows that
follow one another is a second ceiling: the copy engine asks for larger pieces than any kernel does.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import graph_of, in_turn
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import Model, arena_of
from benchmarks.result import Result
from clo.kernels.fetch import fetch
from clo.kernels.resident import ResidentSet
from clo.kernels.update_resident import FetchList

CONTEXT = 32768
ROWS = (2048, 256, 64)  # a head
ARENA_GIB = 13

_SINKS, _RECENT = 4, 64


def measure(machine: Machine) -> list[Result]:
    sequences, layers, capacity = 12, 8, 2048
    model = Model("gather", layers, 32, 8, 4096, 14336, 128256)
    arena = arena_of(machine.memory, model.shape, sequences, CONTEXT)
    table = torch.arange(len(arena), device="cuda").view(sequences, -1)
    rows_of_set = torch.zeros(
        sequences, 8, _SINKS + _RECENT + capacity, 2, 128, dtype=torch.bfloat16, device="cuda"
    )

    def scattered(rows: int) -> Tensor:
        """[sequences, 8, rows] positions, in order."""
        return torch.rand(sequences, 8, CONTEXT, device="cuda").argsort(-1)[..., :rows].sort(-1).values

    def consecutive(rows: int) -> Tensor:
        start = int(torch.randint(CONTEXT - rows, ()))
        return torch.arange(start, start + rows, device="cuda").expand(sequences, 8, rows)

    inputs = []
    for rows, draw in ((2048, consecutive), *((rows, scattered) for rows in ROWS)):
        entries = torch.arange(rows, device="cuda").int().expand(sequences, 8, rows).contiguous()
        counts = torch.full((sequences, 8), rows, dtype=torch.int32, device="cuda")
        draws = [torch.nn.functional.pad(draw(rows).int(), (0, capacity - rows)) for _ in range(2 * layers)]
        inputs.append((FetchList(entries, counts), draws))

    def gather(fetch_list: FetchList, draws: list[Tensor]) -> None:
        for turn, positions in enumerate(draws):
            resident = ResidentSet(rows_of_set, positions, last_used=positions, sinks=_SINKS, recent=_RECENT)
            fetch(fetch_list, resident, table, arena[:, turn % layers])

    copied = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    graphs = [graph_of(partial(gather, *each)) for each in inputs]
    copying, *gathering = in_turn(
        [lambda: copied.copy_(machine.host[: 2**30], non_blocking=True), *(graph.replay for graph in graphs)]
    )
    engine = 2**30 / copying
    rates = [
        len(draws) * fetch_list.entries.numel() * 512 / took
        for (fetch_list, draws), took in zip(inputs, gathering, strict=True)
    ]
    names = [("ceiling", "consecutive rows"), *((f"gather/{rows}", "rate") for rows in ROWS)]
    return [
        Result("ceiling", "copy engine in turn", engine / 1e9, "GB/s"),
        *(
            Result(*name, rate / 1e9, "GB/s", engine / 1e9, rate / engine)
            for name, rate in zip(names, rates, strict=True)
        ),
    ]
