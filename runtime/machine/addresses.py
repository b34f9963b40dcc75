"""From the address that a user names to the one that a socket is bound to, and to where it is reached."""

import errno
import os
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


def not_bound(option: str, host: str, port: int, error: OSError) -> ConfigError:
    """Why an address cannot be listened to; ``option`` is the one that chose the port."""
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EAFNOSUPPORT):
        return ConfigError(
            f"--host {host} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all of its "
            "addresses."
        )
    reason = os.strerror(error.errno or 0)
    return ConfigError(f"Port {port} of {host} cannot be used ({reason}); try another {option}.")


def from_this_machine(endpoint: str) -> str:
    """Where processes of this machine reach what listens at an endpoint, such as ``tcp://0.0.0.0:5555``."""
    return endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
