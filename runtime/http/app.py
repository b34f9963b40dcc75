"""The endpoints, and what every request meets before it reaches one of them."""

import hmac
import re
import secrets
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clo import __version__
from clo.runtime.http import answers, schema, stats
from clo.runtime.http.chat import chat, chat_of
from clo.runtime.http.completions import complete
from clo.runtime.http.errors import APIError
from clo.runtime.http.gateway import Gateway
from clo.runtime.http.metrics import exposition
from clo.runtime.http.requests import (
    NO_LORA,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    decode,
    read_plain,
)
from clo.runtime.http.streaming import ClientGone, failed, unless_gone
from clo.runtime.wire.errors import CLOError
from clo.runtime.wire.messages import MAX_MESSAGE_BYTES, Text

Handler = Callable[[Gateway, dict[str, Any], str], Coroutine[Any, Any, Response]]

_GENERATING = ("/v1/completions", "/v1/chat/completions")
_OPEN = ("/health", *stats.PAGE)  # without an API key
_LORA = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # of vLLM
_NAME = re.compile(rb"[!-~]{1,128}")  # of a request


class Entrance:
    """Gives every request a name, turns away those without the API key, and counts those that generate."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _NAME.fullmatch(given) else secrets.token_hex(16).encode()
        scope["state"] = {"name": name.decode()}

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", name)]
            await send(message)

        if not self._is_allowed(scope["path"], headers.get(b"authorization", b"")):
            text = "The API key is missing or wrong; send 'Authorization: Bearer KEY'."
            error = APIError(text, 401, code="invalid_api_key")
            await _response_of(error, {"www-authenticate": "Bearer"})(scope, receive, send_named)
        elif scope["path"] in _GENERATING:
            with self._gateway.counted():
                await self._generate(scope, receive, send_named)
        else:
            await self._app(scope, receive, send_named)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        tracer = self._gateway.tracer
        if tracer is None:
            await self._app(scope, receive, send)
            return
        with tracer.request(scope["state"]["name"], scope["path"], dict(scope["headers"])) as span:

            async def send_seen(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.answer(message["status"])
                await send(message)

            await self._app(scope, receive, send_seen)

    def _is_allowed(self, path: str, authorization: bytes) -> bool:
        key = self._gateway.api_key
        if key is None or path in _OPEN:
            return True
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key.encode())


def _response_of(error: APIError, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(error.body), error.status, headers, "application/json")


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _body(request: Request) -> dict[str, Any]:
    """The fields of a body.

    Raises:
        APIError: it is too large, or not JSON, or not called JSON: browsers ask nobody before they send
            another type to a server of another origin.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError("The body has to be JSON; send 'Content-Type: application/json'.", 415)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_MESSAGE_BYTES:
            raise APIError(f"The body is larger than {MAX_MESSAGE_BYTES} bytes; send less.", 413)
    return decode(bytes(data))


async def _tokenize(gateway: Gateway, body: dict[str, Any], name: str) -> Response:
    request = read_plain(body, TokenizeRequest)
    gateway.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise APIError("Give either 'prompt' or 'messages'.", param="prompt", code="invalid_value")
    if request.messages is not None:
        prompt = chat_of(request.messages, request.tools, request.chat_template_kwargs)
        tokens = await gateway.tokens(prompt)
    else:
        tokens = []
        if request.prompt:
            tokens = await gateway.tokens(Text(request.prompt), special=request.add_special_tokens)
    texts: list[str] | None = None
    if request.return_token_strs:
        texts = await gateway.aside(
            lambda: [gateway.spell(token).decode(errors="replace") for token in tokens]
        )
    return _json(
        answers.Tokenized(
            count=len(tokens),
            max_model_len=gateway.max_model_len,
            tokens=tokens,
            token_strs=texts,
        )
    )


async def _detokenize(gateway: Gateway, body: dict[str, Any], name: str) -> Response:
    request = read_plain(body, DetokenizeRequest)
    gateway.check_model(request.model)
    text = await gateway.aside(partial(gateway.tokenizer.decode, request.tokens, special=True))
    return _json(answers.Detokenized(text))


def build(gateway: Gateway) -> FastAPI:
    """The application. Its pages of documentation are left out: they load code from elsewhere."""
    app = FastAPI(title="CLO", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Entrance, gateway=gateway)
    if gateway.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=gateway.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    _add_errors(app)

    def post(path: str, handler: Handler, body: type[msgspec.Struct], answer: type[msgspec.Struct]) -> None:
        async def respond(request: Request) -> Response:
            fields = await _body(request)
            try:
                return await unless_gone(request.receive, handler(gateway, fields, request.state.name))
            except ClientGone:
                return Response(status_code=499)  # nobody reads it
            except CLOError as error:
                raise APIError.of(error, "messages" if "messages" in fields else "prompt") from None

        app.post(path, name=path, openapi_extra=schema.body(body), responses=schema.answers_with(answer))(
            respond
        )

    post("/v1/chat/completions", chat, ChatCompletionRequest, answers.ChatCompletion)
    post("/v1/completions", complete, CompletionRequest, answers.Completion)
    post("/tokenize", _tokenize, TokenizeRequest, answers.Tokenized)
    post("/detokenize", _detokenize, DetokenizeRequest, answers.Detokenized)
    _add_facts(app, gateway)
    stats.add_page(app, gateway)
    schema.complete(app)
    return app


def _add_facts(app: FastAPI, gateway: Gateway) -> None:
    """The endpoints that say something about the server."""
    models = {
        name: answers.Model(
            id=name, created=gateway.created, root=gateway.root, max_model_len=gateway.max_model_len
        )
        for name in gateway.names
    }

    @app.get("/v1/models", responses=schema.answers_with(answers.Models))
    async def list_models() -> Response:
        return _json(answers.Models(data=list(models.values())))

    @app.get("/v1/models/{name:path}", responses=schema.answers_with(answers.Model))
    async def model_of(name: str) -> Response:
        gateway.check_model(name)
        return _json(models[name])

    @app.get("/health", responses=schema.answers_with(answers.Health))
    async def health() -> Response:
        state = await gateway.state()
        body = msgspec.json.encode(answers.Health(state))
        return Response(body, 200 if state == "ready" else 503, media_type="application/json")

    @app.get("/load", responses=schema.answers_with(answers.Load))
    async def load() -> Response:
        return _json(answers.Load(gateway.open))

    @app.get("/version", responses=schema.answers_with(answers.Version))
    async def version() -> Response:
        return _json(answers.Version(__version__))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return await exposition(gateway)


def _add_errors(app: FastAPI) -> None:
    """Every error has OpenAI's form."""

    @app.exception_handler(APIError)
    async def of_request(request: Request, error: APIError) -> Response:
        return _response_of(error)

    @app.exception_handler(HTTPException)
    async def of_route(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        what = {404: f"There is no '{path}' here.", 405: f"'{request.method}' is not for '{path}'."}
        text = what.get(error.status_code, error.detail)
        if path in _LORA:
            text = f"'{path}' is not supported by this server; {NO_LORA}"
        return _response_of(APIError(text, error.status_code), error.headers)

    @app.exception_handler(Exception)
    async def of_server(request: Request, error: Exception) -> Response:
        return _response_of(failed())  # and the web server logs the error
