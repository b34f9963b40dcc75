"""What another user of the machine can do to a server: nothing, whosever server it is."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from clo.runtime.wire.strangers import INTRUDER
from tests.faults import SMALL, WAIT_S, assert_serves
from tests.server import ROOT, Server

Launch = Callable[..., AbstractContextManager[Server]]

OWNER = 65533
INTRUDE = """
import json, os, socket, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
folder, paths, names, pids = json.loads(sys.argv[1])
won = []

def attempt(name, act):
    try:
        act()
    except OSError:
        return
    won.append(name)

def connect(path):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)

def be_heard(name):
    # the kernel lets everybody connect where there is no file; the launcher ends that before it says a word
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(name)
        if not peer.recv(1):
            raise ConnectionError

attempt("list", lambda: os.listdir(folder))
for path in paths:
    attempt(path, lambda: connect(path))
for name in names:
    attempt(name, lambda: be_heard("\\0" + name[1:]))
for pid in pids:
    for what in ("environ", "mem", "maps", "map_files/"):
        attempt(f"{pid} {what}", lambda: open(f"/proc/{pid}/{what}", "rb").read(1))
    for number in range(64):
        attempt(f"{pid} fd {number}", lambda: os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR))
    attempt(f"kill {pid}", lambda: os.kill(pid, 0))
print(json.dumps(won))
"""


ATTACK = """
import json, os, sys, zmq
from clo.runtime.wire.messages import *
from clo.runtime.wire.sockets import configure, encode, present

router, store, worker = json.loads(sys.argv[1])
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
context = zmq.Context()
rows = os.memfd_create("rows")
os.truncate(rows, 4096 + 2**20)
ready = Ready(9, os.getpid(), "numa0", 10**6, 8)
done = Done(0, "stop", NO_STATS)
steps = Stepped([Step(0, 2**31 - 1, None), Step(1, 5, None)])
opened = OpenStaging(rows, 2**20, None)
scripts = {
    "another worker takes prompts": (router, b"worker-9", [ready, steps, done]),
    "the worker's place": (router, b"worker-0", [Ready(0, worker, "numa0", 10**6, 8), steps, done]),
    "the store's place": (router, b"store-numa0", [StoreReady(worker), Pong()]),
    "tokens for guessed sequences": (router, b"worker-0", [steps, done]),
    "the worker's blocks": (store, b"", [Attach(0, worker), Allocate(0, 4), Free(0), GetStoreStats()]),
    "blocks for init": (store, b"", [Attach(0, 1), Allocate(7, 4)]),
    "rows of others": (store, b"", [Attach(0, os.getpid()), opened, Allocate(7, 1), Push(7, 0, 0, 1, 0, 1)]),
    "what others wrote": (store, b"", [Attach(0, worker), Describe(0)]),
    "nonsense": (store, b"", []),
}
peers = {}
for name, (address, identity, messages) in scripts.items():
    for key in (None, "", "0" * 64):
        peer = context.socket(zmq.DEALER)
        configure(peer, None if identity else key)
        if identity:
            if key:
                present(peer, key)
            peer.setsockopt(zmq.IDENTITY, identity)
        peers[f"{name}, key {key}"] = peer, peer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        peer.connect("ipc://" + address)
        for data in [*map(encode, messages), b"x"]:
            peer.send(data)
won = []
for name, (peer, monitor) in peers.items():
    won += [name] if peer.poll(100) or monitor.poll(0) else []
print(json.dumps(won))
os._exit(0)
"""


pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture(scope="module")
def readable_model(tiny_model: Path) -> Iterator[Path]:
    """The model where every user can read it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(tiny_model, Path(folder) / "tiny")
        for path in (Path(folder), copy, *copy.iterdir()):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
        yield copy


def may_run(user: int) -> bool:
    """Whether another user can start a server."""
    line = [sys.executable, "-c", "import clo.runtime.supervisor, torch"]
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, user=user, group=user, extra_groups=[])
    except PermissionError:
        return False
    return done.returncode == 0


def attack(sockets: list[Path], worker: int) -> None:
    """Say what a worker or a store would, as a user who owns nothing."""
    store, router = map(str, sockets)
    line = [sys.executable, "-c", ATTACK, json.dumps([router, store, worker])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", f"{done.stdout} {done.stderr}"


def _names_of(pids: list[int]) -> list[str]:
    """Names of these processes' sockets that are no files: other servers' are left alone."""
    own = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it was closed a moment ago
                own.add(os.readlink(descriptor))
    found = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return sorted({words[-1] for words in found if words[-1][0] == "@" and f"socket:[{words[6]}]" in own})


def intrude(folder: Path, sockets: list[str], pids: list[int]) -> None:
    """Try everything as a user who owns nothing."""
    line = [sys.executable, "-c", INTRUDE, json.dumps([str(folder), sockets, _names_of(pids), pids])]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout == "[]\n", f"{done.stdout} {done.stderr}"


@pytest.fixture(params=[0, OWNER], ids=["root", "plain user"])
def owner(request: pytest.FixtureRequest) -> int:
    """Whose server it is."""
    owner: int = request.param
    if owner and not may_run(owner):
        pytest.skip(f"other users may not run {sys.executable}, or not read what it needs")
    return owner


def sockets_of(server: Server) -> list[Path]:
    """Wait for the sockets of a server that starts: store and router."""
    deadline = time.monotonic() + WAIT_S
    while len(sockets := sorted(server.runtime.glob("clo-*/*"))) < 2:
        assert server.process.poll() is None and time.monotonic() < deadline, server.stderr.read_text()
        time.sleep(0.01)
    assert [path.name for path in sockets] == ["numa0", "router"]
    return sockets


def test_another_user_reaches_no_socket_and_no_memory(
    launch: Launch, readable_model: Path, owner: int
) -> None:
    """Neither while the worker is loading, before it has attached, nor when the server is ready; which serves
    as if nothing had been. Once it is ready nobody at all finds its sockets, but the launcher's for ``clo
    reload``, which tells in the log of who was turned away."""
    with launch("--model", str(readable_model), *SMALL, ready=False, user=owner) as server:
        sockets = sockets_of(server)
        assert all(process.uids().real == owner for process in server.children())
        folder = sockets[0].parent
        assert folder.stat().st_mode & 0o777 == 0o700
        for outer in (server.runtime.parent, server.runtime):  # the folder within has to do on its own
            outer.chmod(0o755)
        pids = [server.process.pid, *(process.pid for process in server.children())]
        intrude(folder, [str(path) for path in sockets], pids)
        assert server.stdout.read_text() == "", "it was ready before the other user could try"
        server.wait_ready()
        assert not folder.exists()
        assert [name.startswith("@clo-control-") for name in _names_of(pids)] == [True]
        intrude(folder, [str(path) for path in sockets], pids)
        assert_serves(server)
        (line,) = server.stderr.read_text().splitlines()
        assert "clo.runtime.control" in line and INTRUDER in line


def test_another_user_who_finds_the_sockets_is_not_let_in(
    launch: Launch, readable_model: Path, owner: int
) -> None:
    """As if their folder hid nothing: the kernel says whose process connects, and it does not know the key.
    The log tells of it, and nothing has changed."""
    with launch("--model", str(readable_model), *SMALL, ready=False, user=owner) as server:
        sockets = sockets_of(server)
        for path in (server.runtime.parent, server.runtime, sockets[0].parent, *sockets):
            path.chmod(0o777)
        (worker,) = server.children("gpu_worker")
        worker.suspend()  # or it would be ready before the other user can try
        attack(sockets, worker.pid)
        assert server.stdout.read_text() == ""
        worker.resume()
        server.wait_ready()
        assert_serves(server)
        log = server.stderr.read_text().splitlines()
        assert len(log) == 2 and all(INTRUDER in line for line in log), log
        assert {line.split("[")[0].split()[-1] for line in log} == {
            "clo.runtime.router",
            "clo.kvstore.server",
        }


def test_the_key_is_on_no_command_line(launch: Launch, readable_model: Path) -> None:
    """What a child is started with can be read by everybody, so its key comes another way."""
    with launch("--model", str(readable_model), *SMALL) as server:
        for process in server.children():
            assert "key" not in json.loads(process.cmdline()[3])
            assert not any(len(value) == 64 for value in process.environ().values())


LISTEN = """
import json, os, socket, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("\\0" + sys.argv[1])
    listener.listen()
    print("listening", flush=True)
    heard = []
    for _ in range(int(sys.argv[2])):
        peer, _ = listener.accept()
        with peer:
            heard.append(peer.recv(4096).decode("latin-1"))
print(json.dumps(heard))
"""


def test_another_user_in_the_launchers_place_is_told_nothing() -> None:
    """No server runs, so the name at which its launcher would listen is anybody's. Who asks there finds out
    whose process it is before the first byte, and says so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name, address = f"clo-control-127.0.0.1:{port}", f"tcp://127.0.0.1:{port}"
    commands = (("clo", "reload"), ("clo.kvstore.check",), ("clo.kvstore.check", "--recompute", "1"))
    line = [sys.executable, "-c", LISTEN, name, f"{len(commands)}"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as listening:
        try:
            assert listening.stdout is not None
            assert listening.stdout.readline() == "listening\n"
            for command in commands:
                asking = [sys.executable, "-m", *command, "--server", address]
                done = subprocess.run(asking, cwd=ROOT, capture_output=True, text=True)
                assert (done.returncode, done.stdout) == (1, "")
                assert done.stderr == (
                    f"error: The process that listens at ipc://@{name} is user 65534's and not this user's, "
                    "so it was asked nothing; run this as the user whose server it is.\n"
                )
            assert json.loads(listening.stdout.read()) == [""] * len(commands)
        finally:
            listening.kill()
