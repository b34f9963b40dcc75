"""Files that are read and written past the page cache.

Memory of the host that a server has not pinned is what is left for others, and the page cache would fill it
with blocks for which the arena is the better cache. With ``O_DIRECT`` the disk reads and writes a buffer
itself; where a file system refuses that (EINVAL), what was written is flushed and the cache is told to drop
it, as it is after a read.

Places in memory and in a file, and what is transferred, are multiples of 4096 bytes: a disk's own sectors
have 512 or as many.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray


def aligned(size: int) -> NDArray[np.uint8]:
    """A buffer of zeros for ``read`` and ``write``; it takes memory as it is written to."""
    return np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


@contextmanager
def uncached(file: str, flags: int, *, dir_fd: int) -> Iterator[int]:
    """A descriptor for ``read`` and ``write``, as of ``os.open``. Raises ``OSError``."""
    try:
        descriptor = os.open(file, flags | os.O_DIRECT, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(file, flags, 0o600, dir_fd=dir_fd)
    try:
        yield descriptor
        if not _is_direct(descriptor):
            with suppress(OSError):  # it is advice
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def write(descriptor: int, buffer: NDArray[np.uint8]) -> None:
    """Write a file and flush it, for only then is it known whether the disk had space.

    Args:
        buffer: the whole file; from ``aligned``, and a multiple of 4096 bytes long.

    Raises:
        OSError: it cannot be written.
    """
    _transfer(os.pwritev, descriptor, buffer, 0)
    os.fdatasync(descriptor)  # the page cache, where it is in use, drops no pages that have not been flushed


def read(descriptor: int, buffer: NDArray[np.uint8], offset: int) -> int:
    """Fill a buffer with a file's bytes from ``offset`` on.

    Args:
        buffer: a part of one from ``aligned``; its beginning and its end, like ``offset``, are multiples of
            4096.

    Returns:
        How many bytes there were, if fewer than the buffer has.

    Raises:
        OSError: they cannot be read.
    """
    return _transfer(os.preadv, descriptor, buffer, offset)


def _transfer(call: Callable[..., int], descriptor: int, buffer: NDArray[np.uint8], offset: int) -> int:
    done = 0
    while done < len(buffer):
        try:
            count = call(descriptor, [buffer[done:].data], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(descriptor):
                raise
            # refused only now, or what is left does not begin where it may: at the end of a full disk
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        if count == 0:
            break
        done += count
    return done


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
