"""CUDA graphs of the decode step: which batch sizes there are, capture, replay, destroy."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from clo.gpu_worker.side_stream import Priority

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def graph_sizes(slots: int) -> list[int]:
    """Batch sizes whose graphs serve up to ``slots`` sequences, ascending."""
    return [size for size in _SIZES if size < slots] + [slots]


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what the body launches, in the memory of ``pool``, or in its own if that is None.

    The garbage collector waits until the end, see ``without_collection``. Other threads may do what a capture
    forbids its own: NCCL has one that asks for events.
    """
    with (
        without_collection(),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        yield


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect garbage, and then none until the end: were the collector to destroy a graph or an event of
    something that is no longer used, CUDA would give a capture up. Around many captures it spares each of
    them the first collection, which takes a third of a second."""
    if not gc.isenabled():  # within another one
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class DecodeGraphs:
    """One graph for each of a few batch sizes, in one pool of memory. On the CPU there are none.

    Args:
        step: the decode step of a batch size, from device memory to device memory; returns its logits.
        device: the device that decodes.
    """

    def __init__(self, step: Callable[[int], Tensor], device: torch.device) -> None:
        self._step = step
        # one stream for all captures, as graphs that share a pool need
        self._stream = torch.cuda.Stream(device, priority=Priority.STEP) if device.type == "cuda" else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self._pool: Any = None

    @property
    def usable(self) -> bool:
        """Whether steps can be replayed."""
        return bool(self._graphs)

    def capture(self, sizes: Iterable[int]) -> None:
        """Capture the graphs of these batch sizes, with a progress bar; on the CPU there is nothing to do."""
        if self._stream is None:
            return
        # Largest first, so that the others fit into its memory. disable=None: shown only on a terminal.
        for size in tqdm(sorted(sizes, reverse=True), desc="Capturing graphs", disable=None):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(size)  # compiles what is not yet compiled
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, self._pool, self._stream):
                self._logits[size] = self._step(size)
            self._graphs[size] = graph
            self._pool = graph.pool()
        torch.cuda.synchronize()

    def replay(self, needed: int) -> Tensor:
        """Launch the smallest graph that holds ``needed`` slots; returns its logits, overwritten by the next.

        Raises:
            ValueError: no graph is as large.
        """
        size = min((size for size in self._graphs if size >= needed), default=None)
        if size is None:
            raise ValueError(f"No graph holds {needed} slots, only {max(self._graphs, default=0)}.")
        self._graphs[size].replay()
        return self._logits[size]

    def destroy(self) -> None:
        """Give back the graphs' memory; later steps are launched kernel by kernel."""
        self._graphs.clear()
        self._logits.clear()
        self._pool = None
