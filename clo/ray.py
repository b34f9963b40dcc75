"""Replicas of CLO over machines: an application of Ray Serve. It needs the packages of the extra ``ray``.

    serve run clo.ray:app model=Qwen/Qwen3-8B

Two deployments make it up. ``CLO`` has the replicas: each starts a server as a child process, on the machine
and the GPUs that Ray gave it. ``OpenAI`` is what HTTP reaches: it passes requests on to a replica, which
Ray's router chooses by the beginning of the prompt, and answers back, byte by byte.
"""

import asyncio
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any

import aiohttp
import msgspec
from ray import serve
from ray.exceptions import RayActorError
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (
    PrefixCacheAffinityRouter,  # ray.serve.llm has it, too, but wants vLLM to be installed
)
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from clo.launch import config_from
from clo.runtime.http.errors import APIError
from clo.runtime.wire.errors import ConfigError, ServerUnreachable, WorkerDied

_OWN = ("host", "port", "http", "ssl-certfile", "ssl-keyfile")  # of a server that is on loopback alone
_PROMPT_CHARACTERS = 65536  # of the beginning by which a request is routed
_REPLICA_REQUESTS = 256  # open at a replica, where those wait that it does not run yet
_BUSY_REQUESTS = 16  # open at a replica on average: with more of them Ray adds replicas
_STOP_S = 30.0  # for a server to stop
_ATTEMPTS = 3  # at a request of whose answer nothing has come
_PAUSE_S = 0.5  # before the next one: until Ray knows that a replica has gone
_KEPT_LINES = 20  # of what a server wrote to stderr, for the error with which its start fails
_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade"}
_NOT_ON = _HOP | {b"host", b"content-length"}  # of a request: the way to the server has its own
_NOT_BACK = _HOP | {b"date", b"server", b"x-request-id"}  # of an answer: Serve adds them again
_GONE = (RayActorError, aiohttp.ClientError)  # the replica has, or its server

_logger = logging.getLogger("ray.serve")

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica.

    Attributes:
        path: with the query.
        prompt: the beginning of what is asked, by which Ray's router compares requests; never empty.
    """

    method: str
    path: str
    headers: Headers
    body: bytes
    prompt: str


@dataclass(frozen=True)
class Head:
    """What comes before the bytes of an answer."""

    status: int
    headers: Headers


class _Message(msgspec.Struct):
    content: Any = None


class _Asked(msgspec.Struct):
    """The part of a body that is routed by."""

    messages: list[_Message] = []
    prompt: Any = None


class PrefixRouter(PrefixCacheAffinityRouter):  # type: ignore[misc]  # Ray has no types here
    """Ray's router by prefixes, which survives that a replica ends while no ``OpenAI`` is there to see it.

    Ray's tree of prompts then goes on naming the replica, and the request for which it is named would never
    be routed.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try, in groups; see Ray's ``RequestRouter``."""
        try:
            groups: list[list[RunningReplica]] = await super().choose_replicas(
                candidate_replicas, pending_request
            )
        except KeyError as error:
            (gone,) = error.args
            await self._tree_actor.remove_tenants.remote([gone.to_full_id_str()])
            return [candidate_replicas]  # Ray takes the one with the fewest requests
        return groups


class Server:
    """A replica: a CLO server on loopback, and the way to it.

    Args:
        options: of ``launch.py``, without the dashes.

    Raises:
        RuntimeError: the server does not start; the text says why.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "clo.replica", str(os.getpid()), *_arguments(options)]
        # Ray runs this in a thread that lives as long as the replica; with that thread the child dies.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._stopping = False
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ready = False
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._watcher.join()
            raise RuntimeError(f"CLO's server did not start: {' '.join(self._lines)}")
        self._ready = True
        self._url = line.split()[-1]
        self._session: aiohttp.ClientSession | None = None

    def _watch(self) -> None:
        """Log what the server says, and end this replica when the server ends by itself: Ray then starts
        another one at once, where it would wait for health checks else and send requests here meanwhile."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.strip())
            _logger.warning(line.rstrip())
        code = self._process.wait()
        if self._ready and not self._stopping:
            _logger.error(f"CLO's server ended with exit code {code}, and so does its replica.")
            os._exit(1)

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """A ``Head`` and then the bytes of the answer, as they come.

        Raises:
            aiohttp.ClientError: the server has gone.
        """
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in call.headers]
        async with self._client().request(
            call.method, self._url + call.path, headers=headers, data=call.body, allow_redirects=False
        ) as response:
            kept = [(name.lower(), value) for name, value in response.raw_headers]
            yield Head(response.status, [(name, value) for name, value in kept if name not in _NOT_BACK])
            async for piece in response.content.iter_any():
                yield piece

    async def check_health(self) -> None:
        """Ray asks this every ten seconds; an error, or no answer, three times in a row ends the replica.

        A server whose workers are being started again is healthy: its requests wait and go on.

        Raises:
            RuntimeError: the server's router does not answer.
            aiohttp.ClientError: nor does its gateway.
        """
        async with self._client().get(f"{self._url}/health") as response:
            if (await response.json())["status"] == "unreachable":
                raise RuntimeError("The router of CLO's server does not answer.")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:  # it belongs to the event loop that is running
            self._session = aiohttp.ClientSession(
                auto_decompress=False,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_STOP_S),
            )
        return self._session

    def __del__(self) -> None:
        """Stop the server; Ray calls this when the replica has no more requests, or has to go."""
        self._stopping = True
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


class OpenAI:
    """OpenAI's API, as the replicas have it.

    Args:
        server: the replicas.
    """

    def __init__(self, server: DeploymentHandle) -> None:
        self._answer = server.options(method_name="answer", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Pass a request on; to another replica where one ends before anything of the answer has come."""
        call = await _call(request)
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE_S)
            pieces = self._answer.remote(call)
            try:
                head: Head = await anext(pieces)
            except _GONE as error:
                _logger.warning(f"A replica ended before it answered: {type(error).__name__}.")
                continue
            except asyncio.CancelledError:  # the client has gone
                pieces.cancel()
                raise
            response = StreamingResponse(_rest(pieces, head), head.status)
            response.raw_headers = head.headers
            return response
        text = f"{_ATTEMPTS} replicas ended one after another at this request; try again later."
        refusal = APIError.of(ServerUnreachable(text))
        return Response(msgspec.json.encode(refusal.body), refusal.status, media_type="application/json")


async def _call(request: Request) -> Call:
    body = await request.body()
    path = request.url.path.removeprefix(request.scope.get("root_path", "").rstrip("/"))
    query = f"?{request.url.query}" if request.url.query else ""
    return Call(
        request.method,
        path + query,
        [(name, value) for name, value in request.headers.raw if name not in _NOT_ON],
        body,
        _beginning(body) or request.url.path,
    )


def _beginning(body: bytes) -> str:
    """The first characters of what is asked, or the first tokens as numbers."""
    try:
        asked = msgspec.json.decode(body, type=_Asked)
    except msgspec.DecodeError:  # the server says what is wrong with it
        return ""
    said = [message.content for message in asked.messages] or asked.prompt or ""
    text = " ".join(str(part) for part in said) if isinstance(said, list) else str(said)
    return text[:_PROMPT_CHARACTERS]


async def _rest(pieces: Any, head: Head) -> AsyncIterator[bytes]:
    """The bytes behind a head. Where the replica ends in their midst, events end with one that says so, as a
    server's do; another answer breaks off."""
    try:
        async for piece in pieces:
            yield piece
    except _GONE:
        if not dict(head.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            raise
        error = APIError.of(WorkerDied("The replica that answered has ended; send the request again."))
        yield b"data: %b\n\ndata: [DONE]\n\n" % msgspec.json.encode(error.body)
    finally:
        pieces.cancel()  # of a client that has gone; without effect at the end


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line of a replica's server. YAML reads ``on`` and ``off`` as truths."""
    words = {True: "on", False: "off"}
    given = [
        f"--{name}={words[value] if isinstance(value, bool) else value}"
        for name, value in _named(options).items()
    ]
    return [*given, "--port=0", "--http=0"]


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same by the names that ``launch.py`` has, of which YAML may have ``_`` in the place of ``-``."""
    return {name.replace("_", "-"): value for name, value in options.items()}


def _check(args: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` for what cannot be an option of a replica."""
    named = _named(args)
    for name, value in named.items():
        if name in _OWN:
            raise ConfigError(
                f"'{name}' is each replica's own; Serve's http_options say where and how clients come."
            )
        if value is None:
            raise ConfigError(f"'{name}' has no value; give one, or leave the line out.")
        if isinstance(value, list | dict):
            raise ConfigError(f"'{name}' has to be one text, as launch.py takes it, such as numa0,numa1.")
    if len(named) < len(args):
        raise ConfigError("An option is there twice, once with '-' and once with '_'; give it once.")
    config_from(_arguments(args), "clo serve")


def _gpus(options: Mapping[str, Any]) -> int:
    """How many a replica needs."""
    named = _named(options)
    if named.get("device") == "cpu":
        return 0
    return int(named.get("workers", 1)) * int(named.get("tensor-parallel-size", 1))


def app(args: dict[str, Any]) -> serve.Application:
    """The application, for ``serve run clo.ray:app`` and as ``import_path`` in a configuration of Serve.

    Args:
        args: options of ``launch.py`` without the dashes, such as ``model`` and ``kv-size``, but for those of
            addresses, which each replica chooses. With ``device`` "cpu" replicas take no GPU, else as many as
            ``workers`` times ``tensor-parallel-size``.

    Raises:
        ConfigError: an option is unknown or its value is wrong.
    """
    _check(args)
    replicas = serve.deployment(
        Server,
        name="CLO",
        max_ongoing_requests=_REPLICA_REQUESTS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=1, max_replicas=8, target_ongoing_requests=_BUSY_REQUESTS
        ),
        ray_actor_options={"num_gpus": _gpus(args)},
        graceful_shutdown_timeout_s=600,  # for answers to end
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={
                "imbalanced_threshold": _BUSY_REQUESTS // 2,
                "do_eviction": True,
                "eviction_threshold_chars": 4_000_000,
                "eviction_target_chars": 3_600_000,
            },
        ),
    )
    entrance = serve.deployment(OpenAI, name="OpenAI", max_ongoing_requests=8 * _REPLICA_REQUESTS)
    return entrance.bind(replicas.bind(args))
