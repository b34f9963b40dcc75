"""From the address that a user names to the one that a socket is bound to."""

import socket

from clo.runtime.wire.errors import ConfigError


def numeric_host(host: str) -> str:
    """The numeric address for ``--host``; an IPv6 one has no brackets.

    Args:
        host: an IPv4 or IPv6 address, the latter in brackets or not, or a name of this machine.

    Raises:
        ConfigError: it is neither.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if name in ("", "*"):  # the C library takes these for loopback, and people mean all addresses
            raise OSError(0, "it names none")
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a name"
        raise ConfigError(
            f"--host {host} is neither an address nor a name of this machine ({reason}); use 127.0.0.1, or "
            "0.0.0.0 for all of its addresses."
        ) from None
    *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # IPv4 where there is one
    return str(address[0])
