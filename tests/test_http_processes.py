"""HTTP and the processes of a server: who may use it, what is encrypted, and what happens when one dies."""

import asyncio
import signal
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest
import trustme

from clo import launch as command
from clo.runtime.client import Client
from clo.runtime.machine import packages
from tests.echo import HOLD
from tests.faults import WAIT_S
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]

ECHO = ("-m", "tests.echo", "serve")
KEY = "correct horse battery staple"
PAGE = "https://page.example"


def echo(launch: Launch, model: Path, *options: str, ready: bool = True) -> AbstractContextManager[Server]:
    return launch("--model", str(model), "--http", "0", *options, program=ECHO, ready=ready)


def test_a_key_a_certificate_and_pages_of_one_origin(
    launch: Launch, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLO_API_KEY", KEY)
    authority = trustme.CA()
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    options = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--allowed-origins", PAGE)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with echo(launch, tiny_model, *options) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=server.url, verify=trust, timeout=WAIT_S) as http:
            assert http.get("/health").status_code == 200
            for wrong in ({}, {"Authorization": KEY}, {"Authorization": "Bearer another"}):
                for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                    refused = http.get(path, headers=wrong)
                    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                    assert refused.json()["error"]["code"] == "invalid_api_key"
            http.headers["Authorization"] = f"Bearer {KEY}"
            answer = http.post("/v1/completions", json={"prompt": "a"}, headers={"Origin": PAGE})
            assert answer.json()["choices"][0]["text"] == "a"
            assert answer.headers["access-control-allow-origin"] == PAGE
            elsewhere = http.get("/v1/models", headers={"Origin": "https://elsewhere.example"})
            assert "access-control-allow-origin" not in elsewhere.headers
            asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
            assert http.options("/v1/completions", headers=asked).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http"))
        assert not any(KEY in part for child in server.children() for part in child.cmdline())


def test_it_says_when_it_is_ready(launch: Launch, tiny_model: Path) -> None:
    """And a request that comes before is answered afterwards. The worker is stopped before it has begun."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--model", str(tiny_model), "--http", str(port))
    with (
        launch(*options, program=ECHO, ready=False) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as http,
    ):
        while not (workers := server.children("tests.echo")):
            time.sleep(0.001)
        workers[0].suspend()
        while True:
            try:
                early = http.get("/health")
                break
            except httpx.ConnectError:
                time.sleep(0.01)
        assert (early.status_code, early.json()) == (503, {"status": "starting"})
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(http.post, "/v1/completions", json={"prompt": "a"})
            assert http.get("/load").status_code == 200
            workers[0].resume()
            assert asked.result().json()["choices"][0]["text"] == "a"
        server.wait_ready()
        late = http.get("/health")
        assert (late.status_code, late.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("what", ["worker", "gateway", "stop"])
def test_open_requests_when_something_ends(launch: Launch, tiny_model: Path, what: str) -> None:
    """A stream ends with the error and its last word, and a whole answer has the status 503, except where the
    gateway itself is gone. The launcher says which process died."""

    async def run(server: Server, native: Client) -> tuple[httpx.Response | None, list[str]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
            whole = asyncio.create_task(http.post("/v1/completions", json={"prompt": HOLD}))
            body = {"prompt": ["0123", HOLD], "stream": True}
            lines: list[str] = []
            try:
                async with http.stream("POST", "/v1/completions", json=body) as stream:
                    async for line in stream.aiter_lines():
                        lines.append(line)
                        if '"stop"' in line:  # the first text is complete
                            while native.info().workers[0].waiting < 2:
                                await asyncio.sleep(0.01)
                            end(server)
                return await whole, lines
            except httpx.TransportError:
                await asyncio.gather(whole, return_exceptions=True)
                return None, lines

    def end(server: Server) -> None:
        if what == "stop":
            server.signal(signal.SIGTERM)
        else:
            package = "tests.echo" if what == "worker" else "runtime.http"
            (child,) = server.children(package)
            child.kill()

    with echo(launch, tiny_model, "--host", "::1", "--recovery", "off") as server:
        assert server.url.startswith("http://[::1]:")
        with Client(server.address, timeout=WAIT_S) as native:
            answer, lines = asyncio.run(asyncio.wait_for(run(server, native), WAIT_S))
        assert server.wait() == (0 if what == "stop" else 1)
        errors = server.stderr.read_text()
    if what == "gateway":
        assert answer is None
        assert "HTTP gateway was killed by SIGKILL" in errors
        return
    code = "server_stopped" if what == "stop" else "worker_died"
    assert answer is not None and answer.status_code == 503
    assert answer.json()["error"]["code"] == code
    assert f'"code":"{code}"' in lines[-4] and lines[-2] == "data: [DONE]"
    assert what == "stop" or "worker 0 was killed by SIGKILL" in errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--http 70000", "--http is 70000; it must be from 0 to 65535, or 'off'."),
        ("--served-model-name a", "--served-model-name is about HTTP; give --http PORT, too."),
        ("--http 0 --served-model-name a,", "--served-model-name has an empty name"),
        ("--http 0 --ssl-keyfile key.pem", "--ssl-keyfile goes with --ssl-certfile; give both."),
    ],
)
def test_options_that_are_wrong(options: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_what_http_cannot_start_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that cannot be read, a port in use, and packages that are not installed: each is a
    sentence before anything is loaded."""
    damaged = tmp_path / "certificate.pem"
    damaged.write_text("no certificate")
    for file in (tmp_path / "missing.pem", damaged):
        assert command.main(["--http", "0", "--ssl-certfile", str(file)]) == 1
        assert (
            f"error: --ssl-certfile {file} with --ssl-keyfile in-certfile cannot be used"
            in capsys.readouterr().err
        )
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert command.main(["--http", str(port)]) == 1
        assert f"Port {port} of 127.0.0.1 cannot be used (Address already in use); try another --http." in (
            capsys.readouterr().err
        )
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert command.main(["--http", "0"]) == 1
    assert "--http needs the package 'fastapi', which is not installed; run" in capsys.readouterr().err
