"""The metrics as Prometheus itself scrapes them, and every query of the dashboard against it."""

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import WAIT_S
from tests.server import ROOT, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="needs the program prometheus: apt install prometheus"
    ),
]

Launch = Callable[..., AbstractContextManager[Server]]

KEY = "a-key"
RATE_INTERVAL = "10s"  # what Grafana would make of $__rate_interval, four scrapes at least
BODY = {"prompt": [[5, 6, 7] * 100, [9, 8] * 150], "max_tokens": 20, "ignore_eos": True}
TOKENS = 2 * 20


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    """One that fetches rows and compares steps with full attention, so that all metrics have values."""
    options = ("--select-k", "8", "--resident", "8", "--drift-check", "3", "--api-key", KEY)
    with launch("--model", str(tiny_model), "--http", "0", *options) as server:
        yield server


class Prometheus:
    """One that runs.

    Args:
        url: where it listens.
        log: what it wrote.
    """

    def __init__(self, url: str, log: Path) -> None:
        self._http, self._log = httpx.Client(base_url=url, timeout=WAIT_S), log

    def ask(self, path: str, **parameters: str) -> Any:
        """What its API answers; ``AssertionError`` where that is an error."""
        answer = self._http.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def values(self, query: str) -> list[float]:
        """Of all series that a query finds now."""
        return [float(series["value"][1]) for series in self.ask("query", query=query)["result"]]

    def wait(self, what: str, found: Callable[[], bool]) -> None:
        """Until something is so; ``AssertionError`` with its log where that takes too long."""
        deadline = time.monotonic() + WAIT_S
        while not found():
            assert time.monotonic() < deadline, f"{what}: {self._log.read_text()}"
            time.sleep(0.2)

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def scraping(server: Server, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with the configuration that the documentation has, but a shorter interval and the key."""
    documented = (ROOT / "docs/http.md").read_text()
    (text,) = re.findall(r"```yaml\n(scrape_configs:\n.*?)```", documented, re.DOTALL)
    (folder / "key").write_text(KEY)
    address = server.url.removeprefix("http://")
    text = text.replace("127.0.0.1:8000", address).replace("/path/to/key", str(folder / "key"))
    text = text.replace("# authorization:", "authorization:")
    assert address in text and "    authorization:" in text
    (folder / "prometheus.yml").write_text("global: {scrape_interval: 1s, scrape_timeout: 1s}\n" + text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={listen}",
    ]  # fmt: skip
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        prometheus = Prometheus(f"http://{listen}", log)
        prometheus.wait("it does not start", prometheus.ready)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with scraping(server, tmp_path_factory.mktemp("prometheus")) as running:
        yield running


def complete(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", json=BODY, headers={"authorization": f"Bearer {KEY}"}, timeout=WAIT_S
    )
    assert answer.status_code == 200, answer.text


def test_every_query_of_the_dashboard_finds_numbers(server: Server, prometheus: Prometheus) -> None:
    """While there are requests."""
    dashboard = json.loads((ROOT / "examples/grafana.json").read_text())
    queries = [
        target["expr"].replace("$model", ".*").replace("$__rate_interval", RATE_INTERVAL)
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    assert len(queries) > 15 and not any("$" in query for query in queries)
    stopped = threading.Event()

    def keep_busy() -> None:
        while not stopped.is_set():
            complete(server)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    found: dict[str, list[float]] = {query: [] for query in queries}
    try:

        def all_have_numbers() -> bool:
            for query, values in found.items():
                if not any(map(math.isfinite, values)):
                    found[query] = prometheus.values(query)
            return all(any(map(math.isfinite, values)) for values in found.values())

        deadline = time.monotonic() + WAIT_S
        while not all_have_numbers() and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        stopped.set()
        busy.join()
    for query, values in found.items():
        print(query, values)
    without = {query: values for query, values in found.items() if not any(map(math.isfinite, values))}
    assert not without, f"no series, or no number: {without}; {prometheus.ask('targets')['activeTargets']}"


def test_the_variables_of_the_dashboard_have_values(
    server: Server, prometheus: Prometheus, tiny_model: Path
) -> None:
    dashboard = json.loads((ROOT / "examples/grafana.json").read_text())
    (variable,) = [entry for entry in dashboard["templating"]["list"] if entry["type"] == "query"]
    asked = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", variable["query"]["query"])
    assert asked
    metric, label = asked.groups()

    def names() -> Any:
        return prometheus.ask(f"label/{label}/values", **{"match[]": metric})

    prometheus.wait("no scrape yet", lambda: names() == [str(tiny_model)])


def test_what_is_stored_is_what_was_asked(server: Server, prometheus: Prometheus) -> None:
    """Tokens, requests and buckets of known traffic, once it has been scraped."""
    totals = {
        "sum(vllm:generation_tokens_total)": TOKENS,
        "sum(vllm:prompt_tokens_total)": 600,
        'sum(vllm:request_success_total{finished_reason="length"})': 2,
        "sum(vllm:time_to_first_token_seconds_count)": 2,
        'sum(vllm:e2e_request_latency_seconds_bucket{le="+Inf"})': 2,
        "sum(vllm:inter_token_latency_seconds_count)": TOKENS - 2,
        "sum(vllm:iteration_tokens_total_sum)": TOKENS,
    }
    scrapes = "count_over_time(up[1h])"
    prometheus.wait("no scrape", lambda: prometheus.values("up") == [1.0])
    (seen,) = prometheus.values(scrapes)
    prometheus.wait("no further scrape", lambda: prometheus.values(scrapes)[0] >= seen + 2)
    before = {query: sum(prometheus.values(query)) for query in totals}
    complete(server)

    def grown() -> dict[str, float]:
        return {query: sum(prometheus.values(query)) - before[query] for query in totals}

    deadline = time.monotonic() + WAIT_S
    while grown() != totals and time.monotonic() < deadline:
        time.sleep(0.5)
    assert grown() == totals
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert prometheus.values('clo_worker_resident_bytes{worker="0"}')[0] > 0
