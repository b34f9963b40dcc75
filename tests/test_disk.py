"""The disk tier: blocks of prompts that come back from files, and files that are not to be believed."""

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from stat import S_IMODE
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clo.kvstore import disk
from clo.kvstore.arena import Arena
from clo.kvstore.block_file import (
    PAGE_BYTES,
    ROOT_BYTES,
    BlockFiles,
    EncryptedBlockFiles,
    read_disk_key,
)
from clo.kvstore.client import StoreClient
from clo.kvstore.disk import DiskTier, root_of
from clo.kvstore.layout import ArenaLayout, arena_bytes
from clo.kvstore.pool import BlockPool, Grant
from clo.kvstore.prefix import chain
from clo.runtime.client import Client
from clo.runtime.config import DiskConfig, ModelConfig
from clo.runtime.machine import packages
from clo.runtime.model.files import resolve
from clo.runtime.model.fingerprint import fingerprint
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.kv_events import BlockRemoved, BlockStored
from clo.runtime.wire.messages import (
    Allocate,
    Allocated,
    Attached,
    Commit,
    Free,
    Freed,
    GetStoreStats,
    StoreReport,
)
from tests.faults import WAIT_S, assert_serves
from tests.server import Server
from tests.store import BLOCK, MIB, Store, ask, command, new_endpoint, running_store, store_config

SIZE, BLOCKS = 4, 6  # tokens of a block, and blocks
SHAPE = 2, BLOCKS, 3000
FILE_BYTES = PAGE_BYTES + 2 * 4096  # as a disk counts
ROOT = bytes(range(ROOT_BYTES))


class Cache:
    """A pool with a disk tier, and the arena between them, whose rows follow from their names."""

    def __init__(
        self, folder: Path, most: int = 100 * FILE_BYTES, root: bytes = ROOT, key: bytes | None = None
    ) -> None:
        self.memory: NDArray[np.uint8] = np.zeros(SHAPE, np.uint8)
        self.tier = DiskTier(folder, most, root, self.memory, key)
        self.pool = BlockPool(BLOCKS, SIZE, report=True, lower=self.tier)
        self.count = 0

    def run(self, prompt: list[int], salt: str = "") -> int:
        """Compute a prompt and forget it, and check the rows of its blocks that are cached; returns their
        number."""
        self.count += 1
        grant = self.grant(self.count, prompt, salt)
        names = chain(array("i", prompt), SIZE, salt.encode())
        for place, (name, block) in enumerate(zip(names, grant.blocks, strict=False)):
            if place < grant.cached:
                assert np.array_equal(self.memory[:, block], rows_of(name)), "it has the rows of its name"
            self.memory[:, block] = rows_of(name)
        start = grant.cached * SIZE
        self.pool.commit(0, self.count, start, prompt[start:])
        self.pool.free(0, self.count)
        self.settle()
        self.pool.check_integrity()
        return grant.cached

    def grant(self, sequence: int, prompt: list[int], salt: str = "") -> Grant:
        self.pool.allocate(0, sequence, -(-(len(prompt) + 1) // SIZE), prompt, 1, salt)
        grants = [*self.pool.grants()]
        for load in self.pool.loads():
            assert not grants
            self.tier.read(load)
            while not (over := self.tier.finished()):
                self.wait()
            for finished, blocks in over:
                self.pool.loaded(finished, blocks)
            grants += self.pool.grants()
        (grant,) = grants
        assert isinstance(grant, Grant)
        return grant

    def wait(self) -> None:
        most = self.tier.timeout_ms
        came = select.select([self.tier.fd], [], [], WAIT_S if most is None else most / 1000)[0]
        assert came or most is not None, "the disk tier is silent"

    def settle(self) -> None:
        """Until all is written."""
        while self.tier.writing:
            self.wait()
            assert not self.tier.finished()

    def evict(self) -> None:
        """Use the whole arena for something else."""
        self.pool.allocate(1, 0, BLOCKS)
        assert [*self.pool.grants()]
        self.memory[:] = 0xEE
        self.pool.free(1, 0)


@contextmanager
def cache(
    folder: Path, most: int = 100 * FILE_BYTES, root: bytes = ROOT, key: bytes | None = None
) -> Iterator[Cache]:
    made = Cache(folder, most, root, key)
    yield made
    made.tier.close()


def rows_of(name: bytes) -> NDArray[np.uint8]:
    seed = int.from_bytes(name, "big")
    return np.random.default_rng(seed).integers(0, 256, (SHAPE[0], SHAPE[2]), np.uint8)


def block_files(key: bytes | None) -> BlockFiles:
    size = SHAPE[0] * SHAPE[2]
    return BlockFiles(ROOT, size) if key is None else EncryptedBlockFiles(ROOT, size, key)


def names_of(prompt: list[int], key: bytes | None = None) -> list[str]:
    return [block_files(key).file(name) for name in chain(array("i", prompt), SIZE)]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


PROMPT = list(range(1, 14))  # three blocks, and a token that has to be computed in any case
OTHER = list(range(101, 114))
KEY = bytes(range(32, 64))


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    found: bytes | None = request.param
    return found


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


def flip(place: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    return damage


def cut(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


DAMAGE = {
    "the version": flip(8),
    "whether it is encrypted": flip(12),
    "the salt": flip(20),
    "the name": flip(50),
    "the root": flip(90),
    "the length": flip(112),
    "the checksum of the block": flip(121),
    "the checksum of the block, its end": flip(151),
    "nothing in the page": flip(2000),
    "the hash of the page": flip(PAGE_BYTES - 1),
    "empty": cut(0),
    "a part of the page": cut(100),
    "the page alone": cut(PAGE_BYTES),
    "all but a byte": cut(FILE_BYTES - 1),
    "a byte too many": lengthen,
    "the first byte of the block": flip(PAGE_BYTES),
    "the last byte of the block": flip(PAGE_BYTES + SHAPE[0] * SHAPE[2] - 1),
    "nothing behind the block": flip(-1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_a_damaged_file_is_a_miss_and_is_written_anew(
    tmp_path: Path, damage: Callable[[Path], None], restart: bool, key: bytes | None
) -> None:
    file = tmp_path / names_of(PROMPT, key)[1]
    running = Cache(tmp_path, key=key)
    assert running.run(PROMPT) == 0
    if restart:
        running.tier.close()
    damage(file)
    if restart:
        running = Cache(tmp_path, key=key)
    else:
        running.evict()
    assert running.run(PROMPT) == 1, "what is behind the damaged one is of no use"
    assert running.tier.unusable == 1
    running.evict()
    assert running.run(PROMPT) == 3
    assert running.tier.unusable == 1
    running.tier.close()
    assert files(tmp_path) == set(names_of(PROMPT, key))


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_a_file_under_the_name_of_another_is_a_miss(tmp_path: Path, restart: bool, key: bytes | None) -> None:
    """It is whole, and of this model and key; but it has the rows of other tokens."""
    running = Cache(tmp_path, key=key)
    running.run(PROMPT)
    running.run(OTHER)
    if restart:
        running.tier.close()
    first, other = (tmp_path / names_of(prompt, key)[0] for prompt in (PROMPT, OTHER))
    first.rename(tmp_path / "aside")
    other.rename(first)
    (tmp_path / "aside").rename(other)
    if restart:
        running = Cache(tmp_path, key=key)
    else:
        running.evict()
    assert running.run(PROMPT) == running.run(OTHER) == 0
    assert running.tier.unusable == 2
    running.evict()
    assert running.run(PROMPT) == running.run(OTHER) == 3
    running.tier.close()


@pytest.mark.parametrize(
    ("written", "read"),
    [(KEY, KEY[::-1]), (None, KEY), (KEY, None)],
    ids=["another key", "a key for plain files", "no key any more"],
)
def test_files_of_another_key_are_removed_and_counted(
    tmp_path: Path, written: bytes | None, read: bytes | None
) -> None:
    with cache(tmp_path, key=written) as one:
        one.run(PROMPT)
    with cache(tmp_path, key=read) as other:
        assert (files(tmp_path), other.tier.blocks, other.tier.unusable) == (set(), 0, 3)
        assert other.run(PROMPT) == 0
    with cache(tmp_path, key=read) as other:
        assert other.run(PROMPT) == 3


def test_encrypted_files_tell_nothing_of_their_blocks(tmp_path: Path, key: bytes | None) -> None:
    """Neither rows, nor names, nor which of them follow each other, nor whether two files have the same."""
    secrets = [ROOT]
    for name in chain(array("i", PROMPT), SIZE):
        secrets += [name, name.hex().encode(), rows_of(name).tobytes()[:16], rows_of(name).tobytes()[-16:]]
    pieces: list[bytes] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        with cache(folder, key=key) as one:
            one.run(PROMPT)
        paths = [folder / name for name in names_of(PROMPT, key)]
        found = [path.name.encode() + path.read_bytes() for path in paths]
        told = [secret for secret in secrets if any(secret in data for data in found)]
        assert told == ([] if key else secrets)
        for path in paths:
            data = path.read_bytes()[16:]  # behind what all files begin with
            pieces += [data[start : start + 16] for start in range(0, len(data), 16)]
    assert (len(set(pieces)) == len(pieces)) == (key is not None)


def test_files_of_others_are_left_alone(tmp_path: Path, key: bytes | None) -> None:
    """Also where they have a name of a block, or are no files at all."""
    first, second, third = names_of(PROMPT, key)
    away = tmp_path / "away"
    away.write_bytes(b"something")
    folder = tmp_path / "tier"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "x.tmp").write_text("mine, too")
    (folder / second).symlink_to(away)
    with cache(folder, key=key) as one:
        assert one.run(PROMPT) == 0
        one.evict()
        assert one.run(PROMPT) == 1
    os.unlink(folder / second)
    os.mkfifo(folder / second)
    (folder / third).write_text("of somebody")
    with cache(folder, key=key) as one:
        assert one.run(PROMPT) == 1
        one.evict()
        (folder / first).write_bytes(b"of somebody else".ljust(FILE_BYTES))
        assert one.run(PROMPT) == 0
    assert (folder / first).read_bytes().startswith(b"of somebody else")
    assert files(folder) == {"notes.txt", "x.tmp", first, second, third}
    assert away.read_bytes() == b"something"


def test_files_of_another_model_are_removed(tmp_path: Path) -> None:
    with cache(tmp_path) as one:
        one.run(PROMPT)
    with cache(tmp_path, root=ROOT[::-1]) as other:
        assert (files(tmp_path), other.tier.blocks) == (set(), 0)
        assert other.run(PROMPT) == 0


def test_a_root_follows_from_the_model_and_the_layout(tiny_model: Path, smollm2: Path) -> None:
    tiny = resolve(ModelConfig(model=str(tiny_model), device="cpu"))
    said = fingerprint(tiny, "auto", "exact", "1")
    assert said == fingerprint(tiny, "auto", "exact", "1")
    others = [
        fingerprint(tiny, "dense", "exact", "1"),
        fingerprint(tiny, "auto", "exact", "2"),
        fingerprint(tiny, "auto", "sparse", "1"),
        fingerprint(
            resolve(ModelConfig(model=str(tiny_model), device="cpu", dtype="bfloat16")), "auto", "exact", "1"
        ),
        fingerprint(resolve(ModelConfig(model=str(smollm2), device="cpu")), "auto", "exact", "1"),
    ]
    assert len({said, *others}) == 6
    roots = {
        root_of(said, *shape) for shape in [(4, 2, 16, 64), (2, 4, 16, 64), (4, 2, 32, 64), (4, 2, 16, 32)]
    }
    assert len(roots) == 4 and {len(root) for root in roots} == {ROOT_BYTES}


def test_what_is_behind_a_missing_file_is_removed(tmp_path: Path, key: bytes | None) -> None:
    with cache(tmp_path, key=key) as one:
        one.run(PROMPT)
        one.run(OTHER)
    os.unlink(tmp_path / names_of(PROMPT, key)[0])
    (tmp_path / f"{'0' * 32}.tmp").write_bytes(b"CLOKVBLK and what a killed store had come to")
    with cache(tmp_path, key=key) as one:
        assert files(tmp_path) == set(names_of(OTHER, key))
        assert (one.run(PROMPT), one.run(OTHER)) == (0, 3)


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


def test_two_stores_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        cache(tmp_path),
        pytest.raises(ConfigError, match="is used by another server; give each a folder of its own"),
    ):
        Cache(tmp_path)
    with cache(tmp_path):
        pass


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/numa0", Path("/proc/numa0")):
        with pytest.raises(ConfigError, match=f"--kv-disk: {folder} cannot be used"):
            Cache(folder)


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


@pytest.mark.parametrize(
    "text",
    [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"],
    ids=["bytes", "digits", "digits as a line"],
)
def test_a_key_is_bytes_or_digits(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key").write_bytes(text)
    (tmp_path / "key").chmod(0o600)
    assert read_disk_key(tmp_path / "key") == KEY


WRONG_KEYS = {
    "nothing": b"",
    "a byte too few": KEY[:-1],
    "a byte too many": KEY + b"x",
    "a digit too few": KEY.hex()[:-1].encode(),
    "two digits too many": KEY.hex().encode() + b"00",
    "no digits": b"x" * 64,
    "no text": b"\xff" * 64,
}


@pytest.mark.parametrize("text", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_what_is_no_key_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key").write_bytes(text)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(ConfigError, match=f"^--kv-disk-key: {tmp_path}/key holds no key, which is 32 random"):
        read_disk_key(tmp_path / "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=f"^--kv-disk-key: other users can read {tmp_path}/key; take a new"):
        read_disk_key(tmp_path / "key")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    os.chown(tmp_path / "key", 65534, 65534)
    with pytest.raises(ConfigError, match="other users can read"):
        read_disk_key(tmp_path / "key")


def test_a_key_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name, what in (
        ("none", "none cannot be read (No such file"),
        ("pipe", "pipe holds no key"),
        ("folder", "folder holds no key"),
    ):
        with pytest.raises(ConfigError, match=f"^--kv-disk-key: {tmp_path}/{re.escape(what)}"):
            read_disk_key(tmp_path / name)


def test_encryption_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else needs it."""
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with cache(tmp_path):
        pass
    with pytest.raises(ConfigError) as error:
        Cache(tmp_path, key=KEY)
    assert str(error.value) == (
        "--kv-disk-key needs the package 'cryptography', which is not installed; run "
        "\"pip install 'clo-llm[encryption]'\", or \"pip install -e '.[encryption]'\" in a clone."
    )
    code = "import sys, clo.kvstore.__main__; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=WAIT_S).returncode == 0


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


# ------------------------------------------------------------------------ a real store


def prompt_of(base: int, blocks: int) -> list[int]:
    return [base] * (blocks * BLOCK.tokens + 1)


def attach(store: Store) -> tuple[StoreClient, Attached, NDArray[np.uint8]]:
    """A worker, and the blocks that it sees."""
    client, attached = store.worker(0)
    arena = Arena.open(attached.pid, attached.fd, attached.arena_bytes)
    layout = ArenaLayout.of_block(BLOCK.layers, BLOCK.kv_heads, attached.blocks, BLOCK.bytes)
    return client, attached, arena_bytes(arena, layout)


def compute(
    client: StoreClient, blocks: NDArray[np.uint8], prompt: list[int], fill: int
) -> tuple[int, bytes]:
    """Fill the blocks of a prompt that are not cached; returns how many were, and the bytes of all."""
    granted = ask(client, Allocate(1, len(prompt) // BLOCK.tokens + 1, prompt))
    assert isinstance(granted, Allocated)
    for place, block in enumerate(granted.blocks[granted.cached :]):
        blocks[:, block] = fill + place
    data = blocks[:, granted.blocks[: len(prompt) // BLOCK.tokens]].tobytes()
    start = granted.cached * BLOCK.tokens
    client.send(Commit(1, start, prompt[start:]))
    assert isinstance(ask(client, Free(1)), Freed)
    return granted.cached, data


def until_on_disk(client: StoreClient, blocks: int) -> None:
    while True:
        report = ask(client, GetStoreStats())
        assert isinstance(report, StoreReport)
        if report.stats.disk_blocks == blocks:
            return


def key_file(folder: Path, key: bytes | None) -> str | None:
    if key is None:
        return None
    file = folder / "key"
    file.write_text(key.hex())
    file.chmod(0o600)
    return str(file)


def test_a_store_that_was_killed_has_the_same_bytes_again(tmp_path: Path, key: bytes | None) -> None:
    """Also when the arena was full of others meanwhile, and when it was killed while it wrote."""
    tier = DiskConfig(str(tmp_path / "kv"), 256 * MIB, "model", key=key_file(tmp_path, key))
    with running_store(disk=tier) as store:
        client, attached, blocks = attach(store)
        prompt = prompt_of(5, 6)
        cached, data = compute(client, blocks, prompt, 10)
        assert cached == 0
        until_on_disk(client, 6)
        assert compute(client, blocks, prompt_of(6, attached.blocks - 1), 100)[0] == 0
        assert compute(client, blocks, prompt, 0) == (6, data)
        os.kill(store.process.pid, signal.SIGKILL)
    with running_store(disk=tier) as store:
        client, attached, blocks = attach(store)
        assert compute(client, blocks, prompt, 0) == (6, data)
        report = ask(client, GetStoreStats())
        assert isinstance(report, StoreReport) and report.stats.disk_hits == 6
    with running_store(disk=replace(tier, model="another model")) as store:
        client, attached, blocks = attach(store)
        assert compute(client, blocks, prompt, 0)[0] == 0
        report = ask(client, GetStoreStats())
        assert isinstance(report, StoreReport) and report.stats.disk_unusable > 6


def test_a_store_that_is_told_to_end_writes_first_what_it_has(tmp_path: Path) -> None:
    """All that was committed, however short before."""
    tier = DiskConfig(str(tmp_path / "kv"), 256 * MIB, "model")
    with running_store(disk=tier) as store:
        client, attached, blocks = attach(store)
        prompt = prompt_of(5, attached.blocks - 1)
        _, data = compute(client, blocks, prompt, 10)
        store.process.terminate()
        assert store.process.wait(WAIT_S) == -signal.SIGTERM
    with running_store(disk=tier) as store:
        client, attached, blocks = attach(store)
        assert compute(client, blocks, prompt, 0) == (attached.blocks - 1, data)


def test_a_second_store_in_the_folder_of_a_first_says_so_and_ends(tmp_path: Path) -> None:
    tier = DiskConfig(str(tmp_path / "kv"), 256 * MIB, "model")
    with running_store(disk=tier) as store:
        store.worker(0)
        second = command(store_config(new_endpoint(), disk=tier), os.getpid())
        done = subprocess.run(second, input="key\n", capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 3
        assert done.stderr == (
            f"error: --kv-disk: {tmp_path}/kv/numa0 is used by another server; "
            "give each a folder of its own.\n"
        )
        with running_store(disk=tier, name="numa1") as other:
            other.worker(0)
    assert {path.name for path in (tmp_path / "kv").iterdir()} == {"numa0", "numa1"}


def test_a_store_whose_key_others_can_read_says_so_and_ends(tmp_path: Path) -> None:
    key = key_file(tmp_path, KEY)
    os.chmod(tmp_path / "key", 0o644)
    tier = DiskConfig(str(tmp_path / "kv"), 256 * MIB, "model", key=key)
    line = command(store_config(new_endpoint(), disk=tier), os.getpid())
    done = subprocess.run(line, input="key\n", capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 3
    assert done.stderr == (
        f"error: --kv-disk-key: other users can read {key}; take a new key, in a file of mode 600 that is "
        "this user's.\n"
    )
    assert not (tmp_path / "kv").exists()


def test_a_store_that_is_started_again_serves_without_a_folder_that_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("")
    with running_store(disk=DiskConfig(str(tmp_path / "kv"), 256 * MIB, "model", needed=False)) as store:
        client, _, blocks = attach(store)
        assert compute(client, blocks, prompt_of(5, 2), 1)[0] == 0
        store.process.kill()
        _, said = store.process.communicate()
    assert said.count("\n") == 1 and "kv/numa0 cannot be used (Not a directory)" in said


# ------------------------------------------------------------------------ a real server


def test_a_server_goes_on_with_what_another_has_computed(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path, tmp_path: Path
) -> None:
    """With the same answer as the first server, whose disk was empty; also where its store alone was killed.
    What is on disk is encrypted, and the first server is stopped as soon as it has answered."""
    prompt = np.random.default_rng(3).integers(4, 300, 1400).tolist()
    line = (
        "--model",
        str(tiny_model),
        "--kv-size",
        "4MiB",
        "--kv-disk",
        str(tmp_path / "kv"),
        "--kv-disk-size",
        "16MiB",
        "--kv-disk-key",
        f"{key_file(tmp_path, KEY)}",
    )
    answers = []
    for restarted in (False, True):
        with launch(*line) as server, Client(server.address, timeout=WAIT_S) as client:
            answer = client.generate(prompt, max_tokens=16, temperature=0.0, ignore_eos=True)
            assert answer.usage.cached_tokens == (1024 if restarted else 0)
            answers.append(answer.tokens)
            assert client.info().stores[0].disk_hits == (2 if restarted else 0)
            assert_serves(server)
            if restarted:
                (store,) = server.children("kvstore")
                store.kill()
                store.wait(WAIT_S)
                answer = client.generate(prompt, max_tokens=16, temperature=0.0, ignore_eos=True)
                assert answer.usage.cached_tokens == 1024
                answers.append(answer.tokens)
    assert not [path for path in (tmp_path / "kv/numa0").glob("*.kv") if path.read_bytes()[12] != 1]
    assert answers == 3 * [answers[0]]


@pytest.mark.slow  # the stores above have it
def test_a_server_with_a_folder_that_it_cannot_use_says_so(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = ("--model", str(tiny_model), "--kv-disk", str(tmp_path / "file"), "--kv-disk-size", "16MiB")
    with launch(*line, ready=False) as server:
        assert server.wait() == 1
        said = server.stderr.read_text()
        assert said.count("error: ") == 1 and f"{tmp_path}/file/numa0 cannot be used" in said
