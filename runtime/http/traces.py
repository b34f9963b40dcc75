"""Traces for OpenTelemetry: a span for each request for tokens, with vLLM's name and attributes."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from clo import __version__
from clo.runtime.stream import AsyncStream

_FLUSH_S = 2.0  # for the last spans when the server stops
_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "min_p")  # what a request says, where it does


class RequestSpan:
    """The span of one request.

    Args:
        span: of OpenTelemetry.
        failed: its status of a span that failed; takes a text.
    """

    def __init__(self, span: Any, failed: Any) -> None:
        self._span, self._failed = span, failed
        self._began = time.monotonic()
        self._streams: list[AsyncStream] = []

    def open(
        self, prompts: list[int], n: int, sampling: Mapping[str, Any], streams: list[AsyncStream]
    ) -> None:
        """The request has been sent to the router.

        Args:
            prompts: tokens of each prompt.
            n: answers to each.
            sampling: fields of ``SamplingParams``.
            streams: the answers.
        """
        self._streams = streams
        asked = {name: sampling[name] for name in _REQUEST if sampling.get(name) is not None}
        self._set("request", {"n": n, **asked})
        self._set("usage", {"prompt_tokens": sum(prompts), "num_sequences": len(streams)})

    def answer(self, status: int) -> None:
        """The answer begins with an HTTP status."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self.fail(f"status {status}")

    def fail(self, text: str) -> None:
        """The server could not answer, or not to the end."""
        self._span.set_status(self._failed(text))

    def end(self) -> None:
        """The answer was sent, or nobody is left to read it."""
        now = time.monotonic()
        latency = {"e2e": now - self._began}
        first = [stream.first_token for stream in self._streams if stream.first_token is not None]
        if first:
            latency["time_to_first_token"] = min(first) - self._began
            latency["time_in_model_decode"] = now - min(first)
        self._set("latency", latency)
        if self._streams:
            self._set("usage", {"completion_tokens": sum(stream.tokens for stream in self._streams)})
            results = [stream.result for stream in self._streams if stream.is_complete]
            self._set("response", {"finish_reasons": [result.finish_reason for result in results]})
            fetched = sum(result.cache.fetched_bytes for result in results)
            self._span.set_attribute("clo.cache.fetched_bytes", fetched)
        self._streams = []
        self._span.end()

    def _set(self, group: str, values: Mapping[str, Any]) -> None:
        self._span.set_attributes({f"gen_ai.{group}.{name}": value for name, value in values.items()})


_current: ContextVar[RequestSpan | None] = ContextVar("span", default=None)


def current_span() -> RequestSpan | None:
    """Of the request that is being answered; None where none are made."""
    return _current.get()


class Tracer:
    """Makes spans and sends them, in a thread of its own, some together. What OpenTelemetry reads from the
    environment (``OTEL_...``) counts: headers for the collector, a sampler, the name of the service.

    Args:
        endpoint: URL of a collector that takes OTLP over HTTP.
        model: name of the model in answers.

    Raises:
        ImportError: a package of the extra otel is missing.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = Resource.create({"service.name": "clo", "service.version": __version__})
        resource = service.merge(OTELResourceDetector().detect())  # what the environment says comes last
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("clo", __version__)
        self._extract, self._kind = TraceContextTextMapPropagator().extract, SpanKind.SERVER
        self._failed = lambda text: Status(StatusCode.ERROR, text)
        self._model = model

    @contextmanager
    def request(self, name: str, path: str, headers: Mapping[bytes, bytes]) -> Iterator[RequestSpan]:
        """The span of a request while it is answered, also as ``current_span``.

        Args:
            name: of the request.
            path: of its URL.
            headers: its own; ``traceparent`` and ``tracestate`` say whose span this one belongs to.
        """
        carrier = {
            key: headers[key.encode()].decode("latin-1")
            for key in ("traceparent", "tracestate")
            if key.encode() in headers
        }
        attributes = {
            "gen_ai.request.id": name,
            "gen_ai.response.model": self._model,
            "url.path": path,
        }
        context = self._extract(carrier)
        span = RequestSpan(
            self._tracer.start_span("llm_request", context, self._kind, attributes), self._failed
        )
        token = _current.set(span)
        try:
            yield span
        finally:
            _current.reset(token)
            span.end()

    def close(self) -> None:
        """Send what is left, unless the collector takes too long for it."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_FLUSH_S)
