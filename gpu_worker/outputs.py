"""What leaves the device: handles of steps, the mailbox of sampled tokens, slots that are given back."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.group import Group
from clo.gpu_worker.side_stream import DeviceEvent
from clo.kernels.mailbox import post
from clo.runtime.wire.errors import DeviceStuck
from clo.runtime.wire.messages import NO_STATS, CacheStats

_ENTRIES = 16  # posted but not yet read; the pipeline holds fewer
_STUCK_SECONDS = 60.0


class StepHandle(NamedTuple):
    """A step on its way: its tokens come by mailbox."""

    number: int
    rows: list[int]  # rows of the entry and of the logits, one for each slot that was asked for
    logits: Tensor  # [rows, vocab] float32; overwritten by the next step


class SlotRelease:
    """A slot on its way out: once ``event`` is reached the device no longer touches it, nor that of any rank
    of the group, where there is one."""

    def __init__(self, cache: KVCache, slot: int, device: torch.device, group: Group | None) -> None:
        self._cache = cache
        counters = cache.head_counters(slot)
        if group is not None:
            # after all that the ranks have done
            counters = group.join(counters).transpose(0, 1).flatten(1, 2)
        self._counters = torch.empty(counters.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._counters.copy_(counters, non_blocking=True)
        cache.reset_counters(slot)
        self.event = DeviceEvent(device)

    def finish(self, tokens: int, steps: int) -> CacheStats:
        """Once, after ``event``: what the cache did for the sequence, ``tokens`` long, in ``steps`` decode
        steps. The cache adds it to what it did for others."""
        if not steps:
            return NO_STATS
        self._cache.add_ended(self._counters)
        return self._cache.stats(self._counters.sum((0, 1)).tolist(), tokens, steps)


class Mailbox:
    """Entries are numbered from 1 in the order of ``post``, on the device and on the host alike.

    Args:
        width: the most tokens in an entry.
        device: the device that posts.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._memory = torch.zeros(_ENTRIES, 1 + width, dtype=torch.int64, pin_memory=cuda)
        self._host = self._memory.numpy()
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._waiting_for, self._since = 0, 0.0

    def reset(self) -> None:
        """Forget what was posted; no step may be in flight."""
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
                f"The GPU has not finished a step for {_STUCK_SECONDS:g} s; look at it with nvidia-smi."
            )
        return None
