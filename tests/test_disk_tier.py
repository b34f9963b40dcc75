"""The disk tier under a block pool: blocks that come back from files, a bound, and disks that fail."""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import random
import threading
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clo.kvstore import disk
from clo.kvstore.disk import DiskTier
from clo.kvstore.pool import Grant
from clo.kvstore.prefix import chain
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.kv_events import BlockRemoved, BlockStored
from tests.disk_cache import (
    BLOCKS,
    FILE_BYTES,
    OTHER,
    PROMPT,
    ROOT,
    SHAPE,
    SIZE,
    cache,
    files,
    names_of,
    plain_and_encrypted,
)
from tests.faults import WAIT_S

key = plain_and_encrypted


def test_blocks_that_have_left_the_arena_come_back_from_disk(tmp_path: Path, key: bytes | None) -> None:
    """And so do those of a server that has ended, for prompts under the same salt alone. The events say what
    is in the arena."""
    with cache(tmp_path, key=key) as first:
        assert first.run(PROMPT) == 0
        assert (first.tier.blocks, first.tier.hits) == (3, 0)
        assert first.run(PROMPT) == 3, "from the arena"
        assert first.tier.hits == 0
        first.pool.events()
        first.evict()
        removed = first.pool.events()
        assert [type(event) for event in removed] == [BlockRemoved] * 3
        assert first.run([*PROMPT[:8], 99, 99, 99, 99, 99]) == 2
        stored = [event for event in first.pool.events() if isinstance(event, BlockStored)]
        assert [event.token_ids for event in stored] == [PROMPT[:4], PROMPT[4:8], [99] * 4]
        assert first.run(PROMPT) == 3, "two from the arena, one from disk"
        assert (first.tier.hits, first.tier.blocks) == (3, 4)
        assert first.pool.cached_tokens == (3 + 2 + 3) * SIZE
    with cache(tmp_path, key=key) as second:
        assert (second.tier.blocks, second.tier.unusable) == (4, 0)
        assert second.run(PROMPT, "of a tenant") == 0
        assert second.run(PROMPT) == 3
        second.evict()
        assert second.run(PROMPT, "of a tenant") == 3
    assert {S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_the_folder_has_a_bound_and_ends_go_before_beginnings(tmp_path: Path) -> None:
    """Those used longest ago first, also after a restart with less, when the files' times stand for it."""
    third = list(range(201, 214))
    with cache(tmp_path, 7 * FILE_BYTES + 1) as one:
        one.run(PROMPT)
        one.run(OTHER)
        assert one.run(PROMPT) == 3, "from the arena; but then they are used on disk, too"
        one.run(third)
        assert files(tmp_path) == {*names_of(PROMPT), *names_of(OTHER)[:1], *names_of(third)}
        one.evict()
        assert (one.run(PROMPT), one.run(OTHER)) == (3, 1)
        assert files(tmp_path) == {*names_of(PROMPT), *names_of(OTHER), *names_of(third)[:1]}
    for seconds, names in ((1, names_of(third)[:1]), (2, names_of(PROMPT))):
        for name in names:
            os.utime(tmp_path / name, (seconds, seconds))
    with cache(tmp_path, 5 * FILE_BYTES) as one:
        assert files(tmp_path) >= {*names_of(OTHER), *names_of(PROMPT)[:2]}
        assert one.tier.blocks == 5
    with cache(tmp_path, 2 * FILE_BYTES) as one:
        one.evict()
        one.run(third)
        assert one.tier.blocks == 2
        one.evict()
        assert one.run(third) == 2, "the end does not take the place of its own beginning"
    with pytest.raises(ConfigError, match="--kv-disk-size is 12287: raise it"):
        DiskTier(tmp_path, FILE_BYTES - 1, ROOT, np.zeros(SHAPE, np.uint8))


@pytest.mark.parametrize(
    ("call", "number"), [("pwritev", errno.ENOSPC), ("open", errno.EACCES), ("rename", errno.EROFS)]
)
def test_a_disk_that_cannot_be_written_costs_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    number: int,
    key: bytes | None,
) -> None:
    """No half of a file is left, and once there is space again it is used."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with cache(tmp_path, key=key) as one, caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            assert (one.run(PROMPT), one.run(OTHER)) == (0, 0)
            one.run(OTHER)
        assert (files(tmp_path), one.tier.blocks) == (set(), 0)
        (record,) = caplog.records
        assert os.strerror(number) in record.getMessage() and str(tmp_path) in record.getMessage()
        one.evict()
        assert (one.run(PROMPT), one.tier.blocks) == (0, 3)


def test_a_disk_that_cannot_be_read_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: bytes | None
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with cache(tmp_path, key=key) as one, caplog.at_level(logging.WARNING):
        one.run(PROMPT)
        one.evict()
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            assert one.run(PROMPT) == 0
        (record,) = caplog.records
        assert os.strerror(errno.EIO) in record.getMessage()
        one.evict()
        assert one.run(PROMPT) == 3, "they were written anew"


def test_a_disk_that_brings_nothing_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: bytes | None
) -> None:
    """What it brings later touches no block."""
    release, preadv = threading.Event(), os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert release.wait(WAIT_S)
        return preadv(descriptor, buffers, offset)

    with caplog.at_level(logging.WARNING):
        with cache(tmp_path, key=key) as one:
            one.run(PROMPT)
            one.evict()
            monkeypatch.setattr(disk, "STUCK_S", 0.0)
            monkeypatch.setattr(os, "preadv", slow)
            grant = one.grant(100, PROMPT)
            assert grant.cached == 0
            one.memory[:] = 7
            release.set()
        assert (one.memory == 7).all()
    (record,) = caplog.records
    assert "is not used any more" in record.getMessage()
    assert one.tier.found(chain(array("i", PROMPT), SIZE)) == 0


def test_a_sequence_that_goes_while_its_blocks_are_read_leaves_them_to_nobody_else(tmp_path: Path) -> None:
    """And another one that wants the same is served with them."""
    with cache(tmp_path) as one:
        one.run(PROMPT)
        one.evict()
        one.pool.allocate(0, 100, 4, PROMPT)
        one.pool.allocate(0, 101, 4, PROMPT)
        assert not [*one.pool.grants()]
        (load,) = one.pool.loads()
        one.pool.check_integrity()
        assert one.pool.free(0, 100) == 4
        one.pool.allocate(0, 102, BLOCKS)
        assert not [*one.pool.grants()], "three of the blocks are being written to"
        one.pool.check_integrity()
        one.pool.free(0, 102)
        one.pool.loaded(load, 3)
        assert not [*one.pool.grants()], "nobody has got the rows, and the next one begins to read"
        (load,) = one.pool.loads()
        one.tier.read(load)
        while not (over := one.tier.finished()):
            one.wait()
        one.pool.loaded(*over[0])
        (grant,) = one.pool.grants()
        assert isinstance(grant, Grant)
        assert (grant.sequence, grant.cached) == (101, 3)
        one.pool.check_integrity()


def test_a_block_whose_space_is_taken_while_it_is_copied_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bytes | None
) -> None:
    """Nor are those behind it, whose turn has not come."""
    copied, release, copyto = threading.Event(), threading.Event(), np.copyto

    def slow(into: NDArray[np.uint8], rows: NDArray[np.uint8]) -> None:
        copyto(into, rows)
        copied.set()
        assert release.wait(WAIT_S)

    with cache(tmp_path, key=key) as one:
        with monkeypatch.context() as patch:
            patch.setattr(np, "copyto", slow)
            one.grant(1, PROMPT)
            one.pool.commit(0, 1, 0, PROMPT)
            one.pool.free(0, 1)
            assert copied.wait(WAIT_S)
            one.evict()
            release.set()
            one.settle()
        assert (files(tmp_path), one.tier.blocks) == (set(), 0)
        assert one.run(PROMPT) == 0
        assert one.tier.blocks == 3


def test_any_use_gives_the_rows_that_were_computed(tmp_path: Path, key: bytes | None) -> None:
    """With writes under way while the arena is used for something else, damage anywhere, and restarts with
    more or less space."""
    draw = random.Random(0)
    hits = 0
    for _ in range(30):
        most = draw.choice([1, 3, 5, 8, 20])
        with cache(tmp_path, most * FILE_BYTES, key=key) as one:
            if draw.random() < 0.5:  # nobody waits for what is to be written
                one.settle = lambda: None  # type: ignore[method-assign]
            for _ in range(draw.randrange(40)):
                alike = [draw.randrange(2) for _ in range(draw.randrange(1, 5))]
                prompt = [token for token in alike for _ in range(SIZE)]
                one.run([*prompt, 9], draw.choice(["", "of a tenant"]))  # checks what is cached
                assert not one.tier.finished()
                if draw.random() < 0.3:
                    one.evict()
                if draw.random() < 0.05 and (written := sorted(tmp_path.glob("*.kv"))):
                    with suppress(FileNotFoundError):  # it has just ended
                        damage_somehow(draw.choice(written), draw)
                assert len([*tmp_path.glob("*.kv")]) <= most
            hits += one.tier.hits
    assert hits


def damage_somehow(file: Path, draw: random.Random) -> None:
    match draw.randrange(3):
        case 0:
            file.unlink()
        case 1:
            os.truncate(file, draw.randrange(FILE_BYTES))
        case 2:
            with file.open("r+b") as data:
                data.seek(draw.randrange(FILE_BYTES - 8))
                data.write(b"anything")


def cached_pages(file: Path) -> int:
    """How many pages of a file the page cache has."""
    size = file.stat().st_size
    with file.open("rb") as data, mmap.mmap(data.fileno(), size, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        where = np.frombuffer(mapped, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.mincore(
            ctypes.c_void_p(where.ctypes.data),
            ctypes.c_size_t(size),
            pages.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte)),
        )
        del where
        assert done == 0, os.strerror(ctypes.get_errno())
    return int((pages & 1).sum())


def has_no_disk(folder: Path) -> bool:
    """Whether the page cache is all that a folder's file system has."""
    probe = folder / "probe"
    probe.write_bytes(bytes(4096))
    descriptor = os.open(probe, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return cached_pages(probe) > 0


def test_blocks_leave_nothing_in_the_page_cache(tmp_path: Path) -> None:
    """Neither when they are written nor when they are read."""
    if has_no_disk(tmp_path):
        pytest.skip("this file system has no other place")
    with cache(tmp_path / "tier") as one:
        one.run(PROMPT)
        paths = sorted((tmp_path / "tier").glob("*.kv"))
        assert len(paths) == 3 and not any(map(cached_pages, paths))
        one.evict()
        assert one.run(PROMPT) == 3
        assert not any(map(cached_pages, paths))
    with cache(tmp_path / "tier"):
        assert not any(map(cached_pages, paths))


@pytest.mark.parametrize("call", ["open", "pwritev", "preadv"])
def test_a_file_system_that_wants_the_page_cache_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """Be it that it refuses to open a file past it, or to read or write one; without a word."""
    real: Callable[..., int] = getattr(os, call)
    refused = 0

    def refuse(what: str | int, *arguments: Any, **options: Any) -> int:
        nonlocal refused
        flags = fcntl.fcntl(what, fcntl.F_GETFL) if isinstance(what, int) else arguments[0]
        if flags & os.O_DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(what, *arguments, **options)

    monkeypatch.setattr(os, call, refuse)
    with caplog.at_level(logging.DEBUG), cache(tmp_path) as one:
        one.run(PROMPT)
        one.evict()
        assert one.run(PROMPT) == 3
    assert refused >= 3 and not caplog.records


def test_what_is_queued_at_the_end_is_written(tmp_path: Path, key: bytes | None) -> None:
    with cache(tmp_path, key=key) as one:
        one.settle = lambda: None  # type: ignore[method-assign]
        one.run(PROMPT)
        assert one.tier.drain(WAIT_S) == 0
        assert (files(tmp_path), one.tier.blocks) == (set(names_of(PROMPT, key)), 3)


def test_a_disk_that_does_not_take_what_is_queued_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, sync = threading.Event(), os.fdatasync

    def slow(descriptor: int) -> None:
        assert release.wait(WAIT_S)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    with cache(tmp_path) as one:
        one.settle = lambda: None  # type: ignore[method-assign]
        one.run(PROMPT)
        assert one.tier.drain(0.01) == 3
        release.set()
