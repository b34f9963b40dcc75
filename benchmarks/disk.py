"""How fast blocks go to disk and come back: ``python -m benchmarks.disk``, which writes
``benchmarks/results/disk.json``.

The tier of ``clo.kvstore.disk`` below a real pool writes the blocks of one prompt and, once they have left
the arena, reads them back. Beside it stands what the disk does: files of the same size and number that are
written one after another, and read by as many threads as the tier has, with ``O_DIRECT`` and nothing else.
"""

import argparse
import os
import select
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.result import Result, write
from clo.kvstore.block_file import ROOT_BYTES
from clo.kvstore.disk import READERS, DiskTier
from clo.kvstore.pool import BlockPool
from clo.kvstore.uncached import aligned, uncached
from clo.runtime.units import format_size, parse_size

TOKENS = 16  # of a block, as names are made from them; its bytes decide
PARTS = 256  # layers times KV heads, as of Llama-3-8B
KEY = bytes(range(32))
CASES: dict[str, tuple[bytes | None, int]] = {  # the key, and the flag that the tier opens files with
    "O_DIRECT": (None, os.O_DIRECT),
    "O_DIRECT, encrypted": (KEY, os.O_DIRECT),
    "page cache": (None, 0),
    "page cache, encrypted": (KEY, 0),
}
DISK = "the disk alone"


@contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="clo-disk-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def through_tier(folder: Path, blocks: NDArray[np.uint8], key: bytes | None) -> tuple[float, float]:
    """Seconds that it takes to write all blocks but one, and to read them."""
    count = blocks.shape[1]
    tier = DiskTier(folder, 2 * blocks.nbytes, bytes(ROOT_BYTES), blocks, key)
    pool = BlockPool(count, TOKENS, lower=tier)
    prompt = [token for token in range(count - 1) for _ in range(TOKENS)] + [0]

    pool.allocate(0, 1, count, prompt)
    assert len([*pool.grants()]) == 1
    start = time.perf_counter()
    pool.commit(0, 1, 0, prompt)
    while tier.writing:
        select.select([tier.fd], [], [])
        tier.finished()
    written = time.perf_counter() - start
    assert tier.blocks == count - 1
    pool.free(0, 1)

    pool.allocate(1, 1, count)
    assert len([*pool.grants()]) == 1
    pool.free(1, 1)
    pool.allocate(0, 2, count, prompt)
    assert not [*pool.grants()]
    (load,) = pool.loads()
    start = time.perf_counter()
    tier.read(load)
    while not (over := tier.finished()):
        select.select([tier.fd], [], [])
    read = time.perf_counter() - start
    assert over == [(load, count - 1)]
    tier.close()
    return written, read


def alone(folder: Path, size: int, count: int) -> tuple[float, float]:
    """Seconds that the disk takes for as many files of ``size`` bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    buffers = [aligned(size) for _ in range(READERS)]
    for buffer in buffers:
        buffer[:] = np.frombuffer(os.urandom(4096), np.uint8).repeat(size // 4096)

    def put(number: int) -> None:
        with uncached(f"{number}", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor) as file:
            assert os.pwritev(file, [buffers[0].data], 0) == size
            os.fdatasync(file)

    def get(number: int) -> None:
        with uncached(f"{number}", os.O_RDONLY, dir_fd=descriptor) as file:
            assert os.preadv(file, [buffers[number % READERS].data], 0) == size

    start = time.perf_counter()
    for number in range(count):
        put(number)
    written = time.perf_counter() - start
    with ThreadPoolExecutor(READERS) as threads:
        start = time.perf_counter()
        for _ in threads.map(get, range(count)):
            pass
        read = time.perf_counter() - start
    os.close(descriptor)
    return written, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument("--block", type=parse_size, default=64 * 2**20, help="bytes of a block")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken")
    arguments = parser.parse_args()
    size, count = arguments.block // PARTS * PARTS, arguments.blocks
    blocks = np.empty((PARTS, count + 1, size // PARTS), np.uint8)
    for part in blocks:
        part[:] = np.frombuffer(os.urandom(part.nbytes), np.uint8).reshape(part.shape)

    def tier(key: bytes | None, flag: int) -> Callable[[Path], tuple[float, float]]:
        def measure(folder: Path) -> tuple[float, float]:
            with mock.patch.object(os, "O_DIRECT", flag):
                return through_tier(folder, blocks, key)

        return measure

    cases: dict[str, Callable[[Path], tuple[float, float]]] = {
        DISK: lambda folder: alone(folder, size, count)
    }
    cases |= {name: tier(*how) for name, how in CASES.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name, measure in cases.items():
            with new_folder(arguments.folder) as folder:
                seconds[name].append(measure(folder))
    results = []
    for place, what in enumerate(("write", "read")):
        rates = {
            name: size * count / statistics.median(times[place] for times in found) / 1e9
            for name, found in seconds.items()
        }
        results += [
            Result(what, name, rate, "GB/s")
            if name == DISK
            else Result(what, name, rate, "GB/s", rates[DISK], rate / rates[DISK])
            for name, rate in rates.items()
        ]
    write("disk", results, [f"{count} blocks of {format_size(size)}; medians of {arguments.rounds} rounds."])


if __name__ == "__main__":
    main()
