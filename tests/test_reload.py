"""``clo reload``: workers are restarted over a living store, and nobody who waits for an answer notices."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import zmq

from clo.runtime.client import Client
from clo.runtime.machine.control import ask, control_endpoint
from clo.runtime.wire.errors import CLOError, ConfigError, InvalidRequest, ServerUnreachable
from clo.runtime.wire.messages import (
    Examine,
    Examined,
    Failed,
    FromControl,
    GetInfo,
    Reload,
    Reloaded,
    ToControl,
    Working,
)
from clo.runtime.wire.sockets import DealerSocket, encode
from tests.chaos import EXACT, answers, prompts
from tests.faults import WAIT_S, assert_serves
from tests.server import ROOT, Server
from tests.test_recovery import HASTY, same, worker_of

Launch = Callable[..., AbstractContextManager[Server]]


def command(server: Server) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "clo", "reload", "--server", server.address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
    )


def reload(server: Server) -> list[int]:
    return ask(server.address, Reload(), Reloaded, lambda news: None).pids


def pids(server: Server, package: str) -> set[int]:
    return {process.pid for process in server.children(package)}


def test_answers_go_on_and_the_store_stays_warm(launch: Launch, tiny_model: Path) -> None:
    """One worker, and streams under way; before and after, a document is asked about."""
    with launch("--model", str(tiny_model), *EXACT) as server:
        expected = asyncio.run(answers(server.address))
        document = prompts()[-1]
        with Client(server.address, timeout=WAIT_S) as client:
            first = client.generate(document, max_tokens=8, temperature=0)
        workers, stores = pids(server, "gpu_worker"), pids(server, "kvstore")
        done: list[subprocess.CompletedProcess[str]] = []
        asked = threading.Thread(target=lambda: done.append(command(server)))

        def disturb(count: int) -> None:
            if count == 100:
                asked.start()

        same(asyncio.run(answers(server.address, disturb)), expected)
        asked.join()
        assert done[0].returncode == 0, done[0].stderr
        (worker,) = pids(server, "gpu_worker")
        assert done[0].stdout.splitlines()[-1] == f"reloaded: worker 0 is process {worker}"
        assert worker not in workers and pids(server, "kvstore") == stores
        with Client(server.address, timeout=WAIT_S) as client:
            again = client.generate(document, max_tokens=8, temperature=0)
        assert again.tokens == first.tokens
        assert again.usage.cached_tokens >= len(document) // 2  # whole blocks
        same(asyncio.run(answers(server.address)), expected)
        assert server.stderr.read_text() == "", "a planned end is no death"


STRICT = """\
import sys
import clo.runtime.router, clo.runtime.supervisor, clo.launch
clo.runtime.router._MOST_LOSSES = clo.runtime.supervisor._QUICK_ENDS = 1
sys.exit(clo.launch.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_reloads_do_not_count_as_deaths(launch: Launch, tiny_model: Path) -> None:
    """Where one death would fail a request and end the server, two reloads do neither."""
    with launch("--model", str(tiny_model), *EXACT, program=("-c", STRICT)) as server:
        expected = asyncio.run(answers(server.address))
        threads: list[threading.Thread] = []

        def disturb(count: int) -> None:
            if count in (100, 800):
                threads.append(threading.Thread(target=reload, args=(server,)))
                threads[-1].start()

        same(asyncio.run(answers(server.address, disturb)), expected)
        for thread in threads:
            thread.join()
        assert_serves(server)
        assert server.stderr.read_text() == ""


def test_of_two_workers_one_serves(launch: Launch, tiny_model: Path) -> None:
    """Meanwhile another reload is refused, and the new workers are those that were said."""
    with launch("--model", str(tiny_model), *EXACT, "--workers", "2") as server:
        expected = asyncio.run(answers(server.address))
        before, stores = pids(server, "gpu_worker"), pids(server, "kvstore")
        found: list[int] = []
        refused: list[str] = []
        begun = threading.Event()

        def first(news: Working) -> None:
            begun.set()

        def work() -> None:
            found.extend(ask(server.address, Reload(), Reloaded, first).pids)

        thread = threading.Thread(target=work)

        def disturb(count: int) -> None:
            if count == 100:
                thread.start()
                assert begun.wait(WAIT_S)
                with pytest.raises(InvalidRequest) as error:
                    reload(server)
                refused.append(str(error.value))

        same(asyncio.run(answers(server.address, disturb)), expected)
        with Client(server.address, timeout=WAIT_S) as client:
            while thread.is_alive():
                assert client.info().workers, "one of them serves"
                time.sleep(0.05)
        thread.join()
        assert refused == ["A reload is under way; wait for its end."]
        assert set(found) == pids(server, "gpu_worker") and not set(found) & before
        assert pids(server, "kvstore") == stores
        same(asyncio.run(answers(server.address)), expected)
        assert server.stderr.read_text() == ""


WORKER = "from clo.gpu_worker.__main__ import main, run_process\nrun_process(main)\n"


def test_the_code_that_is_on_disk_runs(launch: Launch, tiny_model: Path, tmp_path: Path) -> None:
    """Where that code cannot start, it is tried as after a death, and then the server stops."""
    code = tmp_path / "made_worker.py"
    code.write_text(WORKER)
    program = HASTY.replace(
        "clo.launch.main(sys.argv[1:])",
        f"(os.environ.__setitem__('PYTHONPATH', {str(tmp_path)!r} + ':' + os.environ.get('PYTHONPATH', '')), "
        "clo.launch.main(sys.argv[1:], worker='made_worker'))[1]",
    ).replace("import sys", "import os, sys")
    with launch("--model", str(tiny_model), *EXACT, program=("-c", program)) as server:
        code.write_text("import sys\nprint('the new one', file=sys.stderr)\n" + WORKER)
        reload(server)
        assert_serves(server)
        assert server.stderr.read_text() == "the new one\n"
        code.write_text("raise SystemExit(7)\n")
        with pytest.raises(CLOError) as error:
            reload(server)
        assert "worker 0 ended with exit code 7; the server has stopped" in str(error.value)
        assert server.wait() == 1
        lines = server.stderr.read_text().splitlines()[1:]
        assert len(lines) == 2 and lines[0].endswith("worker 0 ended with exit code 7; it is started again.")


@pytest.mark.slow
def test_a_worker_killed_during_a_reload_comes_back(launch: Launch, tiny_model: Path) -> None:
    with launch("--model", str(tiny_model), *EXACT, "--workers", "2") as server:
        killed = False

        def kill(news: Working) -> None:
            nonlocal killed
            if news.done == 1 and not killed:
                killed = True
                worker_of(server, 0).kill()

        found = ask(server.address, Reload(), Reloaded, kill).pids
        assert set(found) == pids(server, "gpu_worker")
        assert_serves(server)


def test_what_cannot_be_reloaded_says_why(launch: Launch, tiny_model: Path) -> None:
    with launch("--model", str(tiny_model), *EXACT, "--recovery", "off") as server:
        done = command(server)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (
            "error: The server has --recovery off and starts no process again; stop it and start it again.\n"
        )
        assert_serves(server)
    with pytest.raises(ServerUnreachable) as error:
        reload(server)
    assert str(error.value).startswith(
        f"No server of this user on this machine answers for {server.address};"
    )


@pytest.mark.parametrize("address", ["nowhere", "tcp://127.0.0.1", "ipc://@x", "tcp://127.0.0.1:x"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a server"):
        control_endpoint(address)


def test_one_server_is_named_in_several_ways() -> None:
    assert control_endpoint("tcp://localhost:5") == control_endpoint("tcp://127.0.0.1:5")
    assert control_endpoint("tcp://0.0.0.0:5") == control_endpoint("tcp://127.0.0.1:5")
    assert control_endpoint("tcp://[::]:5") == control_endpoint("tcp://[::1]:5")


def test_what_the_launcher_cannot_read_is_refused(launch: Launch, tiny_model: Path) -> None:
    """And it hears the next one."""
    with launch("--model", str(tiny_model), *EXACT) as server:
        context: zmq.Context = zmq.Context()
        peer: DealerSocket[ToControl, FromControl] = DealerSocket(
            context, control_endpoint(server.address), FromControl, None
        )
        for data in (b"x", bytes(2**20), encode(GetInfo("a client's")), encode(Examine(number=2))):
            peer.socket.send(data)
            answer = peer.receive(round(1000 * WAIT_S))
            if isinstance(answer, Failed):
                assert answer.code == "protocol"
            else:
                assert isinstance(answer, Examined) and data == encode(Examine(number=2))
        context.destroy(linger=0)
        assert_serves(server)
        assert "Traceback" not in server.stderr.read_text()
