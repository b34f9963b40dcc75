"""Flag: work in a stream waits for a number that another process writes."""

import time

import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.launch import launch

_PAUSE_SECONDS = 5e-5  # between two looks at the flag, in the reference

_SIGNATURE = Signature(
    "wait",
    (Argument("flag", torch.int64, "1"), Argument("status", torch.int64, "1")),
    (Rule("number >= 1", "a flag is zero at first"), Rule("timeout_ns >= 0", "it is a time")),
)


def wait(flag: Tensor, number: int, timeout_ns: int, status: Tensor) -> None:
    """Hold the current stream until the flag is ``number`` or more, or until the time is over.

    After a timeout ``status`` is ``number``, and every later wait with this status returns at once: the work
    behind it then runs on whatever its input happens to hold. That work must therefore be harmless with any
    input, and its caller may trust the result only if ``status`` is still zero once the work is done.

    Args:
        flag: [1] int64, in memory that the writer and this device share; it only ever grows.
        number: positive.
        timeout_ns: nanoseconds, counted from when the device begins to wait.
        status: [1] int64, in memory that host and device share; zero at first.
    """
    _SIGNATURE.check(flag, status, number=number, timeout_ns=timeout_ns)
    if not flag.is_cpu:
        launch("flag.cu", "wait_flag", (1,), 1, [flag, number, timeout_ns, status])
        return
    end = time.monotonic_ns() + timeout_ns
    while not int(status) and int(flag) < number:
        if time.monotonic_ns() > end:
            status.fill_(number)
        time.sleep(_PAUSE_SECONDS)
