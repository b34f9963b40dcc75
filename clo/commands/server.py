"""Options that several commands share: which server, how tokens are chosen, files that go in front."""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from clo import AsyncClient, Client
from clo.runtime.wire.errors import ConfigError, InvalidRequest


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as ``launch.py`` does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'.")


ADDRESS = "tcp://127.0.0.1:5555"
_NAMES = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def add_server(parser: argparse.ArgumentParser) -> None:
    """``--server`` and ``--api-key``."""
    group = parser.add_argument_group("server")
    add_address(group)
    group.add_argument(
        "--api-key",
        default=os.environ.get("CLO_API_KEY") or None,
        metavar="KEY",
        help="the server's key, where it has one; CLO_API_KEY does the same (none)",
    )


def add_address(group: argparse._ArgumentGroup) -> None:
    """``--server`` alone."""
    group.add_argument(
        "--server",
        default=os.environ.get("CLO_SERVER") or ADDRESS,
        metavar="ADDRESS",
        help=f"where it listens, as its ready line says; CLO_SERVER does the same ({ADDRESS})",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; what is not given is left to the server."""
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="at most so many tokens (what the server allows)"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (the model's default)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="share of probability kept (the model's default)"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="most likely tokens kept (the model's default)")
    group.add_argument("--seed", type=int, metavar="N", help="the same answer again (a random one)")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated (none)"
    )


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``Client.generate`` for what was given."""
    return {name: getattr(options, name) for name in _NAMES if getattr(options, name) is not None}


def client(options: argparse.Namespace) -> Client:
    return Client(options.server, api_key=options.api_key)


def async_client(options: argparse.Namespace) -> AsyncClient:
    return AsyncClient(options.server, api_key=options.api_key)


def with_files(files: list[Path], text: str) -> str:
    """Documents in front of a text, each under its name.

    Raises:
        ConfigError: a file cannot be read as text.
    """
    return "".join(f"{file.name}:\n\n{read_text(file)}\n\n" for file in files) + text


def read_text(file: Path) -> str:
    """Raises ``ConfigError`` where a file cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not text in UTF-8; convert it first.") from None


def bad_line(file: Path, number: int, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Line {number} of {file} {reason}.")
