"""From the address that a user names to the one that a socket is bound to."""

import socket

from clo.runtime.wire.errors import ConfigError


def tcp_endpoint(host: str, port: int) -> str:
    """ZeroMQ's name of a TCP port: numeric, because ZeroMQ binds to no names, and IPv6 in brackets.

    Args:
        host: an IPv4 or IPv6 address, the latter in brackets or not, or a name of this machine.

    Raises:
        ConfigError: it is neither.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if name in ("", "*"):  # the C library takes these for loopback, and people mean all addresses
            raise OSError(0, "it names none")
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a name"
        raise ConfigError(
            f"--host {host} is neither an address nor a name of this machine ({reason}); use 127.0.0.1, or "
            "0.0.0.0 for all of its addresses."
        ) from None
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # IPv4 where there is one
    return f"tcp://[{address[0]}]:{port}" if family == socket.AF_INET6 else f"tcp://{address[0]}:{port}"
