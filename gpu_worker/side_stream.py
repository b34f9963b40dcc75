"""Work beside the current stream, when it is done, and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor


class Priority(IntEnum):
    """Whose blocks go first where streams want the same multiprocessors, as CUDA counts."""

    STEP = -2  # what all the rest of a decode step waits for
    SOON = -1  # what the step waits for next
    LATER = 0


class SideStream:
    """A second stream that forks from the current one and joins it again; in a CUDA graph, a branch.

    On the CPU there is nothing to fork: the work is done on the spot.

    Args:
        device: the device that does the work.
        priority: of the work.
    """

    def __init__(self, device: torch.device, priority: Priority = Priority.LATER) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None

    @contextmanager
    def fork(self, *inputs: Tensor) -> Iterator[None]:
        """Run the body after all work so far and beside later work; ``inputs`` may be dropped meanwhile."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in inputs:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def event(self) -> "DeviceEvent":
        """The point at which the branch is through with what it has so far."""
        with torch.cuda.stream(self._stream):  # which does nothing for None
            return DeviceEvent(self._device)

    def join(self) -> None:
        """Later work waits for the branch."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class DeviceEvent:
    """A point in the device's work that the host can ask for. On the CPU it is always reached."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    @property
    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Later work on the current stream waits for the event."""
        if self._event is not None:
            self._event.wait()


class DeviceTimer:
    """Measures the device's work on the current stream from its construction to ``stop``."""

    def __init__(self, device: torch.device) -> None:
        self._begin = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._end: torch.cuda.Event | None = None
        self._seconds = 0.0
        if self._begin is None:
            self._since = time.monotonic()
        else:
            self._begin.record()

    def stop(self) -> None:
        """Nothing that is launched later counts."""
        if self._begin is None:
            self._seconds = time.monotonic() - self._since
        else:
            self._end = torch.cuda.Event(enable_timing=True)
            self._end.record()

    @property
    def seconds(self) -> float | None:
        """What it took, after ``stop``; None while the device is not through."""
        if self._begin is None or self._end is None:
            return self._seconds
        return self._begin.elapsed_time(self._end) / 1e3 if self._end.query() else None
