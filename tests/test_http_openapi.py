"""The description at ``/openapi.json``: schemathesis makes requests of it, good and bad ones."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]

# Those about which requests are taken are left out: a schema does not know which tokens a model has.
CHECKS = "not_a_server_error,content_type_conformance,status_code_conformance,response_schema_conformance"


def test_no_request_is_an_error_of_the_server_and_answers_are_as_described(
    launch: Launch, tiny_model: Path, tmp_path: Path
) -> None:
    serve = ("-m", "tests.echo", "serve")
    with launch("--model", str(tiny_model), "--http", "0", program=serve) as server:
        command = (
            f"{sys.executable} -m schemathesis.cli run {server.url}/openapi.json --checks {CHECKS} "
            "--phases coverage,fuzzing --max-examples 30 --request-timeout 30 --generation-deterministic "
            "--suppress-health-check all --no-color"
        )
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Tested: 11" in done.stdout
