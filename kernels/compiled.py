"""Loops over plain arrays as the CPU runs them: what a kernel does, compiled by Numba.

On the CPU a decode step spends more time on getting from one small tensor operation to the next than on their
work, so an operation is one loop for all heads, which also reads as the definition of its kernel.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Loop = TypeVar("Loop", bound=Callable[..., Any])

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def compiled(loop: Loop, *, any_order: bool = False) -> Loop:
    """The loop as machine code, compiled at its first call and kept on disk for later processes.

    Assign single elements: one assignment of a slice to a slice takes four seconds to compile.

    Args:
        loop: takes arrays and numbers, and writes its results to the last of the arrays.
        any_order: sums of floats may be taken in any order, so that several terms are added at a time.
    """
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc"} if any_order else False}
    try:
        return cast(Loop, njit(cache=True, **options)(loop))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(Loop, njit(**options)(loop))


def bits(tensor: Tensor) -> Array:
    """A tensor's memory as an array of integers, for loops that move elements of any dtype."""
    return tensor.view(_BITS[tensor.itemsize]).numpy()


def floats(tensor: Tensor) -> Array:
    """A tensor on the CPU as a contiguous array of float32: its own memory if it is that, else a copy."""
    return tensor.float().contiguous().numpy()
