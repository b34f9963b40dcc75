"""The disk tier: copies of committed blocks in files, for prompts that begin like ones whose blocks have left
the arena, also after a restart.

A block is written as soon as it is committed, in the background. Nobody writes to it from then on, so it is
copied while its prompt is still being answered, long before its space can be needed: taking the space never
waits for a disk, and what has been computed outlives the process. To write only what is about to leave the
arena would write no less in the end, since a full arena gives up each block at some time. A block whose space
is taken all the same before its turn has come is not written.

One file is one block (``clo.kvstore.block_file`` has the format). It is written as ``.tmp`` under its name,
flushed and renamed. (The folder is not flushed: a name that a power failure takes back is one file less.) It
is read whole and believed only if it is found to be what was written, for this block, model and, where there
is one, key; what is not is as if it were not there. Those that begin with ``CLOKVBLK``, or end before that,
are of this tier, and removed where they cannot be used, also those of another model, version or key. Other
files are left alone. The files hold what prompts say, in a form from which it can be told: the folder has
mode 0700 and the files 0600, and with a key they are encrypted.

Where the folder is full, the files end first whose chains were used longest ago, of a chain the end before
the beginning. The order is that of use, not of a clock; only at a start the files' times stand for it.

Threads of this tier's own read and write, each with one block besides the arena, and wake the store's loop
through ``DiskTier.fd``. All methods are for the thread of that loop.
"""

import fcntl
import hashlib
import logging
import os
import re
import select
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clo.kvstore.block_file import (
    PAGE_BYTES,
    ROOT_BYTES,
    SUFFIX,
    BlockFiles,
    EncryptedBlockFiles,
    Fields,
    Foreign,
    Unusable,
)
from clo.kvstore.pool import Load
from clo.kvstore.prefix import NAME_BYTES
from clo.kvstore.uncached import aligned, read, uncached, write
from clo.runtime.wire.errors import ConfigError

STUCK_S = 20.0  # that one block may take; then no prompt waits for this disk any more

_NONE = bytes(NAME_BYTES)  # before the first block of a prompt
READERS = 4
_FILE, _TEMPORARY = re.compile(r"[0-9a-f]{32}\.kv"), re.compile(r"[0-9a-f]{32}\.tmp")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # no waiting for a pipe's other end
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC

_logger = logging.getLogger(__name__)


def root_of(model: str, layers: int, kv_heads: int, block_tokens: int, block_bytes: int) -> bytes:
    """The root of all files of a store: ``ROOT_BYTES`` that differ where the rows of equal names might.

    Args:
        model: what decides about rows, but for the tokens (``clo.runtime.model.fingerprint``).
        layers, kv_heads, block_tokens, block_bytes: the shape of a block.
    """
    text = f"{layers} {kv_heads} {block_tokens} {block_bytes} {model}"
    return hashlib.blake2b(text.encode(), digest_size=ROOT_BYTES).digest()


class _Outcome(Enum):
    """What has become of a read."""

    THERE = auto()
    MISSING = auto()
    UNUSABLE = auto()
    FOREIGN = auto()


@dataclass
class _Copy:
    """A block that is to be written. ``taken`` is set by the loop before anybody may write to the block."""

    name: bytes
    parent: bytes
    block: int
    taken: bool = False


@dataclass
class _Reading:
    """A load under way. Only under the lock, and only unless it is given up, may its blocks be written to."""

    load: Load
    outcomes: list[_Outcome | None]
    given_up: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class DiskTier:
    """Copies of blocks in a folder that belongs to one store.

    Args:
        folder: it is made where there is none.
        most: bytes that all files may have together.
        root: ``ROOT_BYTES`` of ``root_of``; files of another root are removed.
        blocks: the arena's bytes as [layers * kv_heads][blocks][bytes of one layer and head].
        key: the files are encrypted with it, see ``read_disk_key``; None for files that are not.

    Attributes:
        fd: readable where ``finished`` has something to do.
        hits: blocks that have come back from the disk so far.
        unusable: files that were not what they should be, or could not be read.

    Raises:
        ConfigError: the folder cannot be used, another store uses it, not one block fits, or a package is
            missing.
    """

    def __init__(
        self, folder: Path, most: int, root: bytes, blocks: NDArray[np.uint8], key: bytes | None = None
    ) -> None:
        self._blocks = blocks
        size = blocks.shape[0] * blocks.shape[2]
        self._files = BlockFiles(root, size) if key is None else EncryptedBlockFiles(root, size, key)
        self._capacity = most // self._files.file_bytes
        if self._capacity == 0:
            raise ConfigError(
                f"One block of the KV cache takes {self._files.file_bytes} bytes on disk, --kv-disk-size is "
                f"{most}: raise it."
            )
        self._folder, self._lock = _open(folder)
        self._path = folder
        self._parents: OrderedDict[bytes, bytes] = OrderedDict()  # by name; the one that ends next first
        self._foreign: set[str] = set()  # files of others that have names of blocks
        self._queue: OrderedDict[bytes, _Copy] = OrderedDict()  # by name
        self._current: _Copy | None = None  # is being written
        self._by_block: dict[int, _Copy] = {}  # both
        self._readings: list[_Reading] = []
        self._since: dict[int, float] = {}  # when each thread began to read the block that it reads
        self._results: deque[Callable[[], None]] = deque()  # what threads leave for the loop to do
        self._buffers = threading.local()
        self._warned: set[str] = set()
        self._off = False
        self.hits = self.unusable = 0
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._writer = ThreadPoolExecutor(1, "disk-writer")
        self._readers = ThreadPoolExecutor(READERS, "disk-reader")
        self._scan()

    @property
    def blocks(self) -> int:
        """Blocks on disk."""
        return len(self._parents)

    @property
    def timeout_ms(self) -> int | None:
        """How long the loop may sleep before it calls ``finished``, None for as long as it likes."""
        if not self._readings:
            return None
        now = time.monotonic()
        first = min(self._since.copy().values(), default=now)
        return max(0, int(1000 * (first + STUCK_S - now))) + 1

    @property
    def writing(self) -> bool:
        """Whether there is a block to write."""
        return self._current is not None

    def drain(self, seconds: float) -> int:
        """Write what is queued, for so long at most. Returns the number of blocks that this was too short
        for; to be followed by the end of the process."""
        deadline = time.monotonic() + seconds
        while self.writing and (left := deadline - time.monotonic()) > 0:
            select.select([self.fd], [], [], left)
            self.finished()
        return len(self._by_block)

    def close(self) -> None:
        """Wait for the threads, write what is queued, and leave the folder to others."""
        while self.writing or self._readings:
            self.finished()
            time.sleep(0.001)
        self._writer.shutdown()
        self._readers.shutdown()
        for descriptor in (self.fd, self._lock, self._folder):
            os.close(descriptor)

    # ------------------------------------------------------------------------ what a pool asks

    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """A prompt has committed the blocks of a chain from its beginning on, or shares them: write those
        that are not on disk, and count the others as used."""
        if self._off:
            return
        parent = _NONE
        for name, block in zip(names, blocks, strict=True):
            there = name in self._parents or self._files.file(name) in self._foreign
            if not there and block not in self._by_block:  # of which the copy has this name
                self._queue[name] = self._by_block[block] = _Copy(name, parent, block)
            parent = name
        self._use(reversed(names))
        self._write_next()

    def taken(self, block: int) -> None:
        """The rows of a block are about to be overwritten."""
        copy = self._by_block.pop(block, None)
        if copy is not None:
            copy.taken = True
            self._queue.pop(copy.name, None)

    def found(self, names: Sequence[bytes]) -> int:
        """How many of the names, from the first one on, are on disk."""
        if self._off:
            return 0
        return next((place for place, name in enumerate(names) if name not in self._parents), len(names))

    # ------------------------------------------------------------------------ what a loop asks

    def read(self, load: Load) -> None:
        """Begin to read blocks; ``finished`` says when that is done."""
        self._use(reversed(load.names))
        reading = _Reading(load, [None] * len(load.names))
        self._readings.append(reading)
        for place in range(len(load.names)):
            self._readers.submit(self._read, reading, place)

    def finished(self) -> list[tuple[Load, int]]:
        """Loads that are over, each with the number of blocks from its first one on that have their rows."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        while self._results:
            self._results.popleft()()
        if any(time.monotonic() - since >= STUCK_S for since in self._since.copy().values()):
            self._off = True
        over: list[tuple[Load, int]] = []
        for reading in list(self._readings):
            if None in reading.outcomes:
                if not self._off:
                    continue
                with reading.lock:
                    reading.given_up = True
                self._warn("stuck", f"has not brought a block within {STUCK_S:g} s and is not used any more")
            self._readings.remove(reading)
            good = 0
            while good < len(reading.outcomes) and reading.outcomes[good] is _Outcome.THERE:
                good += 1
            self.hits += good
            over.append((reading.load, good))
        return over

    # ------------------------------------------------------------------------ in the loop's thread

    def _use(self, ends_first: Iterable[bytes]) -> None:
        for name in ends_first:
            if name in self._parents:
                self._parents.move_to_end(name)

    def _chain(self, name: bytes) -> list[bytes]:
        """A block on disk and those before it, the end first."""
        names = []
        while name in self._parents:
            names.append(name)
            name = self._parents[name]
        return names

    def _write_next(self) -> None:
        """Give the next block to the writer, if it has none. No file is written without those before it, for
        which others had to end."""
        while self._queue and self._current is None:
            _, copy = self._queue.popitem(last=False)
            before = self._chain(copy.parent)
            whole = copy.parent == _NONE or bool(before)
            self._use(before)
            full = len(self._parents) >= self._capacity
            victim = next(iter(self._parents)) if full else None
            if not whole or copy.name in self._parents or victim in before:
                del self._by_block[copy.block]
                continue
            if victim is not None:
                del self._parents[victim]
            self._current = copy
            self._writer.submit(self._write, copy, victim)

    def _written(self, copy: _Copy, done: bool) -> None:
        self._current = None
        if not copy.taken:
            del self._by_block[copy.block]
        if done:
            self._parents[copy.name] = copy.parent
            self._use(self._chain(copy.name))
        self._write_next()

    def _came(self, reading: _Reading, place: int, outcome: _Outcome) -> None:
        reading.outcomes[place] = outcome
        if outcome is _Outcome.THERE:
            return
        name = reading.load.names[place]
        file = self._files.file(name)
        if outcome is _Outcome.FOREIGN:
            self._foreign.add(file)
        if self._parents.pop(name, None) is not None and outcome is _Outcome.UNUSABLE:
            self.unusable += 1
            self._writer.submit(self._remove, file)  # there, so that it ends before its name is written again

    def _warn(self, about: str, what: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            _logger.warning("The KV cache on disk at %s %s; the server goes on without.", self._path, what)

    # ------------------------------------------------------------------------ in other threads

    def _leave(self, result: Callable[[], None]) -> None:
        self._results.append(result)
        os.eventfd_write(self.fd, 1)

    def _buffer(self) -> NDArray[np.uint8]:
        """A file of this thread's own."""
        if not hasattr(self._buffers, "buffer"):
            self._buffers.buffer = aligned(self._files.file_bytes)
        buffer: NDArray[np.uint8] = self._buffers.buffer
        return buffer

    def _rows(self, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The block of a buffer, as [layers * kv_heads][bytes of one layer and head]."""
        return self._files.block(buffer).reshape(self._blocks.shape[0], self._blocks.shape[2])

    def _write(self, copy: _Copy, victim: bytes | None) -> None:
        done = False
        try:
            if victim is not None:
                self._remove(self._files.file(victim))
            buffer = self._buffer()
            np.copyto(self._rows(buffer), self._blocks[:, copy.block])
            if not copy.taken:  # not even by now, so all of it was the block's
                self._files.seal(Fields(copy.name, copy.parent), buffer)
                self._write_file(self._files.file(copy.name), buffer)
                done = True
        except OSError as error:
            self._warn("write", f"cannot be written ({error.strerror})")
        except Exception:
            _logger.exception("A block could not be written to disk.")
        finally:
            self._leave(lambda: self._written(copy, done))

    def _write_file(self, file: str, buffer: NDArray[np.uint8]) -> None:
        """Raises ``OSError``; then nothing is left of the file."""
        temporary = f"{file.removesuffix(SUFFIX)}.tmp"
        try:
            with uncached(temporary, _WRITE, dir_fd=self._folder) as descriptor:
                write(descriptor, buffer)
            os.rename(temporary, file, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=self._folder)
            raise

    def _remove(self, file: str) -> None:
        try:
            os.unlink(file, dir_fd=self._folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn("remove", f"cannot be cleared ({error.strerror})")

    def _read(self, reading: _Reading, place: int) -> None:
        outcome, thread = _Outcome.UNUSABLE, threading.get_ident()
        self._since[thread] = time.monotonic()
        try:
            if reading.given_up:
                outcome = _Outcome.MISSING
                return
            buffer = self._buffer()
            self._read_file(self._files.file(reading.load.names[place]), buffer)
            with reading.lock:
                if not reading.given_up:
                    np.copyto(self._blocks[:, reading.load.blocks[place]], self._rows(buffer))
            outcome = _Outcome.THERE
        except FileNotFoundError:  # it has ended meanwhile
            outcome = _Outcome.MISSING
        except Foreign:
            outcome = _Outcome.FOREIGN
        except Unusable as problem:
            _logger.info("A file of the KV cache on disk is not used: %s", problem)
        except OSError as error:
            self._warn("read", f"cannot be read ({error.strerror})")
        except Exception:
            _logger.exception("A block could not be read from disk.")
        finally:
            del self._since[thread]
            self._leave(lambda: self._came(reading, place, outcome))

    def _read_file(self, file: str, buffer: NDArray[np.uint8]) -> None:
        """Read a file and see that it is what was written; then the buffer has its block.

        Raises:
            Foreign, Unusable, OSError: it is not.
        """
        with uncached(file, _READ, dir_fd=self._folder) as descriptor:
            self._page(file, descriptor, buffer)
            rest = buffer[PAGE_BYTES:]
            if read(descriptor, rest, PAGE_BYTES) < len(rest):
                raise Unusable(f"{file} has been cut short.")
            with suppress(OSError):
                os.utime(descriptor)  # for the order of a later start
        self._files.open(file, buffer)

    def _page(self, file: str, descriptor: int, buffer: NDArray[np.uint8]) -> Fields:
        """Read what the first page of a file says.

        Raises:
            Foreign, Unusable, OSError: it is not to be used.
        """
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Foreign
        read(descriptor, buffer[:PAGE_BYTES], 0)
        return self._files.page(file, buffer, found.st_size)

    # ------------------------------------------------------------------------ at the start

    def _scan(self) -> None:
        """Find what former stores have left here, by the first pages alone. What is behind a block that is
        missing is of no use, and removed like what cannot be used."""
        used: dict[bytes, int] = {}  # when
        parents: dict[bytes, bytes] = {}
        try:
            for file in os.listdir(self._folder):
                if _TEMPORARY.fullmatch(file):
                    os.unlink(file, dir_fd=self._folder)
                elif _FILE.fullmatch(file) and (seen := self._see(file)) is not None:
                    (name, parent), when = seen
                    parents[name], used[name] = parent, when
        except OSError as error:
            self._warn("read", f"cannot be read ({error.strerror})")
        order: list[bytes] = []  # the last used first, and each behind those before it
        whole = {_NONE: True}
        for name in sorted(used, key=used.__getitem__, reverse=True):
            path = []
            while name not in whole and name in parents:
                path.append(name)
                whole[name] = False  # for names that lead in a circle
                name = parents[name]
            good = whole.get(name, False)
            whole.update(dict.fromkeys(path, good))
            if good:
                order += reversed(path)
        for name in parents.keys() - set(order[: self._capacity]):
            self._remove(self._files.file(name))
        self._parents.update((name, parents[name]) for name in reversed(order[: self._capacity]))

    def _see(self, file: str) -> tuple[Fields, int] | None:
        """What a file says of its block and when it was used, None where it cannot be used; then it is
        removed, or left to its owner."""
        try:
            with uncached(file, _READ, dir_fd=self._folder) as descriptor:
                return self._page(file, descriptor, self._buffer()), os.fstat(descriptor).st_mtime_ns
        except Unusable as problem:
            _logger.info("A file of the KV cache on disk is removed: %s", problem)
            self.unusable += 1
            self._remove(file)
        except (Foreign, OSError):  # such as a link
            self._foreign.add(file)
        return None


def _open(folder: Path) -> tuple[int, int]:
    """Descriptors of the folder and of its lock, which is this process's while it lives.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        for path in (folder.parent, folder):
            with suppress(FileExistsError):  # as what, shows next
                path.mkdir(mode=0o700, parents=True)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(opened, 0o700)  # fails where the folder is of another user
            lock = os.open(
                "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=opened
            )
        except OSError:
            os.close(opened)
            raise
    except OSError as error:
        raise ConfigError(
            f"--kv-disk: {folder} cannot be used ({error.strerror}); name a folder that this user can write."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(opened)
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise ConfigError(
                f"--kv-disk: {folder} is used by another server; give each a folder of its own."
            ) from None
        raise ConfigError(
            f"--kv-disk: {folder} cannot be used ({error.strerror}); name a folder on a local disk."
        ) from None
    return opened, lock
