"""Launching the CUDA C++ kernels that lie beside their references.

An operation launches its kernel for tensors that are not on the CPU: on a GPU, or on torch's meta device, for
which ``recorded`` shows what would be launched, also where there is no GPU.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clo.kernels.limits import SHARED_BYTES

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""``ELEMENT`` of ``common.cuh`` for a dtype."""

FOLDER = Path(__file__).parent
"""Where the sources are, and what they include."""

STANDARD = "c++17"
"""Of the sources."""

_EARLY = (9, 0)  # compute capability from which a kernel may begin before another one ends

_recordings: list[list["Launch"]] = []


class Launch(NamedTuple):
    """One launch of a kernel, and the constants with which its source is compiled."""

    file: str
    name: str
    grid: tuple[int, ...]
    threads: int
    args: tuple[Tensor | int | float | None, ...]
    shared: int
    defines: tuple[tuple[str, int], ...]
    early: bool = False

    def run(self) -> None:
        """Launch on torch's current stream; the source is compiled at its first use."""
        import cupy  # here, because a machine without a GPU needs none

        kernel = _kernel(self.file, self.name, self.defines, self.shared)
        values = [_value(argument) for argument in self.args]
        stream = torch.cuda.current_stream().cuda_stream
        if self.early and torch.cuda.get_device_capability() >= _EARLY:
            _launch_early(kernel.kernel.ptr, self, values, stream)
            return
        with cupy.cuda.Stream.from_external(_Stream(stream)):
            kernel(self.grid, (self.threads,), values, shared_mem=self.shared)


def launch(
    file: str,
    name: str,
    grid: tuple[int, ...],
    threads: int,
    args: Sequence[Tensor | int | float | None],
    shared: int = 0,
    *,
    early: bool = False,
    **defines: int,
) -> None:
    """Launch a kernel on torch's current stream, or note the launch within ``recorded``.

    Args:
        file: of this folder.
        name: of the kernel in the file.
        grid: blocks.
        threads: of a block.
        args: tensors as pointers (None is a null pointer), integers as 64 bits, floats as 32 bits.
        shared: bytes of dynamic shared memory.
        early: whether the kernel may begin as soon as that before it on the stream calls ``let_next_begin``,
            whose results it reads after ``wait_for_previous`` alone ("programmatic dependent launch").
            Before Hopper it makes no difference.
        defines: constants of the source.

    Raises:
        ValueError: the kernel needs more shared memory than a block may have.
    """
    if shared > max(SHARED_BYTES.values()):
        raise _too_much_shared_memory(name, shared, max(SHARED_BYTES.values()))
    asked = Launch(file, name, grid, threads, tuple(args), shared, tuple(defines.items()), early)
    if _recordings:
        _recordings[-1].append(asked)
    else:
        asked.run()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches are appended to the list and not carried out."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def block_shared_bytes() -> int:
    """Shared memory that a block may have on the current GPU."""
    import cupy

    return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])


class _Stream:
    """A stream's handle under the protocol by which CUDA libraries exchange streams."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle  # version of the protocol, handle


@cache
def _module(file: str, defines: tuple[tuple[str, int], ...]) -> Any:
    import cupy

    options = [f"-std={STANDARD}", f"-I{FOLDER}", *(f"-D{name}={value}" for name, value in defines)]
    return cupy.RawModule(code=(FOLDER / file).read_text(), options=tuple(options))


@cache
def _kernel(file: str, name: str, defines: tuple[tuple[str, int], ...], shared: int) -> Any:
    kernel = _module(file, defines).get_function(name)
    if shared > 32 * 1024:  # with static shared memory this may be more than a block gets unless it asks
        needed = shared + kernel.shared_size_bytes
        most = block_shared_bytes()
        if needed > most:
            raise _too_much_shared_memory(name, needed, most)
        kernel.max_dynamic_shared_size_bytes = max(shared, kernel.max_dynamic_shared_size_bytes)
    return kernel


def _launch_early(function: int, asked: Launch, values: Sequence[int | np.float32], stream: int) -> None:
    """What cupy cannot: a launch with an attribute."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*asked.grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = asked.threads, 1, 1
    config.sharedMemBytes, config.hStream = asked.shared, stream
    config.attrs, config.numAttrs = [attribute], 1
    types = tuple(ctypes.c_float if isinstance(value, np.float32) else ctypes.c_int64 for value in values)
    plain = tuple(value.item() if isinstance(value, np.float32) else value for value in values)
    (status,) = driver.cuLaunchKernelEx(config, function, (plain, types), 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{asked.name} could not be launched: {status.name}.")


def _too_much_shared_memory(name: str, needed: int, most: int) -> ValueError:
    return ValueError(
        f"{name} needs {needed} bytes of shared memory for these arguments, and a block may have {most}; see "
        "check_limits in clo.kernels.limits."
    )


def _value(argument: Tensor | int | float | None) -> int | np.float32:
    if isinstance(argument, Tensor):
        if argument.is_meta:
            raise ValueError(
                "Tensors on the meta device have no data; call operations on them in `recorded`."
            )
        return argument.data_ptr()
    if isinstance(argument, float):
        return np.float32(argument)
    return argument or 0
