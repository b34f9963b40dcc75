"""Loops over plain arrays as the CPU runs them: what a kernel does, compiled by Numba.

On the CPU a decode step spends more time on getting from one small tensor operation to the next than on their
work, so the operations that would need many of them are loops, which also read as the definition of a kernel.
"""

from collections.abc import Callable
from contextlib import suppress
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from numba import njit
from numba.core.caching import FunctionCache
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Loop = TypeVar("Loop", bound=Callable[..., Any])

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class _Cache(FunctionCache):
    """Machine code on disk that several processes may write at the same time.

    With Numba's own cache two of them can give the same file name to the code for different types, and a
    third then runs the wrong one.
    """

    def save_overload(self, sig: Any, data: Any) -> None:
        path = Path(self.cache_path)
        path.mkdir(parents=True, exist_ok=True)
        with (path / "writing.lock").open("w") as lock:
            flock(lock, LOCK_EX)
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def compiled(loop: Loop, *, any_order: bool = False) -> Loop:
    """The loop as machine code, compiled at its first call and kept on disk for later processes.

    Nothing checks bounds: a loop may use as an index only what its operation's table of arguments bounds, or
    what it has compared itself. Assign single elements: one assignment of a slice to a slice takes four
    seconds to compile.

    Args:
        loop: takes arrays and numbers, and changes some of the arrays in place or returns numbers.
        any_order: sums of floats may be taken in any order, so that several terms are added at a time.
    """
    function = njit(error_model="numpy", fastmath={"reassoc"} if any_order else False)(loop)
    # Without a cache where neither the package's folder nor the user's cache can be written, and where Numba
    # is told to compile nothing.
    with suppress(RuntimeError):
        if hasattr(function, "_cache"):
            function._cache = _Cache(loop)  # type: ignore[no-untyped-call]
    return cast(Loop, function)


def bits(tensor: Tensor) -> Array:
    """A tensor's memory as an array of integers, for loops that move elements of any dtype."""
    return tensor.view(_BITS[tensor.itemsize]).numpy()


def floats(tensor: Tensor) -> Array:
    """A tensor on the CPU as a contiguous array of float32: its own memory if it is that, else a copy."""
    return tensor.float().contiguous().numpy()
