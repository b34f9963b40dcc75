"""Work beside the current stream, and when it is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor


class Urgency(IntEnum):
    """Whose blocks a multiprocessor takes first where several kernels have some left; a stream's priority.

    The rank of a kernel stays with it in a CUDA graph.
    """

    FILLER = 0  # all that is not waited for yet: it fills what the others leave
    STEP = -1  # the chain from a decode step's token to its next one
    URGENT = -2  # little work that much waits for, and transfers, which wait for PCIe most of the time


class Branch:
    """A second stream that forks from the current one and joins it again; in a CUDA graph, a branch.

    On the CPU there is nothing to fork: the work is done where it stands.

    Args:
        device: of the work.
        urgency: of its work.
    """

    def __init__(self, device: torch.device, urgency: Urgency = Urgency.FILLER) -> None:
        self._stream = torch.cuda.Stream(device, priority=urgency) if device.type == "cuda" else None

    @contextmanager
    def fork(self, *inputs: Tensor) -> Iterator[None]:
        """Run the body after all work so far and beside all to come; ``inputs`` may be dropped meanwhile."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in inputs:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """All work to come waits for the branch."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class Mark:
    """A point in the device's work that the host can ask for. On the CPU it is always reached."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    @property
    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Work to come on the current stream waits for the mark."""
        if self._event is not None:
            self._event.wait()
