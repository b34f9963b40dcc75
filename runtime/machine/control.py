"""How a program asks a server of its own user and machine for what clients may not: through the launcher."""

from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

from clo.runtime.machine.addresses import from_this_machine, numeric_host
from clo.runtime.wire.errors import ConfigError, ProtocolError, ServerUnreachable, error_from
from clo.runtime.wire.messages import Examined, Failed, FromControl, Reloaded, ToControl, Working
from clo.runtime.wire.port import Caller

_Answer = TypeVar("_Answer", Reloaded, Examined)

SILENCE_S = 5.0  # a launcher says something every second while it is at work


def control_endpoint(address: str) -> str:
    """Where the launcher of a server listens, which is no file: nothing is left behind, and the kernel says
    whose process has connected.

    Args:
        address: where clients connect, such as ``tcp://127.0.0.1:5555``.

    Raises:
        ConfigError: it is no address.
    """
    try:
        parts = urlsplit(from_this_machine(address))
        if parts.scheme != "tcp" or parts.hostname is None or parts.port is None:
            raise ValueError
        return f"ipc://@clo-control-{numeric_host(parts.hostname)}:{parts.port}"
    except (ValueError, ConfigError):
        raise ConfigError(
            f"'{address}' is not the address of a server; give what its ready line says, such as "
            "tcp://127.0.0.1:5555."
        ) from None


def ask(
    address: str, message: ToControl, expected: type[_Answer], on_progress: Callable[[Working], None]
) -> _Answer:
    """Have a server's launcher carry something out.

    Args:
        address: see ``control_endpoint``.
        message: what to do.
        expected: what answers it.
        on_progress: is called about once a second until it is done.

    Raises:
        ConfigError: ``address`` is none.
        ServerUnreachable: nothing is heard of the launcher for ``SILENCE_S`` seconds, or another user's
            process is in its place; that is asked nothing.
        CLOError: the launcher refuses, or what it was doing has failed.
    """
    answers = _answers(address, message)
    while True:
        match next(answers):
            case Failed() as answer:
                raise error_from(answer.code, answer.text)
            case Working() as answer:
                on_progress(answer)
            case expected() as answer:
                return answer
            case answer:
                raise ProtocolError(f"The launcher answered with {type(answer).__name__}.")


def _answers(address: str, message: ToControl) -> Iterator[FromControl]:
    """All that a launcher says to a message, without an end."""
    try:
        with Caller[ToControl, FromControl](control_endpoint(address), FromControl, SILENCE_S) as launcher:
            launcher.send(message)
            while True:
                yield launcher.receive()
    except OSError:
        raise ServerUnreachable(
            f"No server of this user on this machine answers for {address}; is it running, and does its "
            "ready line say this address?"
        ) from None
