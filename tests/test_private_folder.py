"""The folder for a server's sockets: private, gone at the end, and not left behind for ever."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clo.runtime.machine import private_folder
from clo.runtime.machine.private_folder import PrivateFolder
from clo.runtime.wire.errors import ConfigError


@pytest.fixture(autouse=True)
def parent(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where folders are made. Its path is not much longer than a usual one."""
    parent = tmp_path_factory.mktemp("run")
    monkeypatch.setattr(private_folder, "_LONGEST", len(str(parent)) + 20)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(parent))
    return parent


def test_nobody_else_can_look_into_it_and_it_goes_with_all_that_it_holds(parent: Path) -> None:
    with PrivateFolder() as folder:
        assert folder.path.parent == parent
        assert folder.path.stat().st_mode & 0o777 == 0o700
        (folder.path / "socket").touch()
        folder.remove()
        assert not list(parent.iterdir())
    assert not list(parent.iterdir())


def test_a_runtime_folder_that_cannot_be_used_is_not(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of the user who called sudo, or one that is gone."""
    monkeypatch.setattr("tempfile.tempdir", str(parent))
    for found in ("", str(parent / "gone")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", found)
        with PrivateFolder() as folder:
            assert folder.path.parent == parent


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_folder, "_YOUNG_S", -1.0)
    code = """
import signal
from clo.runtime.machine import private_folder
private_folder._LONGEST = 200
print(private_folder.PrivateFolder().path, flush=True)
signal.pause()
"""
    (parent / "clo-file").touch()
    (parent / "other").mkdir()
    own = parent / "clo-ofauser"  # a name such as the server's folders have
    own.mkdir(mode=0o700)
    (own / "precious").touch()
    environment = os.environ | {"XDG_RUNTIME_DIR": str(parent)}
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(left / "router"))
        with PrivateFolder() as folder:
            assert left.exists() and folder.path.exists(), "both are in use"
            PrivateFolder().remove()
            assert left.exists() and folder.path.exists()
        other.send_signal(signal.SIGKILL)
    assert left.exists()
    with PrivateFolder():
        assert not left.exists()
    assert {path.name for path in parent.iterdir()} == {"clo-file", "other", own.name}
    assert (own / "precious").exists()


def test_what_cannot_be_made_is_explained(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_folder, "_LONGEST", 10)
    with pytest.raises(ConfigError, match="too long a path for sockets; set TMPDIR"):
        PrivateFolder()
    assert not list(parent.iterdir())
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(parent / "gone"))
    with pytest.raises(ConfigError, match="No such file or directory"):
        PrivateFolder()
