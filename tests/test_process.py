"""What child processes share: exit codes, and handlers checked against the messages they have to serve."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from clo.runtime.machine.process import set_threads
from clo.runtime.wire.handlers import handlers_of
from clo.runtime.wire.messages import Commit, Describe, Free


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import os, signal
from clo.runtime.wire.errors import ConfigError
from clo.runtime.machine.process import run_process
def main():
    {body}
run_process(main)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_an_explained_error_is_one_line_and_exit_code_3() -> None:
    done = run("raise ConfigError('Do this.')")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "error: Do this.\n")


def test_an_unexpected_error_is_logged_with_its_traceback_and_exit_code_1() -> None:
    done = run("{}['missing']")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'missing'" in done.stderr


def test_what_start_up_made_is_not_collected_again() -> None:
    done = run(
        """
    import gc
    from clo.runtime.machine.process import end_start_up
    kept = [[] for _ in range(1000)]
    end_start_up()
    print(any(kept is other for other in gc.get_objects()), gc.get_freeze_count() > 1000, gc.isenabled())"""
    )
    assert done.stdout == "False True True\n"


def test_sigterm_ends_the_process_and_sigint_does_not() -> None:
    done = run(
        """
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "goes on\n", "")


SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}


@pytest.mark.parametrize(
    ("found", "threads", "expected"),
    [
        ({}, None, SLEEPING),
        ({}, 6, SLEEPING | {"OMP_NUM_THREADS": "6"}),
        ({}, 0, SLEEPING | {"OMP_NUM_THREADS": "1"}),  # more workers than CPUs
        ({"OMP_NUM_THREADS": "3"}, 6, SLEEPING | {"OMP_NUM_THREADS": "3"}),
        (
            {"OMP_WAIT_POLICY": "ACTIVE", "HOME": "/"},
            None,
            SLEEPING | {"OMP_WAIT_POLICY": "ACTIVE", "HOME": "/"},
        ),
    ],
)
def test_threads_sleep_and_are_as_many_as_asked_unless_the_user_has_said_otherwise(
    found: dict[str, str], threads: int | None, expected: dict[str, str]
) -> None:
    environment = dict(found)
    set_threads(environment, threads)
    assert environment == expected


def test_what_is_set_before_torch_is_imported_is_what_torch_does() -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]), "see tests/__init__.py"


class OneMissing:
    def on_free(self, message: Free) -> None: ...


class Complete(OneMissing):
    def on_describe(self, message: Describe) -> None: ...


class OneTooMany(Complete):
    def on_commit(self, message: Commit) -> None: ...


class Twice(Complete):
    def on_free_again(self, message: Free) -> None: ...


class Untyped(Complete):
    def on_what(self) -> None: ...


def test_handlers_match_their_union_exactly() -> None:
    assert handlers_of(Complete, Free | Describe) == {
        Free: Complete.on_free,
        Describe: Complete.on_describe,
    }
    with pytest.raises(TypeError, match="no handler for Describe"):
        handlers_of(OneMissing, Free | Describe)
    for owner in (OneTooMany, Twice, Untyped):
        with pytest.raises(TypeError, match="does not handle a message of its own"):
            handlers_of(owner, Free | Describe)
