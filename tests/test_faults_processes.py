"""Servers that cannot start, processes that are killed, and signals; docs/errors.md lists the outcomes."""

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from clo.runtime.client import AsyncClient
from clo.runtime.wire.errors import CLOError, ServerStopped, ServerUnreachable, WorkerDied
from tests.faults import ENDLESS, SMALL, WAIT_S, assert_serves
from tests.server import READY_S, Server

Launch = Callable[..., AbstractContextManager[Server]]

CANNOT_START = {
    "unknown model": "error: --model no-such-model is neither a folder nor the name of a model on the hub.",
    "unknown family": "'gpt2'",
    "weights cut short": "model.safetensors is damaged",
    "weights that are not finite": "holds values that are not finite",
    "kv-size beyond memory": "error: The KV cache wants 1024.0 TiB of memory but only ",
    "kv-size below one block": "One block of the KV cache takes 524288 bytes, numa0 has only 524287",
    "a node that is not there": "error: --kvstore numa999 is none of this machine's nodes: numa0",
    "sparse prefill without a GPU": "--prefill-attention sparse needs a 16-bit --dtype on a GPU",
    "port in use": "of 127.0.0.1 cannot be used (Address already in use); try another --port.",
}


@pytest.fixture(scope="module")
def starting(
    launch: Launch, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """The servers of ``CANNOT_START``, all started at once."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("broken") / name))

    family, short, infinite = copy("family"), copy("short"), copy("infinite")
    config = json.loads((family / "config.json").read_text())
    (family / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    weights = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(weights[:-1000])
    tensors = load_file(infinite / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.inf
    save_file(tensors, infinite / "model.safetensors", {"format": "pt"})
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        options = {
            "unknown model": ("--model", "no-such-model"),
            "unknown family": ("--model", str(family)),
            "weights cut short": ("--model", str(short)),
            "weights that are not finite": ("--model", str(infinite), *SMALL),
            "kv-size beyond memory": ("--model", str(tiny_model), "--kv-size", "1024TiB"),
            "kv-size below one block": ("--model", str(tiny_model), "--kv-size", "524287"),
            "a node that is not there": ("--model", str(tiny_model), "--kvstore", "numa0,numa999"),
            "sparse prefill without a GPU": (
                "--model",
                str(tiny_model),
                *SMALL,
                "--prefill-attention",
                "sparse",
            ),
            "port in use": ("--model", str(tiny_model), *SMALL, "--port", port),
        }
        yield {name: stack.enter_context(launch(*line, ready=False)) for name, line in options.items()}


@pytest.mark.parametrize("name", CANNOT_START)
def test_a_server_that_cannot_start_says_why(starting: dict[str, Server], name: str) -> None:
    """One sentence on stderr, exit code 1, no ready line and nothing left behind."""
    server = starting[name]
    server.process.wait(READY_S)  # they all share the machine
    assert server.wait() == 1
    assert server.stdout.read_text() == ""
    text = server.stderr.read_text()
    assert text.startswith("error: ") and text.count("\n") == 1
    assert CANNOT_START[name] in text


def errors_of_open_requests(server: Server, act: Callable[[], None]) -> list[CLOError]:
    """How requests of two clients end after ``act``: one that streams, and three that wait for blocks."""

    async def run() -> list[CLOError]:
        async with AsyncClient(server.address) as one, AsyncClient(server.address) as two:
            streaming = one.stream("a", **ENDLESS)
            chunks = aiter(streaming)
            await anext(chunks)
            requests = [client.generate("b", **ENDLESS) for client in (one, two, two)]
            others = [asyncio.create_task(request) for request in requests]
            deadline = time.monotonic() + WAIT_S
            while sum(worker.waiting for worker in (await two.info()).workers) < len(others):
                assert time.monotonic() < deadline
            act()

            async def rest() -> None:
                async for _ in chunks:
                    pass

            ends = await asyncio.wait_for(asyncio.gather(rest(), *others, return_exceptions=True), WAIT_S)
            assert all(isinstance(end, CLOError) for end in ends), ends
            return [end for end in ends if isinstance(end, CLOError)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("package", "name"),
    [
        pytest.param("gpu_worker", "worker 0", id="worker", marks=pytest.mark.slow),  # the next test, too
        pytest.param("kvstore", "KV store numa0", id="store"),
    ],
)
def test_a_killed_worker_or_store(launch: Launch, tiny_model: Path, package: str, name: str) -> None:
    """Every open request gets ``WorkerDied``; the launcher says which process it was, exits with 1
    and takes the others along."""
    with launch("--model", str(tiny_model), *SMALL, "--recovery", "off") as server:
        (child,) = server.children(package)
        errors = errors_of_open_requests(server, child.kill)
        assert [type(error) for error in errors] == [WorkerDied] * 4
        assert str(errors[0]).startswith(f"{name} was killed by SIGKILL")
        assert server.wait() == 1
        assert server.stderr.read_text() == f"error: {errors[0]}\n"


def test_a_signal_after_the_death_of_a_child_changes_no_exit_code(launch: Launch, tiny_model: Path) -> None:
    """However late it comes."""
    with launch("--model", str(tiny_model), *SMALL, "--recovery", "off") as server:
        (worker,), (store,) = server.children("gpu_worker"), server.children("kvstore")

        def act() -> None:
            store.suspend()  # the launcher waits for it to leave
            worker.kill()

        errors = errors_of_open_requests(server, act)
        assert [type(error) for error in errors] == [WorkerDied] * 4
        while server.process.poll() is None:
            server.signal(signal.SIGTERM)
            time.sleep(0.001)
        assert server.wait() == 1
        assert server.stderr.read_text() == f"error: {errors[0]}\n"
        assert str(errors[0]).startswith("worker 0 was killed by SIGKILL")


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],  # HTTP's tests send it, too
)
def test_a_signal_while_requests_run(launch: Launch, tiny_model: Path, number: signal.Signals) -> None:
    """Clients are told, all processes end, exit code 0."""
    with launch("--model", str(tiny_model), *SMALL) as server:
        errors = errors_of_open_requests(server, lambda: server.signal(number))
        assert [type(error) for error in errors] == [ServerStopped] * 4
        assert server.wait() == 0
        assert server.stderr.read_text() == ""


def test_a_killed_launcher_takes_its_children_along(launch: Launch, tiny_model: Path) -> None:
    """Nothing is left, and clients see the connection break."""
    with launch("--model", str(tiny_model), *SMALL) as server:
        assert len(server.children()) == 2
        errors = errors_of_open_requests(server, lambda: server.signal(signal.SIGKILL))
        assert [type(error) for error in errors] == [ServerUnreachable] * 4
        assert server.wait() == -signal.SIGKILL


def test_a_server_whose_standard_streams_are_closed(launch: Launch, tiny_model: Path) -> None:
    """Nothing that it opens gets their descriptors; it serves, and what it has to say is lost: nobody hears
    that it is ready."""
    with launch("--model", str(tiny_model), *SMALL, closed=(0, 1, 2), ready=False) as server:
        launcher = psutil.Process(server.process.pid)
        deadline = time.monotonic() + READY_S
        while not (ports := [each.laddr.port for each in launcher.net_connections("tcp")]):
            assert server.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.address = f"tcp://127.0.0.1:{ports[0]}"
        assert_serves(server)
        assert os.readlink(f"/proc/{launcher.pid}/fd/0") == "/dev/null"
        for process in server.children():
            assert os.readlink(f"/proc/{process.pid}/fd/0").startswith("pipe:")  # the key came through it
        for process in [launcher, *server.children()]:
            for number in (1, 2):
                assert os.readlink(f"/proc/{process.pid}/fd/{number}") == "/dev/null"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_sigterm_while_loading(launch: Launch, tiny_model: Path) -> None:
    """All processes end before the server was ready, exit code 0."""
    with launch("--model", str(tiny_model), *SMALL, ready=False) as server:
        deadline = time.monotonic() + WAIT_S
        while not server.children("gpu_worker"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert (server.stdout.read_text(), server.stderr.read_text()) == ("", "")
