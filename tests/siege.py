"""What a server endures, measured: ``python -m tests.siege floods``, ``pauses`` or ``waits``.

Each runs real servers with the tests' tiny model and writes ``benchmarks/results/siege-PART.json``.

- ``floods``: peers that send 300,000 messages without reading and go away, while others are served.
- ``pauses``: SIGSTOP of each process, of one worker of two and of all at random moments under load, SIGCONT
  after a while.
- ``waits``: what a client waits for short requests while another one does its worst.

After each flood and pause every request has ended with its answer, or with ``ServerUnreachable`` where the
launcher was silent for longer than a client waits; the server serves and all blocks are free. Anything else
raises.
"""

import argparse
import asyncio
import json
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq

from benchmarks.result import Result, write
from clo.runtime.client import AsyncClient, Client
from clo.runtime.wire.errors import ServerUnreachable
from clo.runtime.wire.messages import (
    Cancel,
    Chat,
    Generate,
    GetInfo,
    SamplingParams,
    Text,
    Tokens,
    Turn,
)
from clo.runtime.wire.sockets import encode
from tests.conftest import make_tiny_model
from tests.faults import WAIT_S, Raw, assert_serves, raw
from tests.server import ROOT, Server, launch

SLOTS = 8
OPTIONS = ("--kv-size", "16MiB", "--max-num-seqs", f"{SLOTS}", "--select-k", "32", "--resident", "128")
POSITIONS = 2**17  # of the model: much is read of a message where a model takes long prompts
FLOODS, FLOOD_MESSAGES = 20, 300_000
PAUSES, PAUSE_S = 20, (5.0, 15.0, 60.0)  # so many of each length, of each process
CLIENTS = 6
QUIET_S, ATTACK_S = 10.0, 20.0
READ = 2_100_000  # bytes: nearly as many as are read of a message


STOPPED: dict[str, tuple[str, ...]] = {  # what is stopped, and options of its server
    "launcher": (),
    "gpu_worker": (),
    "kvstore": (),
    "runtime.http": ("--http", "0"),
    "one of two gpu_workers": ("--workers", "2"),
    "all processes": (),
}


@contextmanager
def server(*options: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(Path(folder))
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text()) | {"max_position_embeddings": POSITIONS}
        file.write_text(json.dumps(config))
        with launch("--model", folder, *OPTIONS, *options) as found:
            yield found


class Load:
    """Clients that ask one request after another until they are to stop; counts how the requests ended."""

    def __init__(self, address: str, rng: random.Random) -> None:
        self._address, self._rng = address, rng
        self._stop = False
        self.ends: Counter[str] = Counter()

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._work()) for _ in range(CLIENTS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for the end of every request."""
        self._stop = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), WAIT_S)

    async def _work(self) -> None:
        async with AsyncClient(self._address) as client:
            while not self._stop:
                tokens, cancels = self._rng.choice([2, 20, 200]), self._rng.random() < 0.2
                stream = client.stream([1, 2, 3], max_tokens=tokens, ignore_eos=True)
                try:
                    async for _ in stream:
                        if cancels:
                            await stream.cancel()
                except ServerUnreachable:
                    self.ends["unreachable"] += 1
                    continue
                reason = stream.result.finish_reason
                assert reason == ("cancelled" if cancels and reason == "cancelled" else "length")
                assert reason == "cancelled" or len(stream.result.tokens) == tokens
                self.ends["cancelled" if reason == "cancelled" else "answered"] += 1


def floods() -> list[Result]:
    ends: Counter[str] = Counter()
    with server() as found:

        async def one(seed: int) -> None:
            async with Load(found.address, random.Random(seed)) as load:
                await asyncio.sleep(0.5)
                line = [sys.executable, "-m", "tests.siege", "attack", "a flood of bytes", found.address]
                flood = await asyncio.create_subprocess_exec(*line, cwd=ROOT)
                assert await flood.wait() == 0
                await asyncio.sleep(1)
            assert not load.ends["unreachable"]
            ends.update(load.ends)

        for number in range(FLOODS):
            asyncio.run(one(number))
            assert_serves(found)
            print(f"flood {number + 1} of {FLOODS}: {dict(ends)}", flush=True)
    return [Result("siege/floods", "floods", FLOODS, "floods"), *counted("siege/floods", ends)]


async def pause(
    processes: list[psutil.Process], seconds: float, address: str, rng: random.Random
) -> Counter[str]:
    """Stop processes at a random moment; how the requests before, meanwhile and after it ended."""
    async with Load(address, rng) as load:
        await asyncio.sleep(0.2 + 2 * rng.random())
        for process in processes:
            process.suspend()
        try:
            await asyncio.sleep(seconds)
        finally:
            for process in processes:
                process.resume()
        await asyncio.sleep(2)
    return load.ends


def stopped(found: Server, name: str) -> list[psutil.Process]:
    """What is stopped where ``name`` is, see ``STOPPED``."""
    launcher = psutil.Process(found.process.pid)
    if name == "launcher":
        return [launcher]
    if name == "all processes":
        return [launcher, *found.children()]
    return found.children(name.removeprefix("one of two ").removesuffix("s"))[:1]


def ask_over_http(url: str) -> None:
    """A request that is open while the gateway stands still."""
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 500, "ignore_eos": True, "stream": False}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 500


def pauses_of(name: str) -> list[Result]:
    """All pauses of one process of one server, or of more, in random order."""
    rng, ends = random.Random(name), Counter[str]()
    lengths = list(PAUSE_S) * PAUSES
    rng.shuffle(lengths)
    with server(*STOPPED[name]) as found, ThreadPoolExecutor(1) as http:
        processes = stopped(found, name)
        at_start = found.stderr.read_text()
        for number, seconds in enumerate(lengths):
            asked = http.submit(ask_over_http, found.url) if found.url else None
            new = asyncio.run(pause(processes, seconds, found.address, rng))
            assert name in ("launcher", "all processes") or not new["unreachable"]
            ends.update(new)
            if asked is not None:
                asked.result()
                ends["answered over HTTP"] += 1
            assert_serves(found)
            print(f"{name}, pause {number + 1} of {len(lengths)}, {seconds:g} s: {dict(new)}", flush=True)
        assert found.stderr.read_text() == at_start, found.stderr.read_text()
    case = f"siege/pauses/{name}"
    lasting = [Result(case, f"pauses of {seconds:g} s", PAUSES, "pauses") for seconds in PAUSE_S]
    return [*lasting, *counted(case, ends)]


def pauses() -> list[Result]:
    with ThreadPoolExecutor(len(STOPPED)) as threads:
        found = threads.map(pauses_of, STOPPED)
        return [result for results in found for result in results]


def counted(case: str, ends: Counter[str]) -> list[Result]:
    return [Result(case, f"requests {end}", number, "requests") for end, number in sorted(ends.items())]


# ------------------------------------------------------------------------------------------ attacks


def keep_open(peer: Raw, most: int, ask: Callable[[str], Generate | GetInfo]) -> None:
    """Have ``most`` requests open, for ever."""
    open_: set[str] = set()
    for number in count():
        name = f"{number}"
        peer.send(ask(name))
        open_.add(name)
        while len(open_) >= most or peer.socket.poll(0):
            message = peer.receive()
            if type(message).__name__ in ("Finished", "Failed", "Info"):
                open_.discard(message.request)


def prompts(prompt: Any, most: int = 16, max_tokens: int = 1, **sampling: Any) -> Callable[[Raw], None]:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return lambda peer: keep_open(peer, most, lambda name: Generate(name, prompt, params))


def cancels(peer: Raw) -> None:
    """A request and its end at once, for ever; what comes back is read."""
    for number in count():
        peer.send(Generate(f"{number}", Tokens([1]), SamplingParams(max_tokens=1000)))
        peer.send(Cancel(f"{number}"))
        while number % 100 == 0 and peer.socket.poll(1):
            peer.socket.recv()


def nothing_to_cancel(peer: Raw) -> None:
    data = encode(Cancel("nothing"))
    while True:
        peer.socket.send(data)


def bytes_for_ever(peer: Raw) -> None:
    while True:
        peer.socket.send(b"a")


def flood(peer: Raw) -> None:
    """As long as it takes to send so much, and to go away without having read anything."""
    for _ in range(FLOOD_MESSAGES):
        peer.socket.send(b"a")
    time.sleep(1)


def connections(peer: Raw) -> None:
    address = peer.socket.getsockopt_string(zmq.LAST_ENDPOINT)
    while True:
        with raw(address) as other:
            other.send(Generate("r", Tokens([1]), SamplingParams(max_tokens=1000)))
            other.socket.poll(20)


def idle_connections(peer: Raw) -> None:
    """Connections that say nothing, as many as this process may have, or 2,000."""
    host, port = peer.socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").rsplit(":", 1)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    held = deque[socket.socket](maxlen=min(2000, allowed - 100))
    while True:
        with suppress(OSError):  # refused: there are too many
            held.append(socket.create_connection((host, int(port)), timeout=1))


def variables(values: int) -> Chat:
    return Chat([Turn("user", "a")], '{"a":[' + "[]," * values + "[]]}")


STOPS = ["a" * 998 + f"{number:02}" for number in range(16)]
ATTACKS: dict[str, Callable[[Raw], None]] = {
    "a flood of bytes": flood,
    "bytes for ever": bytes_for_ever,
    "a million empty turns": prompts(Chat([Turn("user", "")] * 1_000_000)),
    "a chat as long as is read": prompts(Chat([Turn("user", "")] * (READ // 20))),
    "60 MB of ids": prompts(Tokens([1] * 60_000_000)),
    "ids as many as are read": prompts(Tokens([1] * READ)),
    "ids as many as fit": prompts(Tokens([1] * 131_000)),
    "a text as long as is read": prompts(Text("a " * (READ // 2))),
    "template variables as many as are read": prompts(variables(49_000)),
    "more template variables": prompts(variables(340_000)),
    "16 stop strings of 1,000 characters": prompts(Text("a"), SLOTS - 1, 200, stop=STOPS),
    "20 log-probabilities": prompts(Text("a"), SLOTS - 1, 200, logprobs=20),
    "9,000 requests at a time": prompts(Tokens([1]), 9_000, max_tokens=2),
    "9,000 questions at a time": lambda peer: keep_open(peer, 9_000, GetInfo),
    "requests cancelled at once": cancels,
    "cancels of nothing": nothing_to_cancel,
    "connections that come and go": connections,
    "2,000 connections that say nothing": idle_connections,
    "long answers in every slot": prompts(Text("a"), 1_000, 1_000, ignore_eos=True),
    "long answers in all blocks": prompts(Text("a"), 1_000, 7_000, ignore_eos=True),
}


def attack(name: str, address: str) -> None:
    with raw(address, SNDHWM=0, RCVHWM=0) as peer:
        ATTACKS[name](peer)


def waits() -> list[Result]:
    results = []
    with server() as found, Client(found.address, timeout=WAIT_S) as client:

        def ask(seconds: float) -> np.ndarray:
            """Seconds of short requests, one after the other."""
            times, end = [], time.perf_counter() + seconds
            while time.perf_counter() < end:
                began = time.perf_counter()
                assert len(client.generate([1, 2], max_tokens=2, ignore_eos=True).tokens) == 2
                times.append(time.perf_counter() - began)
            return np.array(times)

        ask(QUIET_S)
        for name in ATTACKS:
            quiet = float(np.percentile(ask(QUIET_S), 99))
            line = [sys.executable, "-m", "tests.siege", "attack", name, found.address]
            with subprocess.Popen(line, cwd=ROOT) as attacker:
                time.sleep(3)  # it has to import and to encode first
                times = ask(ATTACK_S)
                attacker.kill()
            p99 = float(np.percentile(times, 99))
            case = f"siege/waits/{name}"
            results += [
                Result(case, "p99", p99, "s", quiet, p99 / quiet),
                Result(case, "p99 growth", p99 - quiet, "s"),
                Result(case, "longest", float(times.max()), "s"),
                Result(case, "requests", len(times), "requests"),
            ]
            print(*results[-4:], sep="\n", flush=True)
            assert_serves(found)
    return results


NOTES = {
    "pauses": [
        "Servers side by side, each with six clients under load; of each, what is named was stopped, at "
        "random moments and in random order of lengths.",
    ],
    "waits": [
        "The reference is the p99 of ten seconds before each attack. Attacker, server and client share the "
        "cores of one machine.",
        "While others have asked in the last 30 s, one client gets all slots but one and all blocks but a "
        "sixteenth. Nothing is preempted: who comes for the first time after a client has filled every slot "
        "waits until one of its answers ends, and so does whoever comes after one request that needs the "
        "whole store.",
    ],
}
PARTS = {"floods": floods, "pauses": pauses, "waits": waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "attack"])
    parser.add_argument("attack", nargs="*", help="name and address, where a part starts an attack")
    arguments = parser.parse_args()
    if arguments.part == "attack":
        attack(*arguments.attack)
    else:
        write(f"siege-{arguments.part}", PARTS[arguments.part](), NOTES.get(arguments.part))


if __name__ == "__main__":
    main()
