"""Processes that stop for a while, as by Ctrl-Z, a debugger or a suspended laptop, and go on."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest

from clo.runtime.client import AsyncClient
from clo.runtime.wire.errors import ServerUnreachable
from clo.runtime.wire.messages import Progress
from tests.faults import ENDLESS, SMALL, WAIT_S, assert_serves
from tests.server import ROOT, Server

Launch = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="module")
def shared(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), *SMALL) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """The shared server, which must serve normally and hold no blocks after each test."""
    yield shared
    assert_serves(shared)
    assert shared.stderr.read_text() == ""


@pytest.mark.parametrize("package", ["gpu_worker", "kvstore"])
def test_a_child_that_stops_is_reported_and_goes_on(server: Server, package: str) -> None:
    """Clients hear that their requests stall. Afterwards they get all tokens, in order."""
    (child,) = server.children(package)

    async def run() -> None:
        stalled = asyncio.Event()

        def listen(progress: Progress) -> None:
            if progress.stage == "stalled":
                stalled.set()

        async with AsyncClient(server.address, timeout=WAIT_S) as client:
            options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True}
            expected = [(await client.generate(prompt, **options)).tokens for prompt in ("a", "b", "c", "d")]
            child.suspend()
            requests = [
                asyncio.create_task(client.generate(prompt, on_progress=listen, **options))
                for prompt in ("a", "b", "c", "d")
            ]
            await asyncio.wait_for(stalled.wait(), WAIT_S)
            assert not any(request.done() for request in requests)
            await client.info()  # is answered, without those that do not answer
            child.resume()
            assert [result.tokens for result in await asyncio.gather(*requests)] == expected
            info = await client.info()
            assert len(info.workers) == len(info.stores) == 1

    try:
        asyncio.run(run())
    finally:
        child.resume()


PAUSES = [12, *(pytest.param(seconds, marks=pytest.mark.slow) for seconds in (5, 15, 60))]
"""Seconds. One is longer than ZeroMQ would have taken a silent peer to be alive."""


@pytest.mark.parametrize("seconds", PAUSES)
@pytest.mark.parametrize("package", ["gpu_worker", "kvstore", "launcher"])
def test_nothing_is_lost_while_a_process_stops(server: Server, package: str, seconds: int) -> None:
    """Requests that run, wait, come meanwhile or are cancelled meanwhile: each ends with its answer."""
    process = psutil.Process(server.process.pid)
    if package != "launcher":
        (process,) = server.children(package)

    async def run() -> None:
        async with AsyncClient(server.address, timeout=WAIT_S + seconds) as client:
            short: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True}
            streams = [client.stream("a", **short) for _ in range(6)]
            doomed = [client.stream("b", **ENDLESS) for _ in range(4)]
            reading = [asyncio.create_task(stream.to_end()) for stream in streams + doomed]
            await asyncio.sleep(0.3)
            process.suspend()
            await asyncio.sleep(seconds / 2)
            for stream in doomed:
                await stream.cancel()
            late = [client.stream("c", **short) for _ in range(4)]
            reading += [asyncio.create_task(stream.to_end()) for stream in late]
            await asyncio.sleep(seconds / 2)
            process.resume()
            results = await asyncio.gather(*reading)
            for stream, result in zip(streams + doomed + late, results, strict=True):
                if stream in doomed:
                    assert result.finish_reason == "cancelled"
                else:
                    assert len(result.tokens) == 200

    try:
        asyncio.run(run())
    finally:
        process.resume()


def test_a_client_that_is_busy_for_long_keeps_its_streams(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a silent server is trusted: it was this process that did not listen."""
    monkeypatch.setattr("clo.runtime.connection.SILENCE_SECONDS", 5.0)

    async def run() -> None:
        async with AsyncClient(server.address, timeout=WAIT_S) as client:
            stream = client.stream("a", max_tokens=1400, ignore_eos=True)
            chunks = aiter(stream)
            await anext(chunks)
            time.sleep(7)
            async for _ in chunks:
                pass
            assert len(stream.result.tokens) == 1400

    asyncio.run(run())


def test_a_client_that_stops_for_long_keeps_its_streams(server: Server) -> None:
    """The same where a signal has stopped the whole process."""
    code = f"""
from clo.runtime.client import Client
with Client({server.address!r}) as client:
    streams = [client.stream("a", max_tokens=300, ignore_eos=True) for _ in range(2)]
    pieces = iter(streams[0])
    next(pieces)
    print("streams", flush=True)
    list(pieces), list(streams[1])
    print([len(stream.result.tokens) for stream in streams])
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "streams\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(7)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=WAIT_S)[0] == "[300, 300]\n"


def test_requests_of_a_client_that_gave_up_a_stopped_server_are_cancelled(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clo.runtime.connection.SILENCE_SECONDS", 2.0)
    process = psutil.Process(server.process.pid)

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            streams = [client.stream("a", **ENDLESS) for _ in range(3)]
            first = aiter(streams[0])
            await anext(first)
            process.suspend()
            with pytest.raises(ServerUnreachable, match="Nothing heard"):
                async for _ in first:
                    pass
            for stream in streams[1:]:
                with pytest.raises(ServerUnreachable, match="Nothing heard"):
                    await stream.to_end()
            process.resume()
            await asyncio.sleep(1)  # the Cancel leaves

    try:
        asyncio.run(run())
    finally:
        process.resume()
