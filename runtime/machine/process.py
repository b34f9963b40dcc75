"""What every child process of the launcher does: die with it, log, leave in order, explain its errors."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable

from clo.runtime.wire.errors import CLOError

EXIT_EXPLAINED = 3  # exit code after one line "error: <sentence>" on stderr
EXIT_UNEXPECTED = 1  # exit code after a logged traceback

_PR_SET_PDEATHSIG = 1

_logger = logging.getLogger(__name__)


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


def configure_logging(level: str) -> None:
    """Log to stderr from ``level`` (such as "warning") on, each line with its process id."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s[%(process)d] %(message)s",
        stream=sys.stderr,
    )


def run_process(main: Callable[[], None]) -> None:
    """Run ``main`` as the whole work of a child process.

    SIGINT is ignored: at Ctrl-C the terminal signals every process, and the launcher alone decides. SIGTERM
    keeps its default action, an immediate end: nothing that a child holds outlives it. An error ends the
    process as immediately, since an orderly end could wait for a GPU that is stuck: with code 3 after a
    ``CLOError``, whose sentence goes to stderr, and with code 1 after any other exception, whose traceback is
    logged.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        main()
    except CLOError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_EXPLAINED)
    except Exception:
        _logger.exception("Unexpected error in process %d.", os.getpid())
        logging.shutdown()
        os._exit(EXIT_UNEXPECTED)
