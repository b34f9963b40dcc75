"""Keep a process on one NUMA node: its threads on the node's CPUs, its new pages in the node's memory; and
pieces of its memory on others."""

import ctypes
import logging
import mmap
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clo.runtime.wire.errors import ConfigError

_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
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


def bind_pages(address: int, size: int, node: int) -> None:
    """Let the pages of a piece of memory come from a NUMA node when they are first touched, whichever thread
    or process does so.

    They come from no other node, as with ``bind``: where that one has no room the kernel drops what it has
    cached of files there, and in the end kills a process. With a mere preference the pages would lie
    elsewhere as soon as reading the weights has filled the node with such a cache, and nobody would know.

    Args:
        address, size: whole pages, in bytes.

    Raises:
        OSError: no such node, none that this process may use, or a container that forbids the call.
    """
    mask, bits = _mask(node)
    where = ctypes.c_void_p(address), ctypes.c_ulong(size)
    _call("mbind", _MBIND, *where, ctypes.c_int(_MPOL_BIND), mask, bits, ctypes.c_uint(0))


def check_pages(node: int) -> None:
    """Raises what ``bind_pages`` does, for a page that nobody uses."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        bind_pages(ctypes.addressof(ctypes.c_char.from_buffer(page)), len(page), node)


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
    mask, bits = _mask(node)
    _call("set_mempolicy", _SET_MEMPOLICY, ctypes.c_int(_MPOL_BIND), mask, bits)


def _mask(node: int) -> tuple["ctypes.Array[ctypes.c_ulong]", ctypes.c_ulong]:
    """A node as the kernel's calls take it: a mask, and its size in bits, of which they use one less."""
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_MAX_NODES // word_bits))()
    mask[node // word_bits] = 1 << (node % word_bits)
    return mask, ctypes.c_ulong(_MAX_NODES + 1)


def _call(name: str, numbers: Mapping[str, int], *arguments: Any) -> None:
    """A system call with its numbers by machine. Raises ``OSError`` where it fails or is not known."""
    machine = platform.machine()
    if machine not in numbers:
        raise OSError(f"memory binding is not known on {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(numbers[machine]), *arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
