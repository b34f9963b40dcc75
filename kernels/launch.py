"""Launching the CUDA C++ kernels that lie beside their references."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""``ELEMENT`` of ``common.cuh`` for a dtype."""

_FOLDER = Path(__file__).parent


class _Stream:
    """A stream's handle under the protocol by which CUDA libraries exchange streams."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle  # version of the protocol, handle


@cache
def _module(file: str, defines: tuple[tuple[str, int], ...]) -> Any:
    import cupy  # here, because a machine without a GPU needs none

    options = ["-std=c++17", f"-I{_FOLDER}", *(f"-D{name}={value}" for name, value in defines)]
    return cupy.RawModule(code=(_FOLDER / file).read_text(), options=tuple(options))


@cache
def _kernel(file: str, name: str, defines: tuple[tuple[str, int], ...], shared: int) -> Any:
    kernel = _module(file, defines).get_function(name)
    if shared > 32 * 1024:  # with static shared memory this may be more than a block gets unless it asks
        kernel.max_dynamic_shared_size_bytes = max(shared, kernel.max_dynamic_shared_size_bytes)
    return kernel


def launch(
    file: str,
    name: str,
    grid: tuple[int, ...],
    threads: int,
    args: Sequence[Tensor | int | float | None],
    shared: int = 0,
    **defines: int,
) -> None:
    """Launch a kernel on torch's current stream; it is compiled at its first use.

    Args:
        file: of this folder.
        grid: blocks; threads: of a block; shared: bytes of dynamic shared memory.
        args: tensors as pointers (None is a null pointer), integers as 64 bits, floats as 32 bits.
        defines: constants of the source.
    """
    import cupy

    kernel = _kernel(file, name, tuple(defines.items()), shared)
    values = [_argument(value) for value in args]
    with cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream().cuda_stream)):
        kernel(grid, (threads,), values, shared_mem=shared)


def _argument(value: Tensor | int | float | None) -> int | np.float32:
    if isinstance(value, Tensor):
        assert value.shape[-1] == 1 or value.stride(-1) == 1, "kernels read the last dimension in order"
        return value.data_ptr()
    if isinstance(value, float):
        return np.float32(value)
    return value or 0
