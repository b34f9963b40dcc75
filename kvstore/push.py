"""Bulk pushes: rows of the arena into the staging memory of a worker, then a flag that says so.

A store never loads CUDA unless a worker asks it to push into a GPU.
"""

import logging
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clo.kvstore.arena import Arena
from clo.kvstore.layout import ArenaLayout
from clo.runtime.wire.errors import ConfigError, ProtocolError
from clo.runtime.wire.messages import GPUMemory, OpenStaging, Push

PAGE_BYTES = 4096
"""Size of the page of control words, each of which is an int64."""
FLAG = 0
"""Word that holds the number of the last push that is complete; the store writes it."""
STATUS = 1
"""Word that the worker sets to a number other than zero once it has waited too long."""

_NUMBERS = 2  # first word of a ring: numbers on their way to the flag
_RING = PAGE_BYTES // 8 - _NUMBERS
_CHUNK_BYTES = 2**30  # registered by one thread at a time
_THREADS = 8
_PORTABLE_MAPPED = 3  # flags of cudaHostRegister

_Bytes = NDArray[np.uint8]
_logger = logging.getLogger(__name__)


class Source:
    """The arena as pushes read it: mapped, and registered with CUDA, when it is first needed."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._registered = False

    @cached_property
    def memory(self) -> _Bytes:
        return _map(self._arena.fd, self._arena.size)

    def open_other(self, pid: int, fd: int, size: int) -> _Bytes:
        """Memory that process ``pid`` holds as ``fd``. Raises ``ProtocolError``, also where it is the arena,
        which pushes must not write."""
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ProtocolError(f"File descriptor {fd} of process {pid} cannot be opened: {error}.") from None
        try:
            found = os.fstat(own)
            if found.st_size != size or os.path.samestat(found, os.fstat(self._arena.fd)):
                raise ProtocolError(f"File descriptor {fd} of process {pid} is no memory of {size} bytes.")
            return _map(own, size)
        finally:
            os.close(own)

    def register(self, device: int) -> None:
        """Register the arena with CUDA, for all devices, unless it is. Raises ``RuntimeError``."""
        if self._registered:
            return
        from cupy.cuda import runtime

        base, size = self.memory.ctypes.data, self.memory.nbytes

        def register(start: int) -> None:
            runtime.setDevice(device)  # a new thread starts on device 0 and would make a context there
            runtime.hostRegister(base + start, min(_CHUNK_BYTES, size - start), _PORTABLE_MAPPED)

        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(register, range(0, size, _CHUNK_BYTES)))
        self._registered = True


class _SharedStaging:
    """Staging in memory that both processes map. Stores become visible in program order, as on x86."""

    def __init__(self, source: Source, page: NDArray[np.int64], rows: _Bytes) -> None:
        self._source, self._page, self._rows = source.memory, page, rows

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes from offset ``source`` of the arena to offset ``target`` of the rows."""
        self._rows[target : target + size] = self._source[source : source + size]

    def post(self, number: int) -> None:
        """Set the flag, after all copies so far."""
        self._page[FLAG] = number

    def close(self) -> None:
        """Nothing to give back: the mapping ends with the object."""


class _GPUStaging:
    """Staging in the memory of a GPU, opened through CUDA IPC. The copy engine does all the work, in stream
    order; neither this process nor a multiprocessor of the GPU takes part."""

    def __init__(self, source: Source, page: NDArray[np.int64], gpu: GPUMemory) -> None:
        from cupy.cuda import runtime  # here, because a store without a GPU needs none

        self._runtime, self._page = runtime, page
        self._device: int = runtime.deviceGetByPCIBusId(gpu.device)
        runtime.setDevice(self._device)
        self._rows: int = runtime.ipcOpenMemHandle(gpu.handle)
        source.register(self._device)
        self._source = source.memory.ctypes.data
        runtime.hostRegister(page.ctypes.data, PAGE_BYTES, _PORTABLE_MAPPED)
        self._number: int = runtime.malloc(8)
        self._stream: int = runtime.streamCreateWithFlags(runtime.streamNonBlocking)

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes from offset ``source`` of the arena to offset ``target`` of the rows."""
        runtime = self._runtime
        runtime.setDevice(self._device)
        while size:  # a copy stays within one registration
            part = min(size, _CHUNK_BYTES - source % _CHUNK_BYTES)
            runtime.memcpyAsync(
                self._rows + target, self._source + source, part, runtime.memcpyHostToDevice, self._stream
            )
            source, target, size = source + part, target + part, size - part

    def post(self, number: int) -> None:
        """Set the flag, after all copies so far."""
        # The number goes to the GPU and back. A copy to the CPU's memory begins only after the copies to the
        # GPU before it in the stream are complete and visible. Other ways: a copy from CPU memory to the flag
        # would make this process wait for the stream; cuStreamWriteValue64 may run in the compute channel of
        # this process, which takes turns with the worker's, and that one is busy waiting for the flag;
        # cudaLaunchHostFunc needs a thread of this process for each push.
        runtime = self._runtime
        word = _NUMBERS + number % _RING
        self._page[word] = number
        page = self._page.ctypes.data
        runtime.memcpyAsync(self._number, page + 8 * word, 8, runtime.memcpyHostToDevice, self._stream)
        runtime.memcpyAsync(page + 8 * FLAG, self._number, 8, runtime.memcpyDeviceToHost, self._stream)

    def close(self) -> None:
        """Give everything back, after all pushes so far."""
        runtime = self._runtime
        runtime.setDevice(self._device)
        runtime.streamSynchronize(self._stream)
        runtime.streamDestroy(self._stream)
        runtime.free(self._number)
        runtime.hostUnregister(self._page.ctypes.data)
        runtime.ipcCloseMemHandle(self._rows)


class Pusher:
    """Pushes into the staging of one worker.

    Args:
        source: the arena, [layer][kv_head][block][token][K|V][head_dim].
        pid: the worker's process.
        message: where its staging is.
        layout: of the arena.

    Raises:
        ProtocolError: the worker has no such memory.
        ConfigError: CUDA refuses.
    """

    def __init__(self, source: Source, pid: int, message: OpenStaging, layout: ArenaLayout) -> None:
        self._bytes, self._layout = message.bytes, layout
        memory = source.open_other(pid, message.fd, PAGE_BYTES + (0 if message.gpu else self._bytes))
        self._page = memory[:PAGE_BYTES].view(np.int64)
        self._last = 0
        self._staging: _SharedStaging | _GPUStaging
        with _explained():
            if message.gpu:
                self._staging = _GPUStaging(source, self._page, message.gpu)
            else:
                self._staging = _SharedStaging(source, self._page, memory[PAGE_BYTES:])

    def push(self, message: Push, blocks: list[int]) -> None:
        """Begin a push.

        Args:
            blocks: all blocks of the sequence.

        Raises:
            ProtocolError: the message asks for what the sequence, the model or the staging does not have.
            ConfigError: CUDA refuses.
        """
        end = message.first_block + message.blocks
        layout = self._layout
        if message.layer >= layout.layers or end > len(blocks):
            raise ProtocolError(
                f"There are {layout.layers} layers, and {len(blocks)} blocks of sequence {message.sequence}; "
                f"layer {message.layer} of blocks {message.first_block} to {end - 1} cannot be pushed."
            )
        size = layout.kv_heads * message.blocks * layout.part_bytes
        if message.offset + size > self._bytes:
            raise ProtocolError(f"{size} bytes at {message.offset} exceed a staging of {self._bytes} bytes.")
        if not self._last < message.number <= int(self._page[FLAG]) + _RING:
            raise ProtocolError(
                f"Push {message.number} follows {self._last}; numbers have to grow, and no more than {_RING} "
                "pushes may be on their way."
            )
        self._last = message.number
        with _explained():
            for head in range(layout.kv_heads):
                for start, block, count in _runs(blocks[message.first_block : end]):
                    self._staging.copy(
                        layout.offset(message.layer, head, block),
                        message.offset + (head * message.blocks + start) * layout.part_bytes,
                        count * layout.part_bytes,
                    )
            self._staging.post(message.number)

    def close(self) -> None:
        """End: the worker is gone, or has another staging."""
        try:
            self._staging.close()
        except RuntimeError as error:  # from CUDA; the store goes on for other workers
            _logger.warning("The memory of a former worker's GPU was not given back: %s.", error)


def _runs(blocks: list[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of adjacent blocks: index of the first, its id, how many."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] != blocks[end - 1] + 1:
            yield start, blocks[start], end - start
            start = end


def _map(fd: int, size: int) -> _Bytes:
    return np.frombuffer(mmap.mmap(fd, size), np.uint8)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn errors of CUDA, and its absence, into a ``ConfigError``."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"The KV store cannot push into the GPU's memory: {error}.") from None
