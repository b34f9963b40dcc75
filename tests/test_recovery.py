"""Processes that die or hang are started again, and the requests of a worker go on as if nothing had been."""

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest

from clo.runtime.client import Client, Result
from clo.runtime.supervisor import STOP_S
from clo.runtime.wire.errors import ServerStopped
from tests.chaos import EXACT, OPTIONS, PROGRAM, Chaos, answers, assert_same
from tests.faults import WAIT_S, assert_serves, error_of
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]


def worker_of(server: Server, number: int = 0) -> psutil.Process:
    """A worker's process, once it is there."""
    deadline = time.monotonic() + WAIT_S
    while True:
        for process in server.children("gpu_worker"):
            if f'"worker":{number},' in process.cmdline()[3]:
                return process
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_all(server: Server) -> set[psutil.Process]:
    """Kill all workers at the same moment."""
    workers = {*server.children("gpu_worker")}
    for process in workers:
        process.kill()
    return workers


def same(found: list[Result], expected: list[Result]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


def test_answers_go_on_where_their_worker_is_killed(launch: Launch, tiny_model: Path) -> None:
    """Twice, in the midst of answers: each is as without, and the server has nothing else to say."""
    with launch("--model", str(tiny_model), *EXACT) as server:
        expected = asyncio.run(answers(server.address))
        killed: list[psutil.Process] = []

        def kill(count: int) -> None:
            if count in (40, 700):
                killed.append(worker_of(server))
                killed[-1].kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        assert len({process.pid for process in killed}) == 2
        assert_serves(server)
        lines = server.stderr.read_text().splitlines()
        assert len(lines) == 2 and all("worker 0 was killed by SIGKILL" in line for line in lines)
        assert all(line.endswith("it is started again.") for line in lines)
        assert not list(server.runtime.glob("clo-*")), "the folder of its sockets is gone again"


def test_another_worker_takes_over(launch: Launch, tiny_model: Path) -> None:
    """Where both are killed at the same moment their successors do, and a server that is stopped while these
    start ends at once."""
    with launch("--model", str(tiny_model), *EXACT, "--workers", "2") as server:
        expected = asyncio.run(answers(server.address))
        first = worker_of(server, 1)

        def kill(count: int) -> None:
            if count == 100:
                first.kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        with Client(server.address, timeout=WAIT_S) as client:
            deadline = time.monotonic() + WAIT_S
            while len(client.info().workers) < 2:  # its successor
                assert time.monotonic() < deadline
                time.sleep(0.1)

        def kill_both(count: int) -> None:
            if count == 400:
                kill_all(server)

        same(asyncio.run(answers(server.address, kill_both)), expected)
        with Client(server.address, timeout=WAIT_S) as client:
            stream = iter(client.stream("a", max_tokens=1000, ignore_eos=True))
            next(stream)
            gone = kill_all(server)
            while not {*server.children("gpu_worker")} - gone:
                time.sleep(0.02)
            server.signal(signal.SIGTERM)
            assert isinstance(error_of(stream), ServerStopped)
            assert server.process.wait(STOP_S) == 0, "nothing had to be killed"
        assert server.wait() == 0, "and nothing is left"


def test_a_killed_store_is_replaced_and_so_are_its_workers(launch: Launch, tiny_model: Path) -> None:
    """Once under requests, and once again while the workers start: all begins anew, the arena too."""
    with launch("--model", str(tiny_model), *EXACT, "--workers", "2") as server:
        expected = asyncio.run(answers(server.address))
        killed: list[psutil.Process] = []
        workers = server.children("gpu_worker")

        def kill(count: int) -> None:
            if count == 100:
                killed.extend(server.children("kvstore"))
                killed[-1].kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        (store,) = server.children("kvstore")
        assert killed and store not in killed
        assert not {*workers} & {*server.children("gpu_worker")}
        lines = [line.split("] ")[1] for line in server.stderr.read_text().splitlines()]
        assert len(lines) == 3 and lines[0].startswith("KV store numa0 was killed by SIGKILL")
        assert sorted(lines[1:]) == [
            f"worker {number} has lost KV store numa0; it is started again." for number in range(2)
        ]
        store.kill()
        while not (again := [child for child in server.children("kvstore") if child != store]):
            time.sleep(0.02)
        again[0].kill()
        same(asyncio.run(answers(server.address)), expected)


SILENT = """\
import sys
import clo.runtime.children, clo.launch
clo.runtime.children.SERVING_S = 3.0
sys.exit(clo.launch.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("package", "name"),
    [
        pytest.param("gpu_worker", "worker 0", id="worker"),
        pytest.param("kvstore", "KV store numa0", id="store", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_does_not_answer_is_replaced(
    launch: Launch, tiny_model: Path, package: str, name: str
) -> None:
    with launch("--model", str(tiny_model), *EXACT, program=("-c", SILENT)) as server:
        expected = asyncio.run(answers(server.address))

        def stop(count: int) -> None:
            if count == 100:
                (process,) = server.children(package)
                process.send_signal(signal.SIGSTOP)

        same(asyncio.run(answers(server.address, stop)), expected)
        lines = server.stderr.read_text().splitlines()
        assert lines[0].endswith(f"{name} has not answered for 3 s; it is killed.")
        assert lines[1].endswith(f"{name} has not answered for 3 s; it is started again.")


HASTY = """\
import sys
import clo.runtime.supervisor, clo.launch
clo.runtime.supervisor._QUICK_ENDS = 2
clo.runtime.supervisor._BACK_OFF_S = 0.01
sys.exit(clo.launch.main(sys.argv[1:]))
"""


def test_a_worker_that_ends_again_and_again_ends_the_server(launch: Launch, tiny_model: Path) -> None:
    """With the sentence for the last end."""
    with launch("--model", str(tiny_model), *EXACT, program=("-c", HASTY)) as server:
        pids = set()
        deadline = time.monotonic() + WAIT_S
        while server.process.poll() is None:
            assert time.monotonic() < deadline
            for process in server.children("gpu_worker"):
                pids.add(process.pid)
                process.kill()
            time.sleep(0.05)
        assert server.wait() == 1
        assert len(pids) == 3
        last = server.stderr.read_text().splitlines()[-1]
        assert last.startswith("error: worker 0 was killed by SIGKILL")
        assert last.endswith("the server has stopped, start it again.")


@pytest.mark.slow  # a hundred faults have it
def test_a_killed_gateway_is_replaced(launch: Launch, tiny_model: Path) -> None:
    """Its own requests end with their connections; those of other clients do not notice."""
    httpx = pytest.importorskip("httpx")
    body = {"prompt": "ab", "max_tokens": 4, "temperature": 0}
    with launch("--model", str(tiny_model), *EXACT, "--http", "0") as server:
        before = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S).json()
        expected = asyncio.run(answers(server.address))

        def kill(count: int) -> None:
            if count == 50:
                (gateway,) = server.children("runtime.http")
                gateway.kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        # connections wait until the next gateway takes them
        after = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S).json()
        assert after["choices"] == before["choices"]
        assert "HTTP gateway was killed by SIGKILL" in server.stderr.read_text()


@pytest.mark.timeout(900)
def test_a_hundred_faults(launch: Launch, tiny_model: Path) -> None:
    """At random moments, many of them while others are still being mended."""
    with launch("--model", str(tiny_model), *OPTIONS, program=("-c", PROGRAM)) as server:
        chaos = Chaos(server, seed=1)
        asyncio.run(chaos.run(faults=100))
        assert chaos.counts["answers"] >= 8 and chaos.counts["answers over HTTP"]
        assert chaos.counts["reloads"] and chaos.counts["preemptions"]
        lines = server.stderr.read_text().splitlines()
        assert all(line.endswith(("it is started again.", "it is killed.")) for line in lines), lines
