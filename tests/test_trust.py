"""What another user of the machine can do to a server: nothing, whosever server it is."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.faults import SMALL, WAIT_S, assert_serves
from tests.server import ROOT, Server

Launch = Callable[..., AbstractContextManager[Server]]

OWNER = 65533
INTRUDE = """
import json, os, socket, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
folder, paths, pids = json.loads(sys.argv[1])
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

attempt("list", lambda: os.listdir(folder))
for path in paths:
    attempt(path, lambda: connect(path))
for line in open("/proc/net/unix"):
    name = line.split()[-1]
    if name.startswith("@") and "clo-" in name and "clo-test" not in name:
        attempt(name, lambda: connect("\\0" + name[1:]))
for pid in pids:
    for what in ("environ", "mem", "maps"):
        attempt(f"{pid} {what}", lambda: open(f"/proc/{pid}/{what}", "rb").read(1))
    for number in range(64):
        attempt(f"{pid} fd {number}", lambda: os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR))
    attempt(f"kill {pid}", lambda: os.kill(pid, 0))
print(json.dumps(won))
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
    line = [sys.executable, "-c", "import clo.launch, torch"]
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, user=user, group=user, extra_groups=[])
    except PermissionError:
        return False
    return done.returncode == 0


def intrude(folder: Path, sockets: list[str], pids: list[int]) -> None:
    """Try everything as a user who owns nothing."""
    line = [sys.executable, "-c", INTRUDE, json.dumps([str(folder), sockets, pids])]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout == "[]\n", f"{done.stdout} {done.stderr}"


@pytest.mark.parametrize("owner", [0, OWNER], ids=["root", "plain user"])
def test_another_user_reaches_no_socket_and_no_memory(
    launch: Launch, readable_model: Path, owner: int
) -> None:
    """Neither while the worker is loading, before it has attached, nor when the server is ready; which serves
    as if nothing had been. Once it is ready nobody at all finds its sockets."""
    if owner and not may_run(owner):
        pytest.skip(f"other users may not run {sys.executable}, or not read what it needs")
    with launch("--model", str(readable_model), *SMALL, ready=False, user=owner) as server:
        deadline = time.monotonic() + WAIT_S
        while len(sockets := sorted(server.runtime.glob("clo-*/*"))) < 2:
            assert server.process.poll() is None and time.monotonic() < deadline, server.stderr.read_text()
            time.sleep(0.01)
        assert [path.name for path in sockets] == ["numa0", "router"]
        assert all(process.uids().real == owner for process in server.children())
        folder = sockets[0].parent
        assert folder.stat().st_mode & 0o777 == 0o700
        server.runtime.chmod(0o755)  # the folder within has to do on its own
        pids = [server.process.pid, *(process.pid for process in server.children())]
        intrude(folder, [str(path) for path in sockets], pids)
        assert server.stdout.read_text() == "", "it was ready before the other user could try"
        server.wait_ready()
        assert not folder.exists()
        intrude(folder, [str(path) for path in sockets], pids)
        assert_serves(server)
        assert server.stderr.read_text() == ""


def test_the_key_is_on_no_command_line(launch: Launch, readable_model: Path) -> None:
    """What a child is started with can be read by everybody, so its key comes another way."""
    with launch("--model", str(readable_model), *SMALL) as server:
        for process in server.children():
            assert "key" not in json.loads(process.cmdline()[3])
            assert not any(len(value) == 64 for value in process.environ().values())
