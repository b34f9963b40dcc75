"""A folder that no other user of the machine can look into, for the sockets between a server's processes."""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from clo.runtime.wire.errors import ConfigError

_PREFIX = "clo-"
_LONGEST = 80  # characters of its path; a socket's has at most 107
_YOUNG_S = 60.0  # a folder that has just been made may not be locked yet


class PrivateFolder:
    """A new folder of mode 0700, in ``$XDG_RUNTIME_DIR`` where that is this user's, or else among temporary
    files. It is locked while this process lives. Nobody removes the folder of one that was killed while its
    server started, so this removes those of its predecessors.

    Attributes:
        path: where it is.

    Raises:
        ConfigError: it cannot be made.
    """

    def __init__(self) -> None:
        parent = _parent()
        _sweep(parent)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            raise ConfigError(
                f"No folder for sockets can be made in {parent} ({error.strerror}); set TMPDIR to another."
            ) from None
        self._lock = os.open(self.path, os.O_RDONLY)
        with suppress(OSError):  # some network file systems have no locks; then it may be left behind
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        if len(str(self.path)) > _LONGEST:
            self.remove()
            raise ConfigError(f"{parent} is too long a path for sockets; set TMPDIR to a shorter one.")

    def __enter__(self) -> "PrivateFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove it with all that is in it; nothing happens the second time."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _parent() -> Path:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
    with suppress(OSError):
        if runtime.stat().st_uid == os.geteuid() and os.access(runtime, os.W_OK | os.X_OK):
            return runtime
    return Path(tempfile.gettempdir())


def _sweep(parent: Path) -> None:
    """Remove folders of this user's former servers, whose locks nobody holds any more. They have nothing but
    sockets: a folder that the user has given such a name is left alone."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another one has removed it, or it is of another user
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(lock)
                if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _YOUNG_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    with os.scandir(lock) as entries:
                        modes = {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in entries}
                    if all(map(stat.S_ISSOCK, modes.values())):
                        for name in modes:
                            os.unlink(name, dir_fd=lock)
                        folder.rmdir()
            finally:
                os.close(lock)
