"""Keep a process on one NUMA node: its threads on the node's CPUs, its new pages in the node's memory."""

import ctypes
import logging
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from clo.runtime.wire.errors import ConfigError

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # system call numbers
_MPOL_BIND = 2
_MAX_NODES = 1024

_NODES = Path("/sys/devices/system/node")
_DEVICES = Path("/sys/bus/pci/devices")
_logger = logging.getLogger(__name__)


def bind(node: int) -> None:
    """Bind the calling thread, and those that it starts later, to a NUMA node.

    Where that is not possible (no such node, none of its CPUs allowed, a container that forbids the call) one
    warning is logged and the process goes on, which is slower but correct. Libraries that counted the CPUs
    before this call keep their number of threads.
    """
    try:
        os.sched_setaffinity(0, _allowed_cpus(node))
        _bind_memory(node)
    except OSError as error:
        _logger.warning("Not bound to NUMA node %d, memory may be remote: %s.", node, error)


def check_nodes(nodes: Iterable[int]) -> None:
    """Raises ``ConfigError`` for a node that this machine has not got; nothing happens where it does not say
    which it has, as in some containers."""
    known = sorted(int(path.name.removeprefix("node")) for path in _NODES.glob("node[0-9]*"))
    missing = [node for node in nodes if node not in known]
    if known and missing:
        names = ", ".join(f"numa{node}" for node in known)
        raise ConfigError(f"--kvstore numa{missing[0]} is none of this machine's nodes: {names}.")


def device_node(device: int) -> int | None:
    """NUMA node of a CUDA device, or None where the machine does not say."""
    from cupy.cuda import runtime  # here, because a machine without a GPU needs none

    bus = runtime.deviceGetPCIBusId(device).lower()
    try:
        node = int((_DEVICES / bus / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1 on machines with one node, and in many virtual ones


def _allowed_cpus(node: int) -> set[int]:
    text = (_NODES / f"node{node}" / "cpulist").read_text().strip()
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    allowed = cpus & os.sched_getaffinity(0)
    if not allowed:
        raise OSError("this process may use none of its CPUs")
    return allowed


def _bind_memory(node: int) -> None:
    machine = platform.machine()
    if machine not in _SET_MEMPOLICY:
        raise OSError(f"memory binding is not known on {machine}")
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_MAX_NODES // word_bits))()
    mask[node // word_bits] = 1 << (node % word_bits)
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel uses one bit less than the size that it is given.
    size = ctypes.c_ulong(_MAX_NODES + 1)
    if libc.syscall(ctypes.c_long(_SET_MEMPOLICY[machine]), ctypes.c_int(_MPOL_BIND), mask, size) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"set_mempolicy: {os.strerror(error)}")
