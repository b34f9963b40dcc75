"""The host's end of the mailbox: sampled tokens arrive without a call into CUDA."""

import time

import torch
from torch import Tensor

from clo.kernels.mailbox import post
from clo.runtime.wire.errors import DeviceStuck

_ENTRIES = 16  # posted and not yet read; the pipeline holds fewer
_STUCK_SECONDS = 60.0


class Mailbox:
    """Entries are numbered from 1 in the order of ``post``, on the device and on the host alike.

    Args:
        width: most tokens of an entry.
        device: that posts.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._memory = torch.zeros(_ENTRIES, 1 + width, dtype=torch.int64, pin_memory=cuda)
        self._host = self._memory.numpy()
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._waiting_for, self._since = 0, 0.0

    def reset(self) -> None:
        """Forget what was posted; nothing may be on its way."""
        self._memory.zero_()
        self._counter.zero_()

    def post(self, tokens: Tensor) -> None:
        """Post tokens [N] int64 on the current stream; a CUDA graph may hold the call."""
        post(tokens, self._counter, self._memory)

    def read(self, number: int, count: int) -> list[int] | None:
        """The tokens of an entry, or None while it is not there.

        Raises:
            DeviceStuck: it has been waited for too long.
        """
        entry = self._host[number % _ENTRIES]
        if entry[0] == number:
            tokens: list[int] = entry[1 : 1 + count].tolist()
            return tokens
        now = time.monotonic()
        if self._waiting_for != number:
            self._waiting_for, self._since = number, now
        if now - self._since > _STUCK_SECONDS:
            raise DeviceStuck(
                f"The GPU has not finished a step for {_STUCK_SECONDS:g} s; look at it with nvidia-smi, then "
                "start the server again."
            )
        return None
