"""The KV store as a process: blocks over a socket, workers that die, malformed messages."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from clo.kvstore.client import StoreClient
from clo.kvstore.server import listen
from clo.runtime.config import StartedWorker
from clo.runtime.wire.errors import ConfigError, ProtocolError, WorkerDied
from clo.runtime.wire.messages import (
    MAX_MESSAGE_BYTES,
    Allocate,
    Allocated,
    Attach,
    Commit,
    Denied,
    Describe,
    Described,
    Expect,
    Free,
    Freed,
    FromStore,
    GetStoreStats,
    Grow,
    Grown,
    StoreReport,
    StoreStats,
)
from clo.runtime.wire.sockets import encode
from tests.store import ARENA_BYTES, KEY, MIB, WAIT_MS, Store, ask, new_endpoint, own_store, running_store

BLOCKS = ARENA_BYTES // MIB


@pytest.fixture
def store() -> Iterator[Store]:
    with running_store() as store:
        yield store


def stats(client: StoreClient) -> StoreStats:
    report = ask(client, GetStoreStats())
    assert isinstance(report, StoreReport)
    return report.stats


def test_a_sequence_from_allocation_to_freeing(store: Store) -> None:
    client, attached = store.worker(0)
    assert (attached.store, attached.pid, attached.blocks) == ("numa0", store.process.pid, BLOCKS)
    allocated = ask(client, Allocate(7, 2))
    assert isinstance(allocated, Allocated)
    assert len(set(allocated.blocks)) == 2
    assert set(allocated.blocks) <= set(range(BLOCKS))
    client.send(Commit(7, 0, list(range(10))))
    client.send(Commit(7, 10, list(range(10, 20))))
    assert ask(client, Describe(7)) == Described(7, allocated.blocks, [list(range(16)), list(range(16, 20))])
    assert stats(client) == StoreStats("numa0", ARENA_BYTES, MIB, BLOCKS, BLOCKS - 2, 0, 1, 0, 0, 0)
    assert ask(client, Free(7)) == Freed(7, 2)
    assert stats(client) == StoreStats("numa0", ARENA_BYTES, MIB, BLOCKS, BLOCKS, 0, 0, 0, 0, 0)
    assert ask(client, Describe(7)) == Denied("Describe", 7, "protocol", "Sequence 7 holds no blocks.")


def test_waiting_allocations_of_two_workers_are_served_in_order(store: Store) -> None:
    (one, _), (two, _) = store.worker(1), store.worker(2)
    assert isinstance(ask(one, Allocate(1, BLOCKS)), Allocated)
    one.send(Allocate(2, BLOCKS - 1))
    assert stats(one).waiting == 1
    two.send(Allocate(1, 2))
    assert stats(two).waiting == 2
    granted = ask(one, Free(1))
    assert isinstance(granted, Allocated) and granted.sequence == 2
    assert one.receive(WAIT_MS) == Freed(1, BLOCKS), "which says that all has been given out by then"
    assert stats(two).waiting == 1  # the first answer that reaches it: it has no blocks yet
    assert ask(one, Free(2)) == Freed(2, BLOCKS - 1)
    answer = two.receive(WAIT_MS)
    assert isinstance(answer, Allocated) and len(answer.blocks) == 2


def test_a_sequence_grows_before_others_begin_and_hears_that_it_has_to_wait(store: Store) -> None:
    (one, _), (two, _) = store.worker(1), store.worker(2)
    assert ask(one, Grow(1, 1)) == Denied("Grow", 1, "protocol", "Sequence 1 holds no blocks.")
    assert isinstance(ask(one, Allocate(1, BLOCKS - 3, most=BLOCKS)), Allocated)
    assert isinstance(ask(one, Allocate(2, 2)), Allocated)
    grown = ask(one, Grow(1, 1))
    assert isinstance(grown, Grown) and grown.sequence == 1 and len(grown.blocks) == 1
    two.send(Allocate(1, 1))
    assert ask(one, Grow(1, 1)) == Grown(1, []), "there is none"
    answer = ask(one, Grow(1, 1))
    assert isinstance(answer, Denied) and "waits for further blocks already" in answer.text
    grown = ask(one, Free(2))
    assert isinstance(grown, Grown) and len(grown.blocks) == 1, "it comes before who has waited longer"
    assert one.receive(WAIT_MS) == Freed(2, 2)
    assert isinstance(two.receive(WAIT_MS), Allocated), "the other one is left for that"
    answer = ask(one, Allocate(3, 1, most=BLOCKS + 1))
    assert isinstance(answer, Denied) and answer.code == "prompt_too_long"


def test_who_waits_is_served_once_another_has_committed_what_both_begin_with(store: Store) -> None:
    (one, _), (two, _) = store.worker(1), store.worker(2)
    prompt = [1] * 16 * (BLOCKS - 1)
    assert isinstance(ask(one, Allocate(1, BLOCKS - 1, prompt)), Allocated)
    two.send(Allocate(1, BLOCKS, [*prompt, 2]))
    assert stats(two).waiting == 1
    one.send(Commit(1, 0, prompt))
    answer = two.receive(WAIT_MS)
    assert isinstance(answer, Allocated) and (len(answer.blocks), answer.cached) == (BLOCKS, BLOCKS - 1)


def test_an_allocation_that_can_never_fit_is_denied_at_once(store: Store) -> None:
    client, _ = store.worker(0)
    for blocks in (BLOCKS + 1, 2**63):
        denied = ask(client, Allocate(3, blocks))
        assert isinstance(denied, Denied) and denied.answers == "Allocate"
        assert (denied.sequence, denied.code) == (3, "prompt_too_long")
        assert "--kv-size" in denied.text


def test_a_killed_worker_gives_its_blocks_to_one_that_waits() -> None:
    code = f"""
import os, signal, sys, zmq
from clo.kvstore.client import StoreClient
from clo.runtime.wire.messages import Allocate, Attach, GetStoreStats
client = StoreClient(zmq.Context(), sys.stdin.readline().strip(), {KEY!r})
client.attach(Attach(1, os.getpid()), {WAIT_MS / 1000})
client.send(Allocate(1, {BLOCKS}))
assert len(client.receive({WAIT_MS}).blocks) == {BLOCKS}
client.send(Allocate(2, {BLOCKS}))  # waits, and must not be served once this process is dead
client.send(GetStoreStats())
assert client.receive({WAIT_MS}).stats.waiting == 1
print("holds", flush=True)
signal.pause()
"""
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        workers = {1: StartedWorker(worker.pid, 1), 2: StartedWorker(os.getpid(), 2)}
        with running_store(workers=workers) as store:
            try:
                assert worker.stdin is not None and worker.stdout is not None
                print(store.endpoint, file=worker.stdin, flush=True)
                assert worker.stdout.readline() == "holds\n"
                client, _ = store.worker(2)
                client.send(Allocate(1, 3))
                assert stats(client).waiting == 2
            finally:
                worker.kill()
            answer = client.receive(WAIT_MS)
            assert isinstance(answer, Allocated) and len(answer.blocks) == 3
            assert stats(client) == StoreStats("numa0", ARENA_BYTES, MIB, BLOCKS, BLOCKS - 3, 0, 1, 0, 0, 0)


def test_a_restarted_worker_frees_what_its_predecessor_held(store: Store) -> None:
    former, _ = store.worker(1)
    assert isinstance(ask(former, Allocate(1, BLOCKS)), Allocated)
    successor, _ = store.worker(1)
    assert isinstance(ask(successor, Allocate(1, BLOCKS)), Allocated)
    denied = ask(former, Free(1))
    assert isinstance(denied, Denied) and denied.code == "protocol"
    assert stats(successor).free_blocks == 0


def test_a_connection_that_attaches_again_as_another_worker_frees_what_it_held(store: Store) -> None:
    client, _ = store.worker(1)
    assert isinstance(ask(client, Allocate(1, BLOCKS)), Allocated)
    client.attach(Attach(2, os.getpid()), WAIT_MS / 1000)
    assert stats(client) == StoreStats("numa0", ARENA_BYTES, MIB, BLOCKS, BLOCKS, 0, 0, 0, 0, 0)
    other, _ = store.worker(1)  # is a worker of its own: the connection is number 2 now
    assert isinstance(ask(client, Allocate(1, 1)), Allocated)
    assert isinstance(ask(other, Allocate(1, 1)), Allocated)


@pytest.fixture
def grouped() -> Iterator[Store]:
    """Workers 3 and 4 are a group, and worker 1 another one."""
    groups = {3: 7, 4: 7, 1: 8}
    workers = {number: StartedWorker(os.getpid(), group) for number, group in groups.items()}
    with running_store(workers=workers) as store:
        yield store


def test_blocks_belong_to_a_group_and_its_first_worker_hears_of_them(grouped: Store) -> None:
    second, first, other = (grouped.worker(number)[0] for number in (4, 3, 1))
    second.send(Allocate(1, BLOCKS))
    allocated = first.receive(WAIT_MS)
    assert isinstance(allocated, Allocated) and allocated.sequence == 1
    described = ask(second, Describe(1))
    assert isinstance(described, Described) and described.blocks == allocated.blocks
    assert isinstance(ask(other, Describe(1)), Denied), "a sequence of another group"


def test_blocks_of_a_group_are_free_once_its_last_worker_is_gone() -> None:
    """Until then one of them may still write to these."""
    members = [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]
    workers = {3 + place: StartedWorker(member.pid, 7) for place, member in enumerate(members)}
    try:
        with running_store(workers={**workers, 1: StartedWorker(os.getpid(), 8)}) as store:
            first, second = store.client(), store.client()
            for client, (number, worker) in zip((first, second), workers.items(), strict=True):
                client.attach(Attach(number, worker.pid), WAIT_MS / 1000)
            other, _ = store.worker(1)
            assert isinstance(ask(first, Allocate(1, BLOCKS)), Allocated)
            first.send(Allocate(2, 1))  # waits
            other.send(Allocate(1, 2))
            members[1].kill()
            members[1].wait()
            assert stats(other).free_blocks == 0
            members[0].kill()
            members[0].wait()
            answer = other.receive(WAIT_MS)
            assert isinstance(answer, Allocated) and len(answer.blocks) == 2
            assert stats(other) == StoreStats("numa0", ARENA_BYTES, MIB, BLOCKS, BLOCKS - 2, 0, 1, 0, 0, 0)
    finally:
        for member in members:
            member.kill()
            member.wait()


def test_answers_wait_for_a_worker_that_reads_none_for_long(store: Store) -> None:
    """Far more than ZeroMQ keeps by default."""
    client, _ = store.worker(0)
    for sequence in range(20_000):
        client.send(Free(sequence))
    for sequence in range(20_000):
        assert client.receive(WAIT_MS) == Freed(sequence, 0)


def test_a_store_whose_books_are_wrong_stops_when_it_is_idle() -> None:
    """Blocks that are lost would be missed much later, by requests that have nothing to do with it."""
    with own_store() as server:
        for message in (Attach(0, os.getpid()), Allocate(1, 2), Allocate(2, 2)):
            server._answer(b"worker", encode(message))
        assert server._pool is not None
        server._pool._free.pop()
        server._answer(b"worker", encode(Free(1)))  # not now, when others are served
        with pytest.raises(AssertionError, match="Free blocks are"):
            server._answer(b"worker", encode(Free(2)))


def test_an_address_that_is_taken_is_named() -> None:
    endpoint = new_endpoint()
    text = f"cannot listen at {endpoint}: Address already in use"
    with zmq.Context() as context, listen(context, endpoint, KEY), pytest.raises(ConfigError, match=text):
        listen(context, endpoint, KEY)


def test_only_workers_that_the_launcher_has_started_attach() -> None:
    """Another process, another number and a process that is gone are refused, and evict nobody."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    workers = {0: StartedWorker(os.getpid(), 0), 1: StartedWorker(gone.pid, 1)}
    with running_store(workers=workers) as store:
        for worker, pid in ((0, os.getppid()), (0, 0), (0, 2**62), (2, os.getpid()), (1, gone.pid)):
            with pytest.raises(ProtocolError, match=r"is not worker|no process"):
                store.client().attach(Attach(worker, pid), WAIT_MS / 1000)
        client, _ = store.worker(0)
        assert isinstance(ask(client, Allocate(1, BLOCKS)), Allocated)
        with pytest.raises(ProtocolError, match="is not worker 0"):
            store.client().attach(Attach(0, 1), WAIT_MS / 1000)
        assert stats(client).free_blocks == 0
        store.process.kill()
        assert store.process.communicate()[1].count("may not attach as worker") == 5


def test_a_worker_that_was_started_again_attaches_where_it_is_expected(tmp_path: Path) -> None:
    """An address that is gone by then ends nothing; the former one goes with the next, and no connection
    before that."""
    with own_store() as server:
        for number in range(3):
            endpoint = f"ipc://{tmp_path}/{number}"
            server._expect(Expect(0, 100 + number, endpoint))
            assert server._workers[0] == StartedWorker(100 + number, 0)
            assert server._doors == {0: endpoint} and (tmp_path / str(number)).is_socket()
        server._expect(Expect(0, 200, f"ipc://{tmp_path}/no-folder/socket"))
        assert server._workers[0].pid == 200 and not server._doors
        server._expect(Expect(99, 1, f"ipc://{tmp_path}/99"))
        assert 99 not in server._workers and not server._doors


def test_the_ranks_of_a_worker_attach_at_one_address(tmp_path: Path) -> None:
    with own_store() as server:
        for start in range(3):
            endpoint = f"ipc://{tmp_path}/{start}"
            for rank in (0, 1):
                server._expect(Expect(rank, 100 + start, endpoint))
            assert server._doors == {0: endpoint, 1: endpoint}
            assert (tmp_path / str(start)).is_socket()


def test_without_the_key_nothing_reaches_the_store(store: Store) -> None:
    """Neither before nor after its workers have attached."""
    strangers = [store.raw(key) for key in (None, "another key")]
    for stranger in strangers:
        stranger.send(encode(Attach(0, os.getpid())))
    client, _ = store.worker(0)
    assert isinstance(ask(client, Allocate(1, 2)), Allocated)
    strangers += [store.raw(key) for key in (None, "another key")]
    for stranger in strangers:
        stranger.send(encode(Attach(0, os.getpid())))
        stranger.send(encode(Free(1)))
    for _ in range(20):
        assert stats(client) == StoreStats("numa0", ARENA_BYTES, MIB, BLOCKS, BLOCKS - 2, 0, 1, 0, 0, 0)
    assert not any(stranger.poll(0) for stranger in strangers)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_who_knows_the_key_reaches_nothing(store: Store) -> None:
    """The kernel says whose process connects."""
    code = f"""
import os, zmq
from clo.kvstore.client import StoreClient
from clo.runtime.wire.errors import WorkerDied
from clo.runtime.wire.messages import Attach
os.setresuid(65534, 65534, 65534)
client = StoreClient(zmq.Context(), {store.endpoint!r}, {KEY!r})
try:
    client.attach(Attach(0, {os.getpid()}), 1.0)
except WorkerDied:
    print("no answer")
"""
    store.worker(0)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "no answer\n", done.stderr


def test_without_a_store_attach_ends_with_an_error() -> None:
    with zmq.Context() as context:
        client = StoreClient(context, "ipc://@clo-test-nobody", KEY)
        with pytest.raises(WorkerDied, match="did not answer"):
            client.attach(Attach(0, os.getpid()), timeout_s=0.05)
        client.close()


def malformed() -> list[list[bytes]]:
    """Messages of one or more frames that no store can accept."""
    rng = random.Random(0)
    pack = msgspec.msgpack.encode
    valid = {"type": "Allocate", "sequence": 1, "blocks": 1}
    return [
        *([rng.randbytes(rng.randrange(1, 200))] for _ in range(100)),
        [b""],
        [b"", pack(valid)],
        [pack(valid), pack(valid)],
        [b"\x91" * 100_000],
        [pack(None)],
        [pack({})],
        [pack([1, 2, 3])],
        [pack({"type": "Generate"})],
        [pack({"type": 3})],
        [pack({"type": "Allocate"})],
        [pack(valid | {"blocks": 0})],
        [pack(valid | {"blocks": "1"})],
        [pack(valid | {"sequence": -1})],
        [pack(valid | {"more": 1})],
        [pack({"type": "Commit", "sequence": 1, "start": 0, "tokens": [2**31]})],
        [pack({"type": "Commit", "sequence": 1, "start": 0, "tokens": [0.5]})],
        [pack(valid)[:-1]],
        [pack(valid) + b"\x00"],
    ]


@pytest.mark.parametrize("attached", [False, True])
def test_malformed_messages_are_denied_and_change_nothing(store: Store, attached: bool) -> None:
    client, _ = store.worker(0)
    socket = store.raw()
    if attached:
        socket.send(encode(Attach(1, os.getpid())))
        assert socket.poll(WAIT_MS)
        socket.recv()
    for frames in malformed():
        socket.send_multipart(frames)
        assert socket.poll(WAIT_MS), f"no answer to {frames!r:.200}"
        answer = msgspec.msgpack.decode(socket.recv(), type=FromStore)
        assert isinstance(answer, Denied), frames
        assert (answer.answers, answer.sequence, answer.code) == ("", -1, "protocol"), frames
        assert len(frames) == 1 or f"this one has {len(frames)}" in answer.text
    assert stats(client) == StoreStats("numa0", ARENA_BYTES, MIB, BLOCKS, BLOCKS, 0, 0, 0, 0, 0)


def test_a_message_before_attach_is_denied(store: Store) -> None:
    client = store.client()
    for message in (Allocate(1, 1), Commit(1, 0, []), Free(1), Describe(1), GetStoreStats()):
        denied = ask(client, message)
        assert isinstance(denied, Denied) and denied.code == "protocol"
        assert denied.text == "A worker's first message has to be Attach."
        assert (denied.answers, denied.sequence) == (type(message).__name__, getattr(message, "sequence", -1))


def test_an_oversized_message_costs_only_its_sender_the_connection(store: Store) -> None:
    client, _ = store.worker(0)
    socket = store.raw()
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.send(bytes(MAX_MESSAGE_BYTES + 1))
    assert monitor.poll(WAIT_MS), "the store keeps the connection"
    socket.disable_monitor()
    socket.close(linger=0)
    assert isinstance(ask(client, Allocate(1, 1)), Allocated)
