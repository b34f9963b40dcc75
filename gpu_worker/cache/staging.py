"""Brings rows from the arena to the worker in bulk, one layer while the layer before computes."""

import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor

from clo.gpu_worker.pinning import device_view
from clo.gpu_worker.side_stream import DeviceEvent
from clo.kernels.flag import wait
from clo.kvstore.client import StoreClient
from clo.kvstore.push import FLAG, PAGE_BYTES, STATUS
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.wire.errors import DeviceStuck
from clo.runtime.wire.messages import GPUMemory, OpenStaging, Push

STUCK_SECONDS = 20.0
_OPEN_SECONDS = 600.0  # the store may have to register its arena with CUDA first
_HALVES = 2
_GRAIN_BYTES = 2 * 2**20
_PORTABLE_MAPPED = 3  # flags of cudaHostRegister


class Staging:
    """Two halves into which the KV store pushes in turn: one is read while the other one is filled.

    Pushes are numbered from 1; push n goes to half ``n % 2``. A reader of one sequence does ``begin``; then,
    for each layer, ``request`` as early as it succeeds, and ``wait`` when the rows are wanted. ``begin``
    again ends it at any time, also where a request was never waited for.

    Args:
        store: an attached client.
        shape: shape of the model's KV.
        blocks: the most blocks of a request.
        device: the device that gets the rows.

    Raises:
        CLOError: the store cannot open it.
    """

    def __init__(self, store: StoreClient, shape: KVShape, blocks: int, device: torch.device) -> None:
        self._store, self._shape, self._device, self._most = store, shape, device, blocks
        self._part = shape.block_tokens * shape.kv_heads * shape.row_bytes  # one layer of a block
        self._half = blocks * self._part
        size = _HALVES * self._half
        cuda = device.type == "cuda"
        fd = os.memfd_create("clo-staging")
        try:
            os.ftruncate(fd, PAGE_BYTES + (0 if cuda else size))
            memory = torch.from_numpy(np.frombuffer(mmap.mmap(fd, 0), np.uint8))
            page, self._rows = memory[:PAGE_BYTES].view(torch.int64), memory[PAGE_BYTES:]
            self._status, gpu = page[STATUS], None
            if cuda:
                self._rows, gpu = _gpu_memory(size)
                page = self._register(page)
            self._flag, self._device_status = page[FLAG : FLAG + 1], page[STATUS : STATUS + 1]
            store.open_staging(OpenStaging(fd, size, gpu), _OPEN_SECONDS)
        finally:
            os.close(fd)
        self._sequence = self._first = self._blocks = 0
        self._requested = 0  # number of the last push asked for
        self._reading: int | None = None  # number of the last one waited for
        # By half: when the device has left it, or None from a request until the next wait but one.
        self._free: list[DeviceEvent | None] = [DeviceEvent(device) for _ in range(_HALVES)]

    def begin(self, sequence: int, first_block: int, blocks: int) -> None:
        """Requests to come are for ``blocks`` blocks of a sequence, from its block ``first_block`` on.

        All readers of former rows are on the current stream already.
        """
        if not 0 < blocks <= self._most:
            raise ValueError(f"{blocks} blocks; the staging holds 1 to {self._most}.")
        self._sequence, self._first, self._blocks = sequence, first_block, blocks
        self._reading = None
        self._free = [mark or DeviceEvent(self._device) for mark in self._free]

    def request(self, layer: int) -> int | None:
        """Ask for a layer's rows; returns the number of the push, or None while its half is still read.

        Raises:
            DeviceStuck: see ``check``.
        """
        self.check()
        number = self._requested + 1
        half = number % _HALVES
        mark = self._free[half]
        if mark is None or not mark.reached:
            return None
        self._free[half], self._requested = None, number
        self._store.send(Push(self._sequence, layer, self._first, self._blocks, half * self._half, number))
        return number

    def wait(self, number: int) -> Tensor:
        """The rows of push ``number``, for work on the current stream, which waits for them.

        They stay until the next ``wait`` or ``begin``, by when all their readers have to be on the stream.
        On a GPU they are what was asked for only if ``check`` finds nothing once those readers are done.

        Returns:
            [kv_heads, blocks * block_tokens, 2, head_dim], contiguous.

        Raises:
            DeviceStuck: see ``check``; on the CPU also where the rows do not come now.
        """
        if self._reading is not None:
            self._free[self._reading % _HALVES] = DeviceEvent(self._device)
        self._reading = number
        wait(self._flag, number, int(1e9 * STUCK_SECONDS), self._device_status)
        self.check()
        start = number % _HALVES * self._half
        rows = self._rows[start : start + self._blocks * self._part].view(self._shape.dtype)
        return rows.view(self._shape.kv_heads, -1, 2, self._shape.head_dim)

    def check(self) -> None:
        """Find out whether all that was waited for so far has come.

        Raises:
            DeviceStuck: it has not, and the results that depend on it are wrong. There is no way to go on.
        """
        if number := int(self._status):
            raise DeviceStuck(
                f"The KV store has not brought rows within {STUCK_SECONDS:g} s (push {number}); see its "
                "messages above."
            )

    def _register(self, page: Tensor) -> Tensor:
        """Register the page with CUDA as long as this object lives; returns the GPU's view of it."""
        from cupy.cuda import runtime

        runtime.hostRegister(page.data_ptr(), page.nbytes, _PORTABLE_MAPPED)
        weakref.finalize(self, runtime.hostUnregister, page.data_ptr()).atexit = False
        return device_view(page)


def _gpu_memory(size: int) -> tuple[Tensor, GPUMemory]:
    """``size`` bytes on the current CUDA device, and how another process opens them.

    They do not come from torch's allocator, whose pieces share a handle with others. Small allocations of
    CUDA do so too, hence whole multiples of 2 MiB (CUDA programming guide, interprocess communication).
    """
    import cupy

    with cupy.cuda.Device(torch.cuda.current_device()) as device:
        memory = cupy.cuda.Memory(-(-size // _GRAIN_BYTES) * _GRAIN_BYTES)
        handle = cupy.cuda.runtime.ipcGetMemHandle(memory.ptr)
        array = cupy.ndarray(size, cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
        bus = cupy.cuda.runtime.deviceGetPCIBusId(device.id)
    return torch.as_tensor(array, device=torch.device("cuda")), GPUMemory(bus, handle)
