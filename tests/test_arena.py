"""The arena between processes, and how the store's process starts and ends."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clo.kvstore.arena import Arena
from clo.runtime.wire.errors import WorkerDied
from tests.store import ARENA_BYTES, MIB, WAIT_MS, command, new_endpoint, running_store, start, store_config

EXIT_EXPLAINED = 3


def ends(pid: int, seconds: float) -> bool:
    """Whether process ``pid``, child of whomever, ends in time."""
    pidfd = os.pidfd_open(pid)
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


def users(arena: os.stat_result) -> set[str]:
    """Processes that map the arena or hold a descriptor of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = [line for line in (process / "maps").read_text().splitlines() if "memfd:clo-arena" in line]
            held = [link.stat() for link in (process / "fd").iterdir() if link.exists()]
        except OSError:
            continue  # it has just ended
        mapped = any(int(line.split()[4]) == arena.st_ino for line in maps)
        if mapped or any(os.path.samestat(file, arena) for file in held):
            found.append(process.name)
    return set(found)


def test_what_one_process_writes_another_reads() -> None:
    code = """
import sys, torch
from clo.kvstore.arena import Arena
arena = Arena.open(*map(int, sys.argv[1:]))
arena.tensor(torch.bfloat16, (8, 4, 16))[5] += 1.5
"""
    with running_store() as store:
        _, attached = store.worker(0)
        arena = Arena.open(attached.pid, attached.fd, attached.arena_bytes)
        rows = arena.tensor(torch.bfloat16, (8, 4, 16))
        assert not rows.any()
        rows[5] = 1.0
        where = [str(attached.pid), str(attached.fd), str(attached.arena_bytes)]
        subprocess.run([sys.executable, "-c", code, *where], check=True)
        assert torch.equal(rows[5], torch.full((4, 16), 2.5, dtype=torch.bfloat16))
        assert not rows[:5].any() and not rows[6:].any()


def test_every_page_is_there_before_the_store_answers() -> None:
    with running_store() as store:
        _, attached = store.worker(0)
        allocated = os.stat(f"/proc/{attached.pid}/fd/{attached.fd}").st_blocks * 512
        assert allocated >= ARENA_BYTES


def test_the_arena_outlives_neither_a_tensor_nor_its_store_by_mistake() -> None:
    arena = Arena.create(2**20)
    rows = arena.tensor(torch.float32, (4, 4))
    with pytest.raises(BufferError):
        arena.close()
    rows[0] = 1.0
    with pytest.raises(ValueError, match="takes"):
        arena.tensor(torch.float32, (2**18 + 1,))
    del rows
    arena.close()


def test_opening_the_arena_of_a_dead_store_or_another_file_is_an_error() -> None:
    with running_store() as store:
        _, attached = store.worker(0)
        with pytest.raises(WorkerDied, match="no arena"):
            Arena.open(attached.pid, attached.fd, attached.arena_bytes + 1)
        store.process.kill()
        store.process.wait()
        with pytest.raises(WorkerDied, match="gone"):
            Arena.open(attached.pid, attached.fd, attached.arena_bytes)


def test_the_memory_of_a_killed_store_is_gone() -> None:
    with running_store() as store:
        _, attached = store.worker(0)
        file = os.stat(f"/proc/{attached.pid}/fd/{attached.fd}")
        assert users(file) == {str(attached.pid)}
        arena = Arena.open(attached.pid, attached.fd, attached.arena_bytes)
        assert users(file) == {str(attached.pid), str(os.getpid())}
        arena.close()
        store.process.send_signal(signal.SIGKILL)
        store.process.wait()
        assert users(file) == set()


def test_sigterm_ends_the_store_and_sigint_is_left_to_the_launcher() -> None:
    with running_store() as store:
        store.worker(0)
        store.process.send_signal(signal.SIGINT)
        store.worker(1)
        store.process.send_signal(signal.SIGTERM)
        assert store.process.communicate(timeout=WAIT_MS / 1000)[1] == ""
        assert store.process.returncode == -signal.SIGTERM


def test_the_store_dies_with_a_killed_parent() -> None:
    endpoint = new_endpoint()
    code = """
import os, signal, subprocess, sys
store = subprocess.Popen([*sys.argv[1:], str(os.getpid())], stdin=subprocess.PIPE)
store.stdin.close()
print(store.pid, flush=True)
signal.pause()
"""
    arguments = command(store_config(endpoint), 0)[:-1]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            with open("/proc/net/unix") as sockets:
                while endpoint.removeprefix("ipc://") not in sockets.read():  # it serves
                    sockets.seek(0)
        finally:
            parent.kill()
        assert ends(pid, WAIT_MS / 1000)


def test_a_store_whose_parent_is_gone_already_does_not_start() -> None:
    process = start(store_config(new_endpoint()), parent=os.getppid())
    assert (process.communicate()[1], process.returncode) == ("", 1)


@pytest.mark.parametrize(
    ("endpoint", "arena_bytes", "expected"),
    [
        (None, 2**60, "error: The KV cache wants 1048576.0 TiB of memory but only "),
        (
            None,
            MIB - 1,
            "error: One block of the KV cache takes 1048576 bytes, numa0 has only 1048575: raise ",
        ),
        ("ipc:///nowhere/at/all", ARENA_BYTES, "error: The KV store cannot listen at ipc:///nowhere/at/all"),
    ],
)
def test_what_cannot_start_says_why_in_one_sentence(
    endpoint: str | None, arena_bytes: int, expected: str
) -> None:
    process = start(store_config(endpoint or new_endpoint(), arena_bytes=arena_bytes))
    text = process.communicate()[1]
    assert process.returncode == EXIT_EXPLAINED
    assert text.startswith(expected)
    assert text.count("\n") == 1
