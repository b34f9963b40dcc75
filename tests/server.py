"""A real server for tests: ``launch.py`` with its children, started, observed and cleared away."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
READY_S = 240.0  # on a slow machine with other tests beside it; only a failure takes as long
STOP_S = 60.0


class Server:
    """One running ``launch.py``.

    Attributes:
        process: the launcher.
        stdout, stderr: files that collect its output and its children's.
        address: where clients connect; empty until the server is ready.
        url: the same for HTTP clients; empty where there is no HTTP.
        runtime: folder in which it makes one for its sockets.
    """

    def __init__(
        self, program: tuple[str, ...], arguments: tuple[str, ...], folder: Path, user: int,
        closed: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.runtime = folder / "runtime"
        self.runtime.mkdir(mode=0o700)
        environment = os.environ | {"XDG_RUNTIME_DIR": str(self.runtime)}
        if user != os.getuid():
            folder.chmod(0o755)
            os.chown(self.runtime, user, user)
            environment["HOME"] = str(self.runtime)
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            command = [sys.executable, *program, "--port", "0", "--device", "cpu", *arguments]
            if closed:
                closing = " ".join(f"{number}>&-" for number in closed)
                command = ["sh", "-c", f'exec "$@" {closing}', "sh", *command]
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                user=user,
                group=os.getgid() if user == os.getuid() else user,
                extra_groups=None if user == os.getuid() else [],
            )
        self.address = self.url = ""

    def wait_ready(self) -> None:
        """Wait for the ready line; ``AssertionError`` where the launcher ends or is too slow."""
        deadline = time.monotonic() + READY_S
        while not (line := self.stdout.read_text()).endswith("\n"):
            assert self.process.poll() is None, f"the launcher ended: {self.stderr.read_text()}"
            assert time.monotonic() < deadline, f"not ready in {READY_S} s: {self.stderr.read_text()}"
            time.sleep(0.02)
        words = line.split()
        self.address = words[1]
        self.url = words[-1] if words[-1].startswith("http") else ""

    def children(self, package: str = "") -> list[psutil.Process]:
        """Its stores (``package`` "kvstore"), workers ("gpu_worker") or both, by their command lines, so that
        orphans are found as well."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if len(command) == 5 and command[1] == "-m" and command[4] == str(self.process.pid):
                found += [process] if package in ("", command[2].removeprefix("clo.")) else []
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The launcher's exit code, once it and all children are gone; ``AssertionError`` if they, or
        anything that others could see of them, stay."""
        code = self.process.wait(STOP_S)
        deadline = time.monotonic() + STOP_S
        while left := self.children():
            assert time.monotonic() < deadline, f"left behind: {[process.cmdline() for process in left]}"
            time.sleep(0.02)
        files = [path for folder in (ROOT, Path("/dev/shm"), self.runtime) for path in folder.glob("*clo-*")]
        assert not files, f"left behind: {files}"
        return code


@contextmanager
def launch(
    *arguments: str,
    ready: bool = True,
    user: int | None = None,
    closed: tuple[int, ...] = (),
    program: tuple[str, ...] = ("launch.py",),
) -> Iterator[Server]:
    """Start ``launch.py --port 0 ARGUMENTS``, on the CPU if they do not say otherwise; at the end stop it and
    see that nothing of it is left.

    Args:
        ready: wait until it serves.
        user: whose processes they are; only root can choose another one.
        closed: descriptors that it has not got.
        program: what Python runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        server = Server(program, arguments, Path(folder), os.getuid() if user is None else user, closed)
        try:
            if ready:
                server.wait_ready()
            yield server
            if server.process.poll() is None:
                server.signal(signal.SIGTERM)
            server.wait()
        finally:
            server.process.kill()
            server.process.wait()
            for process in server.children():
                process.kill()
