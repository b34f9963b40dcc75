"""The disk tier of real stores and real servers, which end, are killed and begin again."""

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from clo.kvstore.arena import Arena
from clo.kvstore.client import StoreClient
from clo.kvstore.layout import ArenaLayout, arena_bytes
from clo.runtime.client import Client
from clo.runtime.config import DiskConfig
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
from tests.disk_cache import KEY, plain_and_encrypted
from tests.faults import WAIT_S, assert_serves
from tests.server import Server
from tests.store import BLOCK, MIB, Store, ask, command, new_endpoint, running_store, store_config

key = plain_and_encrypted

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


def refusal_of(tier: DiskConfig) -> str:
    """What a store says that does not start."""
    line = command(store_config(new_endpoint(), disk=tier), os.getpid())
    done = subprocess.run(line, input="key\n", capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 3
    return done.stderr


def test_a_second_store_in_the_folder_of_a_first_says_so_and_ends(tmp_path: Path) -> None:
    tier = DiskConfig(str(tmp_path / "kv"), 256 * MIB, "model")
    with running_store(disk=tier) as store:
        store.worker(0)
        assert refusal_of(tier) == (
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
    assert refusal_of(tier) == (
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
