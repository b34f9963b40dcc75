"""The handlers of a process, one method per message, checked against the union that it has to serve."""

from collections.abc import Callable
from inspect import getmembers, isfunction
from typing import Any, get_args, get_type_hints

from clo.runtime.wire.messages import Message


def handlers_of(owner: type, union: Any) -> dict[type[Message], Callable[..., None]]:
    """Table from message type to the method of ``owner`` that handles it.

    A handler is a method named ``on_...`` with a parameter ``message``, annotated with the message type.

    Raises:
        TypeError: a message of ``union`` has no handler or two, or a handler takes something else.
    """
    table: dict[type[Message], Callable[..., None]] = {}
    for name, method in getmembers(owner, isfunction):
        if not name.startswith("on_"):
            continue
        kind = get_type_hints(method).get("message")
        if kind is None or kind not in get_args(union) or kind in table:
            raise TypeError(f"{owner.__name__}.{name} does not handle a message of its own: {kind}.")
        table[kind] = method
    missing = [kind.__name__ for kind in get_args(union) if kind not in table]
    if missing:
        raise TypeError(f"{owner.__name__} has no handler for {', '.join(missing)}.")
    return table
