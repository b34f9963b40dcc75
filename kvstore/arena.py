"""The arena: one piece of memory that the KV store and its workers share.

It is an anonymous file (memfd). It has no name in any file system, so nothing is left behind when the
processes that hold it are gone, whatever ended them; and its size is not bounded by /dev/shm.
"""

import contextlib
import math
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from clo.runtime.machine.numa import bind_pages
from clo.runtime.wire.errors import ConfigError, WorkerDied

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_TOUCH_BYTES = 64 * 2**20  # touched by one thread at a time


class Piece(NamedTuple):
    """Bytes of an arena, whole pages of it, that lie on one NUMA node."""

    start: int
    stop: int
    node: int


class Arena:
    """Shared memory of a fixed size.

    Attributes:
        size: bytes.
        fd: file descriptor by which others open it, or -1 where this process opened another's.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Map ``size`` bytes of ``fd``; use ``create`` or ``open``."""
        self.size = size
        self.fd = -1
        self._memory = mmap.mmap(fd, size)
        with contextlib.suppress(OSError):  # huge pages are advice: faster where the kernel has them
            self._memory.madvise(mmap.MADV_HUGEPAGE)

    @classmethod
    def create(cls, size: int, pieces: Iterable[Piece] = ()) -> "Arena":
        """Make an arena and touch every page of it, so that a lack of memory shows now and not while a
        request is served; call ``clo.runtime.machine.host_memory.check_memory`` before. The pages are zero.

        Args:
            size: bytes.
            pieces: those that have a NUMA node of their own; the rest lies where this process is bound to.

        Raises:
            OSError: a piece cannot be bound, see ``bind_pages``.
        """
        fd = os.memfd_create("clo-arena")
        os.ftruncate(fd, size)
        arena = cls(fd, size)
        arena.fd = fd
        start = np.frombuffer(arena._memory, np.uint8).ctypes.data
        for piece in pieces:
            bind_pages(start + piece.start, piece.stop - piece.start, piece.node)
        arena._touch()
        return arena

    @classmethod
    def open(cls, pid: int, fd: int, size: int) -> "Arena":
        """Map the arena that process ``pid`` holds as ``fd``.

        Raises:
            WorkerDied: the process is gone, or holds no arena of ``size`` bytes there.
            ConfigError: this process may not look into the other one.
        """
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise WorkerDied(f"The KV store with pid {pid} is gone.") from None
        except PermissionError:
            raise ConfigError(
                f"The memory of the KV store (pid {pid}) may not be opened; run all processes as one user."
            ) from None
        try:
            if os.fstat(own).st_size != size:
                raise WorkerDied(f"Process {pid} holds no arena of {size} bytes.")
            return cls(own, size)
        finally:
            os.close(own)

    def tensor(self, dtype: "torch.dtype", shape: tuple[int, ...]) -> "torch.Tensor":
        """A view of the start of the arena; what is written to it is seen by all processes."""
        import torch  # here, because the store itself never needs it and stays small and quick to start

        count = math.prod(shape) * dtype.itemsize
        if count > self.size:
            raise ValueError(f"{shape} of {dtype} takes {count} bytes, the arena has {self.size}.")
        return torch.from_numpy(np.frombuffer(self._memory, np.uint8, count)).view(dtype).view(shape)

    def bytes(self, shape: tuple[int, ...]) -> "NDArray[np.uint8]":
        """The same as bytes."""
        return np.frombuffer(self._memory, np.uint8, math.prod(shape)).reshape(shape)

    def close(self) -> None:
        """Unmap. Raises ``BufferError`` while a tensor of this arena is alive."""
        self._memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _touch(self) -> None:
        pages = np.frombuffer(self._memory, np.uint8)

        def touch(start: int) -> int:
            part = pages[start : start + _TOUCH_BYTES]
            part[:: mmap.PAGESIZE] = 0
            return len(part)

        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
            tqdm(  # disable=None: shown only where stderr is a terminal
                total=self.size, desc="KV cache", unit="B", unit_scale=True, unit_divisor=1024, disable=None
            ) as bar,
        ):
            for size in threads.map(touch, range(0, self.size, _TOUCH_BYTES)):
                bar.update(size)
