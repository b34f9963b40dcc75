"""The ranks of a group: processes that compute one model together, each with a share of its heads.

A rank adds up what all of them have computed twice in a layer, after attention and after the MLP, and puts
their logits together. It uses torch.distributed: NCCL on GPUs, Gloo on the CPU, both within one machine.

On GPUs the ranks exchange what is short through memory that all of them read
(``torch.distributed._symmetric_memory``). The matrix products of attention and MLP write a rank's share
there, and one kernel adds up what all have left, with the residual and the norm that follow
(``clo.kernels.add_shares``); logits and tokens are taken from there (``clo.kernels.take_shares``); the sums
of embeddings are left to PyTorch's kernel for such memory. Each rank reads the shares of all others, which
for more than two ranks is more than NCCL moves, so the sums of prompts, which are bound by the link and not
by latency, go through NCCL then. So does what is long, and where GPUs cannot read each other's memory,
everything.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistBackendError, FileStore, ReduceOp  # type: ignore[attr-defined]

from clo.kernels.add_shares import add_shares
from clo.kernels.meeting import MOST_BLOCKS, Meeting
from clo.kernels.take_shares import take_shares
from clo.runtime.machine.process import GroupEnded
from clo.runtime.model.ranks import Rank
from clo.runtime.wire.errors import ConfigError

_ENVIRONMENT = {
    # Nobody outside this machine takes part.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    # Multicast over NVLink would save little in groups as small as these, and where a program that uses it
    # is killed, some drivers leave the GPUs unusable.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
_TIMEOUT = timedelta(hours=1)  # who is stuck is found by the launcher, long before
_SHORT_BYTES = 2**20  # of the largest sum that is bound by latency
_TAKEN_BYTES = 2**24  # of the most that a rank leaves for the others to take: logits of a hundred sequences
_SYMMETRIC_TYPES = (torch.bfloat16, torch.float32)  # that PyTorch adds up there

_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name from torch 2.13 on

_logger = logging.getLogger(__name__)


class Sum(IntEnum):
    """The sums of a layer, which take turns."""

    ATTENTION = 0
    MLP = 1


class Group:
    """This process as a rank of its group. All ranks have to call the same methods in the same order.

    On a GPU nothing waits for the device, but for ``least`` and ``mean``, and CUDA graphs can capture the
    rest. Such graphs have to be destroyed before the group.

    Args:
        rank: which one it is.
        device: of this rank alone.
        rendezvous: descriptor of an anonymous file that all ranks have opened, and no other process; the
            ranks find one another through it.
        longest: bytes of the longest sum that a residual and a norm follow.

    Attributes:
        shared: [bytes] uint8, memory that all ranks read, for short sums; None where there is none.
        meetings: the same for those of ``add_shares``: this rank's shares [bytes] uint8, and where those of
            all are, by ``Sum``; None where there is none.
        exchange: the same for what is taken from a rank as it is.

    Raises:
        ConfigError: the ranks cannot connect.
        GroupEnded: another rank has ended; so do all methods where torch.distributed says so. Through memory
            that all ranks read the device waits instead, until the launcher ends this process.
    """

    def __init__(
        self, rank: Rank, device: torch.device, rendezvous: int, longest: int = _SHORT_BYTES
    ) -> None:
        self.rank, self._device = rank, device
        os.environ.update(_ENVIRONMENT)
        cuda = device.type == "cuda"
        self._lost: type[RuntimeError] = DistBackendError if cuda else RuntimeError
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=FileStore(f"/proc/self/fd/{rendezvous}", rank.count),
                rank=rank.number,
                world_size=rank.count,
                timeout=_TIMEOUT,
                device_id=device if cuda else None,  # connects at once
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"The ranks of a worker cannot connect to one another ({reason}).") from None
        self.shared: Tensor | None = None
        self.meetings: list[tuple[Tensor, Meeting]] | None = None
        self.exchange: tuple[Tensor, Meeting] | None = None
        self._name = ""
        if cuda:
            self._share_memory(longest)

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which decides for all."""
        return self.rank.number == 0

    def sum(self, share: Tensor) -> Tensor:
        """The sum of what all ranks give, the same for all but for rounding; ``share`` may become it."""
        shared = self.shared
        if shared is not None and self._short(share):
            mine = shared[: share.nbytes].view(share.dtype).view(share.shape)
            mine.copy_(share)
            summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", self._name)
            return summed
        with self._explained():
            dist.all_reduce(share)
        return share

    def share(self, which: Sum, hidden: Tensor) -> Tensor | None:
        """Memory like ``hidden`` [B, hidden] that becomes this rank's share for ``add_shares``; None where
        that is not for such a sum."""
        if self.meetings is None or hidden.shape[1] % 8:  # which the kernel does not take
            return None
        memory, _ = self.meetings[which]
        if hidden.nbytes > len(memory):
            return None
        return memory[: hidden.nbytes].view(hidden.dtype).view(hidden.shape)

    def add_shares(
        self, which: Sum, hidden: Tensor, norm: Tensor, eps: float, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``hidden`` and what all ranks have written to ``share``, added up, and the RMSNorm of that; see
        ``clo.kernels.add_shares``. Both sums of a layer are to be asked for in turn."""
        assert self.meetings is not None, "who has a share has met"
        meeting = self.meetings[which][1]
        return add_shares(hidden, norm, meeting, self.rank.number, eps, in_place=in_place)

    def join(self, share: Tensor) -> Tensor:
        """What all ranks give, tensors of one shape, one behind the other in a new first dimension."""
        joined, share = share.new_empty(self.rank.count, *share.shape), share.contiguous()
        if not self._take(joined.flatten(1), share):
            with self._explained():
                _gather(joined.flatten(0, 1), share)
        return joined

    def take_from_first(self, tensor: Tensor) -> Tensor:
        """``tensor``, contiguous, which becomes that of the first rank."""
        if not self._take(tensor.view(1, -1), tensor):
            with self._explained():
                dist.broadcast(tensor, 0)
        return tensor

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks give."""
        agreed = torch.tensor(number, device=self._device)
        with self._explained():
            dist.all_reduce(agreed, ReduceOp.MIN)
        return int(agreed)

    def mean(self, number: float) -> float:
        """The mean of the numbers that the ranks give, the same for all."""
        total = torch.tensor(number, dtype=torch.float64, device=self._device)
        with self._explained():
            dist.all_reduce(total)
        return float(total) / self.rank.count

    def _take(self, taken: Tensor, share: Tensor) -> bool:
        """Make ``taken`` [ranks, any] what the first ranks give, through memory that all of them read; says
        whether that could be done."""
        if self.exchange is None or share.nbytes > len(self.exchange[0]) or share.nbytes % 8:
            return False
        memory, meeting = self.exchange
        memory[: share.nbytes].view(share.dtype).view(share.shape).copy_(share)
        take_shares(taken.view(torch.int64), meeting, self.rank.number)
        return True

    def _short(self, share: Tensor) -> bool:
        """Whether PyTorch adds it up in memory that all ranks read."""
        small = self.shared is not None and share.nbytes <= len(self.shared)
        return small and share.dtype in _SYMMETRIC_TYPES

    def _share_memory(self, longest: int) -> None:
        """Take memory that all ranks can read, if every one of them gets it; ``longest`` as for ``Group``."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        shared: Tensor | None = None
        addresses: list[int] = []
        multiprocessors = torch.cuda.get_device_properties(self._device).multi_processor_count
        blocks = self.least(min(MOST_BLOCKS, multiprocessors))  # each of which may need one of its own
        sizes = _shared_sizes(self.rank.count, longest, blocks)
        # The ranks agree before they meet in ``rendezvous``, or one would wait there for the others.
        able = all(_reach(self._device.index, other) for other in self._peers())
        if self.least(able):
            try:
                shared = symmetric_memory.empty(sum(sizes), dtype=torch.uint8, device=self._device)
            except RuntimeError as error:
                _logger.info("A GPU has no memory to share: %s.", str(error).splitlines()[0])
        if self.least(shared is not None):
            assert shared is not None
            try:
                addresses = symmetric_memory.rendezvous(shared, name).buffer_ptrs
            except RuntimeError as error:
                _logger.info("GPUs do not share memory: %s.", str(error).splitlines()[0])
        if self.least(bool(addresses)):
            assert shared is not None
            self.shared, *places, flags = shared.split(sizes)
            self._name = name
            flags.zero_()
            self.least(0)  # as all ranks have done
            begins = torch.tensor(addresses, device=self._device)
            met = torch.zeros(blocks, dtype=torch.int32, device=self._device)
            self.exchange, *self.meetings = (
                (memory, Meeting(begins + sum(sizes[:number]), begins + sum(sizes[:-1]), met))
                for number, memory in enumerate(places, 1)
            )
        elif self.leads:
            _logger.info("All sums of the ranks go through NCCL.")

    def _peers(self) -> list[int]:
        """The devices of all ranks."""
        own = torch.tensor([self._device.index], device=self._device)
        return [int(device) for device in self.join(own)]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what torch.distributed raises where another rank is gone into ``GroupEnded``."""
        try:
            yield
        except self._lost as error:
            raise GroupEnded("The other ranks do not answer: " + str(error).partition("\n")[0]) from None


def shared_bytes(ranks: int, longest: int) -> int:
    """GPU memory of each of so many ranks that the others read, at most; ``longest`` as for ``Group``."""
    return sum(_shared_sizes(ranks, longest, MOST_BLOCKS)) if ranks > 1 else 0


def _shared_sizes(ranks: int, longest: int, blocks: int) -> tuple[int, ...]:
    """Bytes for PyTorch's sums, for what is taken, for each ``Sum``, and for the flags of so many blocks."""
    place = -(-longest // _SHORT_BYTES) * _SHORT_BYTES if ranks == 2 else _SHORT_BYTES
    return _SHORT_BYTES, _TAKEN_BYTES, *[place] * len(Sum), 4 * blocks * ranks


def _reach(own: int, other: int) -> bool:
    """Whether a GPU can read and write another one's memory, and exchange values there in one piece, as
    PyTorch's sums do. Over PCIe most can do the former alone."""
    from cuda.bindings import driver  # here, because a machine without a GPU needs none

    if own == other:
        return True
    attributes = driver.CUdevice_P2PAttribute
    for attribute in (
        attributes.CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED,
        attributes.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED,
    ):
        status, value = driver.cuDeviceGetP2PAttribute(attribute, own, other)
        if status != driver.CUresult.CUDA_SUCCESS or not value:
            return False
    return True
