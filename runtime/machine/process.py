"""What every child process of the launcher does: die with it, log, leave in order, explain its errors."""

import ctypes
import gc
import importlib.util
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, MutableMapping

from clo.runtime.wire.errors import CLOError, ConfigError

EXIT_EXPLAINED = 3  # exit code after one line "error: <sentence>" on stderr
EXIT_UNEXPECTED = 1  # exit code after a logged traceback
EXIT_ALONE = 4  # exit code after a ``GroupEnded``

_PR_SET_PDEATHSIG = 1
_LEAST_DESCRIPTORS = 256  # what the router leaves to all else but connections, and some for these

_logger = logging.getLogger(__name__)


class GroupEnded(Exception):
    """Another process without which this one cannot go on has ended; why is for that one to say."""


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends, however it ends.

    Args:
        parent: pid of the process that started this one.

    Raises:
        OSError: the kernel refuses.
        SystemExit: the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:  # it ended before the request above, so no signal will come
        sys.exit(EXIT_UNEXPECTED)


def keep_torch_out() -> None:
    """Let no import in this process load PyTorch, unless it is there already. To be called before
    transformers is imported.

    Launcher and gateway want transformers for configurations and tokenizers alone, which compute nothing with
    tensors. Without PyTorch they start in half the time and take a third of the memory.

    Raises:
        ModuleNotFoundError: it is not installed, so that no worker could start.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # an import fails, and nobody finds it
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # transformers would say that it is missing


def read_key() -> str:
    """The key of the server's sockets, which the parent writes to this process's stdin: neither command lines
    nor files show it."""
    return sys.stdin.readline().strip()


def raise_descriptor_limit() -> None:
    """Let this process and its children have as many descriptors as the system allows: a client takes one.

    Raises:
        ConfigError: the system allows so few that a server's own processes could not reach one another.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < _LEAST_DESCRIPTORS:
        raise ConfigError(
            f"A process may have {most} files open here, and a server needs {_LEAST_DESCRIPTORS}: raise the "
            "hard limit (ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile of Docker)."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def configure_logging(level: str) -> None:
    """Log to stderr from ``level`` (such as "warning") on, each line with its process id."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s",
        stream=sys.stderr,
    )


def end_start_up() -> None:
    """Keep what exists by now out of later garbage collections.

    It lives as long as the process. To look through all of PyTorch and transformers, as each full collection
    would, stops a process for 20 ms or more, in the midst of decode steps.
    """
    gc.collect()
    gc.freeze()


def set_threads(environment: MutableMapping[str, str], threads: int | None = None) -> None:
    """Let OpenMP's threads sleep when they have nothing to do, and use ``threads`` of them (None for all).

    By default they spin for milliseconds, and on cores that something else uses too, a small loop of torch
    operations ran up to thirty times slower for it. They may spin for some microseconds, as long as it takes
    to wake them: a decode step on two free cores took nearly twice as long without. What the user has set
    stays. A process reads this when it loads torch, so it has to be set before.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "10000")  # libgomp, which comes with torch
    environment.setdefault("KMP_BLOCKTIME", "0")  # libomp
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


def run_process(main: Callable[[], None]) -> None:
    """Run ``main`` as the whole work of a child process.

    SIGINT is ignored: at Ctrl-C the terminal signals every process, and the launcher alone decides. SIGTERM
    keeps its default action and ends the process at once, but for a store with a disk: nothing else that a
    child holds outlives it. An error ends the process just as immediately, since an orderly exit could wait
    for a stuck GPU: with code 3 after a ``CLOError``, whose sentence goes to stderr, and with code 1 after
    any other exception, whose traceback is logged. After a ``GroupEnded`` it says nothing, with code 4.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        main()
    except CLOError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_EXPLAINED)
    except GroupEnded as error:
        _logger.info("%s", error)
        os._exit(EXIT_ALONE)
    except Exception:
        _logger.exception("Unexpected error in process %d.", os.getpid())
        logging.shutdown()
        os._exit(EXIT_UNEXPECTED)
