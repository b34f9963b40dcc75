"""A block pool with a disk tier under it, and what is in its folder; what the files ``test_disk_*`` share."""

import select
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from clo.kvstore.block_file import PAGE_BYTES, ROOT_BYTES, BlockFiles, EncryptedBlockFiles
from clo.kvstore.disk import DiskTier
from clo.kvstore.pool import BlockPool, Grant
from clo.kvstore.prefix import chain
from tests.faults import WAIT_S

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
def plain_and_encrypted(request: pytest.FixtureRequest) -> bytes | None:
    """No key, and ``KEY``. A file whose tests want both gives it the name that they call it by."""
    found: bytes | None = request.param
    return found
