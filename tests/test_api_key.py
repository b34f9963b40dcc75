"""Who may use the port: with a key, and beyond this machine without one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from clo.runtime.client import Client
from clo.runtime.wire.errors import Unauthorized
from tests.faults import SMALL, WAIT_S
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]

KEY = "correct horse battery staple"


def reachable(server: Server) -> str:
    """Where a client of this machine reaches a server that listens everywhere."""
    return server.address.replace("0.0.0.0", "127.0.0.1")


def test_only_clients_with_the_key_are_served(
    launch: Launch, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key comes from the environment and is on no command line. The log tells once of others."""
    monkeypatch.setenv("CLO_API_KEY", KEY)
    with launch("--model", str(tiny_model), *SMALL, "--host", "0.0.0.0") as server:
        for key in (None, "another key"):
            with (
                Client(reachable(server), WAIT_S, key) as client,
                pytest.raises(Unauthorized, match="API key"),
            ):
                client.generate("a")
        with Client(reachable(server), WAIT_S, KEY) as client:
            assert len(client.generate("a", max_tokens=2, ignore_eos=True).tokens) == 2
        assert not any(KEY in part for child in server.children() for part in child.cmdline())
        (line,) = server.stderr.read_text().splitlines()
        assert "A client was turned away: it has another API key, or none." in line


def test_a_server_that_everybody_may_use_says_so_once(launch: Launch, tiny_model: Path) -> None:
    with launch("--model", str(tiny_model), *SMALL, "--host", "0.0.0.0") as server:
        with Client(reachable(server), WAIT_S) as client:
            client.info()
        (line,) = server.stderr.read_text().splitlines()
        assert f"Whoever reaches {server.address} can use this server; set CLO_API_KEY" in line
        with Client(reachable(server), WAIT_S, KEY) as client, pytest.raises(Unauthorized, match="or none"):
            client.info()
