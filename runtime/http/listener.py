"""What the launcher does for the HTTP gateway before it starts it: check and listen."""

import socket
import ssl

from clo.runtime.config import GatewayConfig, ServerConfig
from clo.runtime.machine.addresses import not_bound, numeric_host
from clo.runtime.machine.packages import need
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.sockets import KEEPALIVE_S

# Of the extras http and otel: modules, and the packages that have them.
_PACKAGES = {
    name.replace("-", "_"): name
    for name in ("fastapi", "uvicorn", "uvloop", "httptools", "prometheus-client")
}
_TRACING = {
    "opentelemetry.sdk.trace": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
}


def tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """None where HTTP is not encrypted.

    Raises:
        ConfigError: the certificate or its key cannot be read.
    """
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"--ssl-certfile {config.ssl_certfile} with --ssl-keyfile {config.ssl_keyfile or 'in-certfile'} "
            f"cannot be used ({error.strerror or error}); give PEM files with a certificate and its key, "
            "without a password."
        ) from None
    return context


class Listener:
    """The socket on which the gateway is going to serve.

    Attributes:
        url: where clients reach it.

    Raises:
        ConfigError: a package is missing, a certificate cannot be read, or the address cannot be listened to.
    """

    def __init__(self, config: ServerConfig) -> None:
        need("--http", "http", _PACKAGES)
        if config.gateway.otlp_traces_endpoint is not None:
            need("--otlp-traces-endpoint", "otel", _TRACING)
        scheme = "http" if tls_context(config.gateway) is None else "https"
        port = config.gateway.http
        assert port is not None
        host = numeric_host(config.host)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            raise not_bound("--http", config.host, port, error) from None
        # What is accepted inherits this: events do not wait until earlier ones are acknowledged, and a client
        # whose machine is gone is noticed.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
        name = f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{name}:{self._socket.getsockname()[1]}"

    @property
    def descriptor(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Give the socket up, once the gateway has it."""
        self._socket.close()
