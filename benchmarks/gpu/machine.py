"""The machine that all cases share: pinned CPU memory, and the ceilings of this run."""

import torch

from benchmarks.gpu.ceilings import copy_engine, hbm_copy
from benchmarks.result import Result
from clo.gpu_worker.pinning import pin
from clo.kvstore.arena import Arena


class Machine:
    """Pinned CPU memory and the machine's ceilings.

    Args:
        arena_bytes: of CPU memory, touched and registered at once.

    Attributes:
        arena: the memory; host: the same [arena_bytes] uint8 as the CPU sees it.
        memory: the same as the GPU sees it.
        to_gpu, to_cpu: bytes per second of the copy engine.
        hbm: bytes per second, read and written, of a copy within GPU memory.
    """

    def __init__(self, arena_bytes: int) -> None:
        self.arena = Arena.create(arena_bytes)
        self.host = self.arena.tensor(torch.uint8, (arena_bytes,))
        self.memory = pin(self.host)
        self.to_gpu, self.to_cpu = copy_engine(self.host)
        self.hbm = hbm_copy()

    def results(self) -> list[Result]:
        return [
            Result("ceiling", "copy engine to GPU", self.to_gpu / 1e9, "GB/s"),
            Result("ceiling", "copy engine to CPU", self.to_cpu / 1e9, "GB/s"),
            Result("ceiling", "HBM copy", self.hbm / 1e12, "TB/s"),
        ]
