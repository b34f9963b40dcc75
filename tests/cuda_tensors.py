"""Tensors for tests of CUDA kernels: the same values on both sides, and where the GPU would have them."""

import mmap
from functools import cache

import numpy as np
import torch
from torch import Tensor

from clo.gpu_worker.pinning import pin
from clo.kernels.resident import ResidentSet

SINKS, RECENT = 4, 64


@cache
def pinned() -> tuple[Tensor, Tensor]:
    """256 MiB of CPU memory that the GPU reads in place, and the GPU's view of it."""
    memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 2**28), np.uint8))
    return memory, pin(memory)


def mapped(like: Tensor) -> Tensor:
    """The GPU's view of a copy of a CPU tensor in pinned CPU memory; there is one at a time."""
    memory, view = pinned()
    memory[: like.nbytes].view(like.dtype).view(like.shape).copy_(like)
    return view[: like.nbytes].view(like.dtype).view(like.shape)


def inner(tensor: Tensor) -> Tensor:
    """The same values as part of a wider tensor, as queries and rows are of one projection."""
    wide = torch.full((len(tensor), tensor[0].numel() + 32), torch.nan, dtype=tensor.dtype)
    wide[:, 16:-16] = tensor.flatten(1)
    part = wide.cuda()[:, 16:-16]
    return part.view(tensor.shape)


def on_gpu(resident: ResidentSet) -> ResidentSet:
    """A copy of the set on the GPU."""
    rows, positions, last_used = (tensor.cuda() for tensor in resident[:3])
    return resident._replace(rows=rows, positions=positions, last_used=last_used)


def resident_set(batch: int, kv_heads: int, capacity: int, dim: int, dtype: torch.dtype) -> ResidentSet:
    """A resident set without any positions, whose rows are random."""
    positions = torch.full((batch, kv_heads, capacity), -1, dtype=torch.int32)
    rows = torch.randn(batch, kv_heads, SINKS + RECENT + capacity, 2, dim).to(dtype)
    return ResidentSet(rows, positions, positions.clone(), SINKS, RECENT)


def same(*pairs: tuple[Tensor, Tensor]) -> None:
    for expected, found in pairs:
        assert torch.equal(expected, found.cpu())


def random_prompt(count: int, total: int, kv_heads: int, group: int, dim: int) -> tuple[Tensor, Tensor]:
    """Queries as a view of fused projections, and rows."""
    heads = kv_heads * (group + 2)
    query = torch.randn(count, heads, dim, dtype=torch.bfloat16, device="cuda")[:, : kv_heads * group]
    return query, torch.randn(total, kv_heads, 2, dim, dtype=torch.bfloat16, device="cuda")


def error(found: Tensor, expected: Tensor) -> float:
    """As a share of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
