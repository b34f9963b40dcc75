"""A server of CLO for as long as it is measured."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from benchmarks.gpu.baseline import llama_config
from benchmarks.gpu.synthetic import Model
from benchmarks.serve.endpoint import EndpointError
from benchmarks.serve.tables import Server
from clo.runtime.model.default_model import default_model

_ROOT = Path(__file__).parents[2]
_STOP_S = 60.0  # far more than the launcher gives its children


class Running(NamedTuple):
    """A server that accepts requests."""

    address: str
    launcher: int  # pid of the process with its router


def write_model(model: Model, folder: Path) -> None:
    """Write what a server needs of a model without weights. Its tokenizer is the default model's, which knows
    fewer tokens."""
    llama_config(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(default_model()).save_pretrained(folder)


@contextmanager
def serving(server: Server, device: str) -> Iterator[Running]:
    """Start a server on a free port, with its own launcher, router, store and worker processes; at the end
    stop it.

    Raises:
        EndpointError: it does not start; it has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker, options = "clo.gpu_worker", server.options.split()
        if server.model is not None:
            write_model(server.model, Path(folder))
            worker = "benchmarks.serve.worker"
            options += ["--model", folder, "--load-format", "dummy"]
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.serve.launcher", str(os.getpid()), worker),
                *("--port", "0", "--device", device, *options),
            ],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            ready = process.stdout.readline().split()
            if not ready:
                raise EndpointError("The server did not start; it has printed why.")
            yield Running(ready[1], process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            finally:  # its children die with it
                process.kill()
                process.wait()
                process.stdout.close()
