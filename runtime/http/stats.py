"""``/stats``: what the server is doing, and the page at ``/`` that shows it."""

from importlib.resources import files

import msgspec
from fastapi import FastAPI, Response

from clo.runtime.http import answers, schema
from clo.runtime.http.errors import APIError
from clo.runtime.http.gateway import Gateway
from clo.runtime.wire.errors import CLOError

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE = tuple(_FILES)
"""What a browser loads before it has an API key; none of it says anything about the server."""

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI, gateway: Gateway) -> None:
    """Serve the page and ``/stats``."""
    folder = files("clo.runtime.http") / "page"

    def add(path: str, name: str, kind: str) -> None:
        response = Response((folder / name).read_bytes(), headers=_HEADERS, media_type=kind)

        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return response

    for path, (name, kind) in _FILES.items():
        add(path, name, kind)

    @app.get("/stats", responses=schema.answers_with(answers.Stats))
    async def stats() -> Response:
        try:
            info = await gateway.client.info()
        except CLOError as error:
            raise APIError.of(error) from None
        body = answers.Stats(
            model=gateway.names[0],
            state=info.state,
            attention=info.attention,
            max_model_len=info.max_model_len,
            capacity_tokens=info.capacity_tokens,
            open=gateway.open,
            waiting=info.waiting,
            workers=info.workers,
            stores=info.stores,
            traffic=info.traffic,
        )
        return Response(
            msgspec.json.encode(body), headers={"cache-control": "no-store"}, media_type="application/json"
        )
