"""Spans of requests, as a collector gets them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from clo import launch as command
from clo.runtime.machine import packages
from tests.echo import HOLD
from tests.faults import WAIT_S
from tests.server import Server

service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs the extra otel"
)
pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

Launch = Callable[..., AbstractContextManager[Server]]

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STATUS_ERROR = 2
SERVER_KIND = 2
PATH = "/v1/traces"


class Collector:
    """Takes spans by OTLP over HTTP.

    Attributes:
        url: where.
        spans: those that have come.
        services: what each of their senders calls itself.
        headers: of the requests.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}{PATH}"
        self.spans: list[Any] = []
        self.services: list[str] = []
        self.headers: list[dict[str, str]] = []

    def take(self, headers: dict[str, str], body: bytes) -> None:
        request = service.ExportTraceServiceRequest.FromString(body)
        self.headers.append(headers)
        for resource in request.resource_spans:
            self.services.append(values(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def span(self, name: str) -> tuple[Any, dict[str, Any]]:
        """The span of the request with this name, once it is there, and its attributes."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            found = [span for span in self.spans if values(span)["gen_ai.request.id"] == name]
            if found:
                (span,) = found
                return span, values(span)
            time.sleep(0.02)
        raise AssertionError(f"no span of {name}")


def values(holder: Any) -> dict[str, Any]:
    """Its attributes as Python has them."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return (
            [plain(part) for part in value.array_value.values]
            if kind == "array_value"
            else getattr(value, kind)
        )

    return {item.key: plain(item.value) for item in holder.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == PATH
            taker.take(dict(self.headers), self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    taker = Collector(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield taker
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def tracing(launch: Launch, model: Path, url: str) -> AbstractContextManager[Server]:
    options = ("--http", "0", "--served-model-name", "a-name", "--otlp-traces-endpoint", url)
    return launch("--model", str(model), *options, program=("-m", "tests.echo", "serve"))


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def http(launch: Launch, tiny_model: Path, collector: Collector) -> Iterator[httpx.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # ms until a span is sent
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-for=collector")
        with (
            tracing(launch, tiny_model, collector.url) as server,
            httpx.Client(base_url=server.url, timeout=WAIT_S) as client,
        ):
            yield client


def test_a_chat_has_a_span_of_its_callers_trace(http: httpx.Client, collector: Collector) -> None:
    began = time.time_ns()
    body = {
        "messages": [{"role": "user", "content": "0123456789"}],
        "max_completion_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
    }
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "chat"}
    usage = http.post("/v1/chat/completions", json=body, headers=headers).json()["usage"]
    span, found = collector.span("chat")
    assert (span.name, span.kind) == ("llm_request", SERVER_KIND)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert began <= span.start_time_unix_nano <= span.end_time_unix_nano <= time.time_ns()
    first, decode, whole = (
        found.pop(f"gen_ai.latency.{name}") for name in ("time_to_first_token", "time_in_model_decode", "e2e")
    )
    assert 0 < first <= whole and first + decode == pytest.approx(whole)
    assert whole <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 + 0.1
    assert found == {
        "gen_ai.request.id": "chat",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.n": 1,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.response.model": "a-name",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.usage.num_sequences": 1,
        "clo.cache.fetched_bytes": 0,
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
    }
    assert span.status.code == 0
    assert set(collector.services) == {"clo"}
    assert collector.headers[0]["x-for"] == "collector"


def test_a_stream_of_several_answers_has_one_span(http: httpx.Client, collector: Collector) -> None:
    body = {"prompt": ["ab", "cdé"], "n": 2, "max_tokens": 50, "stream": True}
    answer = http.post("/v1/completions", json=body, headers={"x-request-id": "texts"})
    assert answer.text.endswith("data: [DONE]\n\n")
    span, found = collector.span("texts")
    assert not span.parent_span_id and len(span.trace_id) == 16
    assert found["gen_ai.request.n"] == 2 and found["gen_ai.usage.num_sequences"] == 4
    assert found["gen_ai.response.finish_reasons"] == ["stop"] * 4
    assert "gen_ai.request.temperature" not in found, "the request said nothing about it"
    tokens = http.post("/tokenize", json={"prompt": "cdé"}).json()["count"]
    assert found["gen_ai.usage.prompt_tokens"] == 1 + tokens, "'ab' is one token"
    assert found["gen_ai.usage.completion_tokens"] == 2 * (1 + 1) + 2 * (tokens + 1), "and one ends each"


def test_requests_that_are_refused_have_spans_without_tokens(
    http: httpx.Client, collector: Collector
) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", "best_of": 2}, headers={"x-request-id": "no"})
    assert answer.status_code == 400
    span, found = collector.span("no")
    assert found["http.response.status_code"] == 400 and span.status.code == 0, "it is the client's error"
    assert not [name for name in found if name.startswith("gen_ai.usage")]


def test_what_is_not_to_be_recorded_is_not(http: httpx.Client, collector: Collector) -> None:
    """Requests that their callers do not sample, and those for no tokens. A broken header is none."""
    for name, parent in (("unsampled", f"00-{TRACE}-{SPAN}-00"), ("broken", "00-zz-1")):
        headers = {"traceparent": parent, "x-request-id": name}
        assert http.post("/v1/completions", json={"prompt": "a"}, headers=headers).status_code == 200
    assert http.get("/v1/models", headers={"x-request-id": "models"}).status_code == 200
    span, _ = collector.span("broken")
    assert span.trace_id.hex() != TRACE
    assert not {"unsampled", "models"} & {values(span)["gen_ai.request.id"] for span in collector.spans}


def test_a_stream_that_is_dropped_has_a_span_that_says_how_far_it_came(
    http: httpx.Client, collector: Collector
) -> None:
    body = {"prompt": ["0123", HOLD], "stream": True}
    with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "dropped"}) as answer:
        for line in answer.iter_lines():
            if '"stop"' in line:
                break
    _, found = collector.span("dropped")
    assert found["gen_ai.response.finish_reasons"] == ["stop"]
    assert found["gen_ai.usage.completion_tokens"] == 5


def test_the_last_spans_are_sent_when_the_server_stops(launch: Launch, tiny_model: Path) -> None:
    """A request that the stop ends is one that failed."""
    with collecting() as collector, tracing(launch, tiny_model, collector.url) as server:
        body = {"prompt": ["0123", HOLD], "stream": True}
        headers = {"x-request-id": "last"}
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=WAIT_S
        ) as answer:
            lines = answer.iter_lines()
            while '"stop"' not in next(lines):
                pass
            server.process.terminate()
            assert "server_stopped" in "".join(lines)
        assert server.wait() == 0
        span, found = collector.span("last")
        assert span.status.code == STATUS_ERROR and "stop" in span.status.message
        assert found["http.response.status_code"] == 200


def test_a_collector_that_is_not_there_is_in_nobodys_way(launch: Launch, tiny_model: Path) -> None:
    with collecting() as collector:
        url = collector.url
    with tracing(launch, tiny_model, url) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, timeout=WAIT_S)
        assert answer.json()["choices"][0]["text"] == "a"
        server.process.terminate()
        assert server.wait() == 0


def test_traces_without_their_packages_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        packages, "find_spec", lambda name: None if name.startswith("opentelemetry") else find_spec(name)
    )
    line = ["--http", "0", "--otlp-traces-endpoint", "http://127.0.0.1:4318/v1/traces"]
    assert command.main(line) == 1
    assert capsys.readouterr().err == (
        "error: --otlp-traces-endpoint needs the package 'opentelemetry-sdk', which is not installed; run "
        "\"pip install 'clo-llm[otel]'\", or \"pip install -e '.[otel]'\" in a clone.\n"
    )
