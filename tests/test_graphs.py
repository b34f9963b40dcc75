"""Which batch sizes have a graph, and that there are none on the CPU."""

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.graphs import DecodeGraphs, graph_sizes


@pytest.mark.parametrize("slots", [*range(1, 70), 100, 255, 256, 257, 1000])
def test_sizes_serve_every_number_of_slots_and_waste_little(slots: int) -> None:
    sizes = graph_sizes(slots)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1 and sizes[-1] == slots
    for needed in range(1, slots + 1):
        size = min(size for size in sizes if size >= needed)
        assert size < 2 * needed or size == slots
    assert len(sizes) <= 15, "each takes time at the start and memory"


def test_on_the_cpu_there_are_none() -> None:
    def step(size: int) -> Tensor:
        raise AssertionError("a step was launched")

    graphs = DecodeGraphs(step, torch.device("cpu"))
    graphs.capture(graph_sizes(8))
    assert not graphs.usable
    with pytest.raises(ValueError, match="No graph holds 3 slots"):
        graphs.replay(3)
    graphs.destroy()
    assert not graphs.usable
