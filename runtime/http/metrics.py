"""``/metrics``: what the server does, for Prometheus.

Names that begin with ``vllm:`` mean what they mean in vLLM, so that dashboards for it work; those that begin
with ``clo_`` are about what is CLO's own. All but the gateway's own are about all clients of the server, not
only about those that speak HTTP.
"""

from collections.abc import Iterator, Mapping

from fastapi import Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from clo.runtime.http.gateway import Gateway
from clo.runtime.wire.messages import Histogram, Info

_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "failed": "error"}  # vLLM's words


class _Snapshot(Collector):
    """The metrics of one moment.

    Args:
        info: what the server says.
        model: name of the model.
        open: requests for tokens that are open at the gateway.
    """

    def __init__(self, info: Info, model: str, open: int) -> None:
        self._info, self._model, self._open = info, model, open

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._stores()
        yield from self._workers()
        yield from self._cache()

    def _requests(self) -> Iterator[Metric]:
        workers, traffic = self._info.workers, self._info.traffic
        running = sum(worker.running for worker in workers)
        waiting = self._info.waiting + sum(worker.waiting for worker in workers)
        yield self._gauge("vllm:num_requests_running", "Requests that are prefilled or decoded.", running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait to be.", waiting)
        for name, text, count in (
            ("vllm:prompt_tokens", "Tokens of prompts that have been prefilled.", traffic.prompt_tokens),
            ("vllm:generation_tokens", "Tokens that have been generated.", traffic.generated_tokens),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model], count)
            yield counter
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended.", labels=["model_name", "finished_reason"]
        )
        for how, requests in traffic.ended.items():
            ended.add_metric([self._model, _REASONS[how]], requests)
        yield ended
        for name, text, values in (
            ("time_to_first_token_seconds", "From arrival to the first token.", traffic.first_token),
            ("inter_token_latency_seconds", "From one token of a request to the next.", traffic.token_gap),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", traffic.request),
            ("iteration_tokens_total", "Tokens that one step generated.", traffic.step_tokens),
        ):
            yield self._histogram(f"vllm:{name}", text, values)
        yield self._gauge("clo_http_requests_open", "Requests for tokens open at the gateway.", self._open)

    def _stores(self) -> Iterator[Metric]:
        stores = self._info.stores
        blocks = sum(store.blocks for store in stores)
        free = sum(store.free_blocks for store in stores)
        used = 1.0 - free / blocks if blocks else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.", used)
        capacity = self._info.capacity_tokens
        yield self._gauge("clo_capacity_tokens", "Tokens that all KV stores hold together.", capacity)
        for name, text in (
            ("arena_bytes", "CPU memory of a KV store."),
            ("blocks", "Blocks of a KV store."),
            ("free_blocks", "Blocks of a KV store that nobody uses."),
            ("kept_blocks", "Those of them that hold prompts, for others that begin like them."),
            ("sequences", "Sequences that hold blocks of a KV store."),
            ("waiting", "Sequences that wait for blocks of a KV store."),
            ("disk_blocks", "Blocks that a KV store has on disk."),
        ):
            values = {store.store: getattr(store, name) for store in stores}
            yield _by(values, GaugeMetricFamily(f"clo_store_{name}", text, labels=["store"]))
        if not stores:  # while no worker is there to ask, a sum of nothing would look like a new beginning
            return
        for name, text in (
            ("disk_hits", "Blocks that came back from disk."),
            ("disk_unusable", "Files on disk that were damaged, of another model or key, or not to be read."),
        ):
            values = {store.store: getattr(store, name) for store in stores}
            yield _by(values, CounterMetricFamily(f"clo_store_{name}", text, labels=["store"]))
        for name, tokens, text in (
            ("queries", "asked_tokens", "Prompt tokens that could have been cached."),
            ("hits", "cached_tokens", "Prompt tokens that were cached."),
        ):
            total = sum(getattr(store, tokens) for store in stores)
            family = CounterMetricFamily(f"vllm:prefix_cache_{name}", text, labels=["model_name"])
            yield _by({self._model: total}, family)

    def _workers(self) -> Iterator[Metric]:
        workers = {str(worker.worker): worker for worker in self._info.workers}
        for name, text in (
            ("resident_bytes", "Memory of the resident rows of all slots of a worker."),
            ("index_bytes", "Memory of a worker's index."),
            ("private_bytes", "CPU memory of a worker without the arena."),
            ("gpu_bytes", "GPU memory that a worker holds."),
            ("running", "Requests that a worker prefills or decodes."),
            ("waiting", "Requests that wait at a worker."),
        ):
            values = {label: getattr(worker, name) for label, worker in workers.items()}
            yield _by(values, GaugeMetricFamily(f"clo_worker_{name}", text, labels=["worker"]))
        if workers:
            text = "How often a request gave back its blocks so that another could go on."
            family = CounterMetricFamily("vllm:num_preemptions", text, labels=["model_name"])
            yield _by({self._model: sum(worker.preemptions for worker in workers.values())}, family)
        steps = {label: worker.steps for label, worker in workers.items()}
        yield _by(steps, CounterMetricFamily("clo_worker_steps", "Decode steps.", labels=["worker"]))
        late = {label: worker.late_rows for label, worker in workers.items() if worker.late_rows is not None}
        text = "Fetched rows that the layer which attends to them chose itself, rather than the one before."
        yield _by(late, CounterMetricFamily("clo_late_rows", text, labels=["worker"]))
        checked = {label: worker.drift_check for label, worker in workers.items()}
        for name, text in (
            ("mean_kl", "Mean KL of checked steps from full attention, in nats."),
            ("agreement", "Share of checked steps with full attention's most likely token."),
        ):
            values = {label: getattr(check, name) for label, check in checked.items() if check is not None}
            yield _by(values, GaugeMetricFamily(f"clo_drift_{name}", text, labels=["worker"]))

    def _cache(self) -> Iterator[Metric]:
        cache = self._info.traffic.cache
        for name, text in (
            ("gate_checks", "Times that a head's query met the gate."),
            ("selections", "How many of these led to a new selection."),
            ("selected_rows", "Rows that those selections chose."),
            ("fetched_rows", "How many of these came from CPU memory."),
            ("fetched_bytes", "Bytes of the rows that came from CPU memory."),
        ):
            text = f"{text} Of requests that have ended."
            yield CounterMetricFamily(f"clo_{name}", text, getattr(cache, name))
        for name, text in (
            ("hit_rate", "Share of the rows selected since the start that were resident."),
            ("tail_share", "Share of the attention since the start that the tail has."),
            ("dropped_share", "Share of it that nothing has, by the scores; 0 without a tail."),
        ):
            yield GaugeMetricFamily(f"clo_{name}", text, getattr(cache, name))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _by({self._model: value}, GaugeMetricFamily(name, text, labels=["model_name"]))

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        total, buckets = 0, []
        for bound, count in zip([*histogram.bounds, "+Inf"], histogram.counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], buckets, histogram.sum)
        return family


def _by(values: Mapping[str, float], family: GaugeMetricFamily | CounterMetricFamily) -> Metric:
    """A metric with one value for each value of its label."""
    for label, value in values.items():
        family.add_metric([label], value)
    return family


async def exposition(gateway: Gateway) -> Response:
    """All metrics of now, in Prometheus' text format.

    Not in that of OpenMetrics, though Prometheus would rather have it: prometheus_client (0.26) writes
    ``vllm_`` for ``vllm:`` there, in samples and not in their types, and no dashboard would find them.

    Raises:
        CLOError: the server does not answer.
    """
    info = await gateway.client.info()
    registry = CollectorRegistry()
    registry.register(_Snapshot(info, gateway.names[0], gateway.open))
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
