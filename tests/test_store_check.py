"""``python -m clo.kvstore.check``: what is wrong in a running store is found, and what is right is not."""

import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from clo.kvstore.arena import Arena
from clo.kvstore.check import LONGEST
from clo.kvstore.layout import arena_tensor, by_block
from clo.kvstore.pool import BlockPool, Grant
from clo.runtime.client import Client
from clo.runtime.machine.control import ask
from clo.runtime.model.kv_shape import kv_shape
from clo.runtime.model.model_config import read_config
from clo.runtime.wire.messages import Examine, Examined, StoreExamined
from tests.chaos import EXACT, prompts
from tests.faults import WAIT_S, assert_serves
from tests.server import ROOT, Server

Launch = Callable[..., AbstractContextManager[Server]]


def check(address: str, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "clo.kvstore.check", "--server", address, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
    )


def examine(server: Server, message: Examine) -> StoreExamined:
    (store,) = ask(server.address, message, Examined, lambda news: None).stores
    return store


def spoil(store: StoreExamined, folder: Path, block: int, factor: float) -> None:
    """Write another V of one token into the arena, in layer 1, KV head 1."""
    arena = Arena.open(store.pid, store.fd, store.arena_bytes)
    rows = by_block(arena_tensor(arena, kv_shape(read_config(folder), "float32"), store.blocks))
    rows[block, 1, 1, 5, 1] *= factor


def test_a_healthy_store_and_one_with_spoilt_rows(launch: Launch, tiny_model: Path) -> None:
    """While requests run, and with the rows of all blocks computed again. One row has other numbers, and one
    has none."""
    with launch("--model", str(tiny_model), *EXACT) as server:
        done = check(server.address, "--recompute", "5")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nothing to recompute" in done.stdout
        with Client(server.address, timeout=WAIT_S) as client:
            for prompt in [*prompts(), [*prompts()[-2], *prompts()[-1]]]:
                client.generate(prompt, max_tokens=4, temperature=0)
            stream = iter(client.stream(prompts()[-1], max_tokens=1000, ignore_eos=True, temperature=0))
            next(stream)
            done = check(server.address)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "held by 1 sequences" in done.stdout and "nothing wrong" in done.stdout
        store = examine(server, Examine(sample=100, longest=LONGEST))
        assert len(store.described) == store.committed_blocks == 4
        done = check(server.address, "--recompute", "100")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"recomputed {store.committed_blocks} blocks, 0 of them wrong" in done.stdout
        first, second = (
            next(found for found in store.described if len(found.tokens) == count * store.block_tokens)
            for count in (1, 2)
        )
        spoil(store, tiny_model, first.block, float("nan"))
        spoil(store, tiny_model, second.block, -1.0)
        done = check(server.address, "--recompute", "100")
        assert done.returncode == 1, done.stderr
        wrong = sorted(line for line in done.stdout.splitlines() if line.startswith("WRONG"))
        for line, block in zip(
            wrong, sorted((first, second), key=lambda found: str(found.block)), strict=True
        ):
            token = len(block.tokens) - store.block_tokens + 5
            assert line.startswith(f"WRONG: block {block.block} of KV store numa0 has other rows")
            assert f"V of token {token} in layer 1, KV head 1, differs by" in line
            assert ("by inf of its length" in line) == (block is first)
        assert f"recomputed {store.committed_blocks} blocks, 2 of them wrong" in done.stdout
        assert_serves(server)
        assert server.stderr.read_text() == ""


DAMAGED = """\
import sys
from clo.kvstore import __main__ as store, pool
commit = pool.BlockPool.commit
def damaged(self, *commit_of):
    committed = commit(self, *commit_of)
    for origin in self._origins.values():
        origin.tokens[0] = 1
    return committed
pool.BlockPool.commit = damaged
store.run_process(store.main)
"""
PROGRAM = """\
import os, sys
import clo.runtime.supervisor, clo.launch
start = clo.runtime.supervisor.Child.start
async def other(name, module, *rest, **more):
    return await start(name, "damaged_store" if module == "clo.kvstore" else module, *rest, **more)
clo.runtime.supervisor.Child.start = other
os.environ["PYTHONPATH"] = {folder!r} + ":" + os.environ.get("PYTHONPATH", "")
sys.exit(clo.launch.main(sys.argv[1:]))
"""


def test_a_running_store_says_what_is_wrong_in_its_books(
    launch: Launch, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "damaged_store.py").write_text(DAMAGED)
    program = PROGRAM.format(folder=str(tmp_path))
    with launch("--model", str(tiny_model), *EXACT, program=("-c", program)) as server:
        assert check(server.address).returncode == 0
        with Client(server.address, timeout=WAIT_S) as client:
            client.generate(prompts()[-1], max_tokens=4, temperature=0)
        done = check(server.address)
        assert done.returncode == 1
        first, second = done.stdout.splitlines()
        assert first.endswith("; 1 wrong")
        assert second.startswith("WRONG: KV store numa0: Block ")
        assert second.endswith("has another name than its tokens.")
        assert_serves(server)


def test_what_is_wrong_with_a_committed_block_is_said() -> None:
    """Each kind of damage to what is known of committed blocks has its sentence."""

    def made() -> BlockPool:
        pool = BlockPool(8, 4)
        pool.allocate(0, 0, 3, range(12))
        assert [grant.blocks for grant in pool.grants()] == [[0, 1, 2]]
        pool.commit(0, 0, 0, list(range(12)))
        pool.check_integrity()
        pool.check_names()
        return pool

    pool = made()
    pool._origins[1] = pool._origins[1]._replace(tokens=array("i", [4, 5, 6, 8]))
    with pytest.raises(AssertionError, match="Block 1 has another name than its tokens"):
        pool.check_names()
    pool = made()
    pool._origins[1] = pool._origins[1]._replace(place=2)
    with pytest.raises(AssertionError, match="Block 1 is committed, and the block before it is not"):
        pool.check_names()
    pool = made()
    del pool._by_name[pool._names.pop(0)], pool._origins[0]
    with pytest.raises(AssertionError, match="Block 1 is committed, and the block before it is not"):
        pool.check_names()
    pool = made()
    del pool._origins[2]
    with pytest.raises(AssertionError, match="Other blocks have tokens than have names"):
        pool.check_names()
    pool = made()
    pool._held[0][0].prompt[9] = 99
    with pytest.raises(AssertionError, match="Sequence 0 of group 0 shares block 2, which has other tokens"):
        pool.check_names()


def test_a_prompt_is_found_by_the_name_of_its_last_block() -> None:
    pool = BlockPool(8, 4)
    pool.allocate(0, 0, 3, range(10))
    list(pool.grants())
    pool.commit(0, 0, 0, list(range(10)))
    first, second = pool.committed(8)
    assert pool.committed(1) == [first]
    assert pool.prompt_of(second) == (1, list(range(8)), 0)
    assert pool.prompt_of(first) == (0, list(range(4)), 0)
    assert pool.prompt_of(bytes(16)) is None


class Below:
    """Has copies of two blocks."""

    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        pass

    def taken(self, block: int) -> None:
        pass

    def found(self, names: Sequence[bytes]) -> int:
        return min(2, len(names))


def test_of_a_block_is_known_what_was_there_when_it_was_computed() -> None:
    """Of one that was loaded nobody knows: it may have been all before it."""

    def behind(pool: BlockPool) -> list[int]:
        found = [pool.prompt_of(name) for name in pool.committed(8)]
        return [tokens for _, _, tokens in sorted(prompt for prompt in found if prompt is not None)]

    pool = BlockPool(8, 4)
    for sequence, prompt in enumerate((range(8), range(16))):
        pool.allocate(0, sequence, 4, prompt)
        (grant,) = pool.grants()
        assert isinstance(grant, Grant) and grant.cached == 2 * sequence
        pool.commit(0, sequence, 8 * sequence, list(prompt)[8 * sequence :])
        assert behind(pool) == [0, 0, 8, 8][: 2 * (1 + sequence)]
    pool = BlockPool(8, 4, lower=Below())
    pool.allocate(0, 0, 4, range(16))
    assert not list(pool.grants())
    (load,) = pool.loads()
    pool.loaded(load, 2)
    list(pool.grants())
    pool.commit(0, 0, 8, list(range(8, 16)))
    assert behind(pool) == [0, 4, 8, 8]


def test_where_it_cannot_check_it_says_why() -> None:
    done = check("tcp://127.0.0.1:9", "--recompute", "-1")
    assert (done.returncode, done.stderr) == (2, "error: --recompute is -1; it must be from 0 to 1000.\n")
    done = check("nowhere")
    assert done.returncode == 2 and "'nowhere' is not the address of a server" in done.stderr
    done = check("tcp://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: No server of this user on this machine answers for tcp://127.0.0.1:9"
    )
