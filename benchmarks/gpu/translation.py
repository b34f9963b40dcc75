"""translation: what bounds a fetch of few rows, the GPU's translation of addresses in CPU memory.

23 rows a head (9 % of k = 256) of 24 sequences x 8 heads x 32K, one layer after another: by themselves, and
beside the attention that hides them. ``scattered`` rows lie anywhere in their sequence, ``close`` ones within
128 tokens, so that few pages hold them all.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import graph_of, seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import Model, arena_of
from benchmarks.result import Result
from clo.gpu_worker.side_stream import Priority, SideStream
from clo.kernels.attend import attend_resident
from clo.kernels.fetch import fetch
from clo.kernels.resident import ResidentSet
from clo.kernels.update_resident import FetchList

CONTEXT = 32768
ARENA_GIB = 26

_SEQUENCES, _HEADS, _LAYERS, _ROWS = 24, 8, 8, 23
_SINKS, _RECENT, _CAPACITY = 4, 64, 2048


def measure(machine: Machine) -> list[Result]:
    model = Model("translation", _LAYERS, 32, 8, 4096, 14336, 128256)
    arena = arena_of(machine.memory, model.shape, _SEQUENCES, CONTEXT)
    table = torch.arange(len(arena), device="cuda").view(_SEQUENCES, -1)
    lines = (_SEQUENCES, _HEADS)
    rows = _SINKS + _RECENT + _CAPACITY
    rows_of_sets = [
        torch.randn(*lines, rows, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(_LAYERS)
    ]
    query = torch.randn(_SEQUENCES, 32, 128, dtype=torch.bfloat16, device="cuda")
    kv = torch.randn(_SEQUENCES, lines[1], 2, 128, dtype=torch.bfloat16, device="cuda")
    lengths = torch.full((_SEQUENCES,), CONTEXT, device="cuda")
    entries = torch.arange(_ROWS, device="cuda").int().expand(*lines, _ROWS).contiguous()
    fetch_list = FetchList(entries, torch.full(lines, _ROWS, dtype=torch.int32, device="cuda"))
    fetching = SideStream(torch.device("cuda"), Priority.SOON)

    def draw(span: int) -> Tensor:
        drawn = torch.rand(*lines, span, device="cuda").argsort(-1)[..., :_ROWS].sort(-1).values
        return torch.nn.functional.pad(drawn.int(), (0, _CAPACITY - _ROWS))

    def work(draws: list[Tensor], *, fetches: bool, attends: bool) -> None:
        for turn, positions in enumerate(draws):
            layer = turn % _LAYERS
            resident = ResidentSet(
                rows_of_sets[layer], positions, last_used=positions, sinks=_SINKS, recent=_RECENT
            )
            with fetching.fork():
                if fetches:
                    fetch(fetch_list, resident, table, arena[:, layer])
            if attends:
                attend_resident(query, kv, resident, lengths, fetch_list, 128**-0.5)
            fetching.join()

    def layer_seconds(draws: list[Tensor], *, fetches: bool, attends: bool) -> float:
        return seconds(graph_of(partial(work, draws, fetches=fetches, attends=attends)).replay) / len(draws)

    results = []
    for name, span in (("scattered", CONTEXT), ("close", 128)):
        draws = [draw(span) for _ in range(2 * _LAYERS)]
        attention = layer_seconds(draws, fetches=False, attends=True)
        alone = layer_seconds(draws, fetches=True, attends=False)
        beside = layer_seconds(draws, fetches=True, attends=True)
        results += [
            Result(f"translation/{name}", "attention alone", attention * 1e6, "us"),
            Result(f"translation/{name}", "fetch alone", alone * 1e6, "us"),
            Result(f"translation/{name}", "both", beside * 1e6, "us", attention * 1e6, beside / attention),
        ]
    return results
