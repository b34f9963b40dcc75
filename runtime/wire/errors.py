"""Errors that a user of CLO can see, each with the code under which it travels over a socket."""

from typing import ClassVar


class CLOError(Exception):
    """Base of all errors raised on purpose. Its text is one sentence that says what to do, in one line
    whatever it quotes."""

    code: ClassVar[str] = "internal"

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.splitlines()))


class ConfigError(CLOError):
    """An option, a model folder or the machine does not allow the server to start."""

    code = "config"


class InvalidRequest(CLOError):
    """The request is malformed: an empty prompt, a wrong type, a value out of range."""

    code = "invalid_request"


class PromptTooLong(CLOError):
    """Prompt and requested tokens exceed the model length, or more blocks than the store has."""

    code = "prompt_too_long"


def context_is(tokens: int) -> str:
    """How a ``PromptTooLong`` names the longest sequence: in the words that clients of OpenAI look for."""
    return f"this model's maximum context length is {tokens} tokens"


class Overloaded(CLOError):
    """The client has too many requests open, or does not read its stream, whose requests were dropped."""

    code = "overloaded"


class WorkerDied(CLOError):
    """The worker or the KV store that served the request is gone."""

    code = "worker_died"


class ServerStopped(CLOError):
    """The server was asked to stop while the request was open."""

    code = "server_stopped"


class ServerUnreachable(CLOError):
    """No server answers at the address, or the connection was lost."""

    code = "server_unreachable"


class Unauthorized(CLOError):
    """The server does not accept the client's API key, or wants one."""

    code = "unauthorized"


class RequestTimeout(CLOError):
    """The client's own time limit passed; the request was cancelled."""

    code = "timeout"


class DeviceStuck(CLOError):
    """The GPU does not finish its work; the worker ends."""

    code = "device_stuck"


class ProtocolError(CLOError):
    """A message that is not valid MessagePack, not a known type, or has wrong fields."""

    code = "protocol"


_BY_CODE: dict[str, type[CLOError]] = {
    kind.code: kind
    for kind in (
        CLOError,
        ConfigError,
        InvalidRequest,
        PromptTooLong,
        Overloaded,
        WorkerDied,
        ServerStopped,
        ServerUnreachable,
        Unauthorized,
        RequestTimeout,
        DeviceStuck,
        ProtocolError,
    )
}


def error_from(code: str, text: str) -> CLOError:
    """The exception that stands for ``code``; a code unknown to this version becomes a ``CLOError``."""
    return _BY_CODE.get(code, CLOError)(text)
