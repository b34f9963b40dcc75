"""Errors as OpenAI's API has them: a status code, and an object that says what is wrong and where."""

from typing import Any

from clo.runtime.wire.errors import (
    CLOError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    ServerStopped,
    ServerUnreachable,
    WorkerDied,
)

_OF_ERRORS: dict[type[CLOError], tuple[int, str | None]] = {
    InvalidRequest: (400, None),
    PromptTooLong: (400, "context_length_exceeded"),
    Overloaded: (503, Overloaded.code),
    WorkerDied: (503, WorkerDied.code),
    ServerStopped: (503, ServerStopped.code),
    ServerUnreachable: (503, ServerUnreachable.code),
}
"""Status and OpenAI's code for each error of the server that has one of its own; others are 500."""


class APIError(Exception):
    """What a client is told.

    Args:
        message: one sentence that says what to do.
        status: the status code of HTTP.
        param: the field of the request that is wrong.
        code: which kind of error it is, where OpenAI has a name for that.
    """

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(" ".join(message.splitlines()))
        self.status, self.param, self.code = status, param, code

    @classmethod
    def of(cls, error: CLOError, param: str | None = None) -> "APIError":
        """The same for an error of the server; ``param`` is the field that the prompt came in."""
        status, code = _OF_ERRORS.get(type(error), (500, error.code))
        long = isinstance(error, PromptTooLong)  # others are about another field, or about none
        return cls(str(error), status, param=param if long else None, code=code)

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
