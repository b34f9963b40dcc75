"""HTTP with a model that computes: the native client's answers, many clients at once, and the metrics."""

import asyncio
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from clo.runtime.client import AsyncClient, Client
from clo.runtime.wire.errors import PromptTooLong
from tests.faults import WAIT_S, wait_until_idle
from tests.server import ROOT, Server

Launch = Callable[..., AbstractContextManager[Server]]

STREAMS, TOKENS = 100, 40
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    options = ("--kv-size", "4MiB", "--max-num-seqs", "8", "--select-k", "32", "--resident", "128")
    more = ("--drift-check", "7", "--http", "0")
    with launch("--model", str(tiny_model), *options, *more) as server:
        yield server


@pytest.fixture(scope="module")
def native(server: Server) -> Iterator[Client]:
    with Client(server.address, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=WAIT_S, max_retries=0) as client:
        yield client


def test_only_workers_have_torch(server: Server) -> None:
    """In the others it would cost seconds of each start and a quarter of a GiB."""
    processes = [psutil.Process(server.process.pid), *server.children()]
    with_torch = [
        process.cmdline()[1:3]
        for process in processes
        if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    ]
    assert len(processes) == 4
    assert with_torch == [["-m", "clo.gpu_worker"]]


def test_answers_are_those_of_the_native_client(client: OpenAI, native: Client, tiny_model: Path) -> None:
    """Tokens, text, probabilities and the reason of the end, drawn with a seed, of a text and of a chat."""
    model = str(tiny_model)
    sampling: Any = {"max_tokens": 30, "seed": 5, "temperature": 0.9, "top_p": 0.95}
    extra = {"top_k": 40, "return_token_ids": True}
    expected = native.generate("once upon", logprobs=2, top_k=40, **sampling)
    choice: Any = client.completions.create(
        model=model, prompt="once upon", logprobs=2, extra_body=extra, **sampling
    ).choices[0]
    assert (choice.token_ids, choice.text) == (expected.tokens, expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert expected.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx([entry.logprob for entry in expected.logprobs])

    messages: Any = [{"role": "user", "content": "once upon"}]
    expected = native.generate(messages, top_k=40, **sampling)
    answer: Any = client.chat.completions.create(model=model, messages=messages, extra_body=extra, **sampling)
    assert (answer.choices[0].token_ids, answer.choices[0].message.content) == (
        expected.tokens, expected.text,
    )  # fmt: skip
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_answers_to_one_prompt_differ_and_can_be_repeated(client: OpenAI) -> None:
    options: Any = {
        "model": client.models.list().data[0].id,
        "prompt": "once",
        "n": 3,
        "seed": 7,
        "max_tokens": 12,
    }
    first, second = (client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3 and texts == [choice.text for choice in second.choices]


def test_a_prompt_is_scored(client: OpenAI, native: Client) -> None:
    """As evaluation harnesses do."""
    prompt = "a prompt to score"
    options: Any = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    extra = {"return_token_ids": True}
    choice: Any = client.completions.create(model=native.info().model, extra_body=extra, **options).choices[0]
    ids: list[int] = choice.prompt_token_ids
    scored = native.generate(ids, max_tokens=0, prompt_logprobs=1)
    expected = [entry and entry.logprob for entry in scored.prompt_logprobs or ()]
    assert choice.logprobs.token_logprobs == expected and expected[0] is None
    assert choice.finish_reason == "length" and choice.token_ids == []
    assert choice.text == prompt and "".join(choice.logprobs.tokens or ()) == prompt


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_schema_and_calls_are_made_where_they_have_to(
    client: OpenAI, native: Client, stream: bool
) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    options: Any = {"model": native.info().model, "messages": [{"role": "user", "content": "a"}]}
    options |= {"max_tokens": 300, "seed": 1, "extra_body": {"structured_outputs": None}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for choice in ({"type": "function", "function": {"name": "f"}}, "required", None):
        more: Any = {"tools": [tool], "tool_choice": choice}
        if choice is None:
            more = {
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
            }
        if stream:
            with client.chat.completions.stream(**options, **more) as events:
                message: Any = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(**options, **more).choices[0].message
        text = message.content if choice is None else message.tool_calls[0].function.arguments
        Draft202012Validator(schema).validate(json.loads(text))


def test_many_streams_some_dropped_and_some_read_slowly(server: Server, native: Client) -> None:
    """30 of 100 are dropped in the middle and 10 are read a little at a time; the others are whole and their
    own, the server answers meanwhile, and afterwards it holds nothing."""
    prompts = [f"this is stream number {number}" for number in range(STREAMS)]

    async def read(number: int, http: httpx.AsyncClient) -> str:
        body = {"prompt": prompts[number], "stream": True, **OPTIONS}
        text = ""
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if number % 10 < 3 and len(text) > 10:
                        break
        return text

    async def read_slowly(number: int) -> str:
        """With a receive buffer so small that the gateway has to wait."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.setblocking(False)
        host, port = server.url.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=connection, limit=2**10)
        body = json.dumps({"prompt": prompts[number], "stream": True, **OPTIONS}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json"
        )
        writer.write(b"%b\r\ncontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        data = b""
        while part := await reader.read(512):
            data += part
            await asyncio.sleep(0.02)
        writer.close()
        events = [line for line in data.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")]
        return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)

    async def ask_for_health(http: httpx.AsyncClient) -> int:
        asked = 0
        while True:
            assert (await http.get("/health")).json() == {"status": "ready"}
            asked += 1
            await asyncio.sleep(0.05)

    async def run() -> tuple[list[str], list[str]]:
        async with AsyncClient(server.address, timeout=WAIT_S) as direct:
            whole = await asyncio.gather(*(direct.generate(prompt, **OPTIONS) for prompt in prompts))
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S, limits=limits) as http:
            watching = asyncio.create_task(ask_for_health(http))
            texts = await asyncio.gather(
                *(read_slowly(n) if n % 10 == 9 else read(n, http) for n in range(STREAMS))
            )
            assert not watching.done(), "the server did not answer"
            watching.cancel()
        return [result.text for result in whole], texts

    expected, texts = asyncio.run(asyncio.wait_for(run(), 2 * WAIT_S))
    for number, (whole, text) in enumerate(zip(expected, texts, strict=True)):
        if number % 10 < 3:
            assert 10 < len(text) < len(whole) and whole.startswith(text)
        else:
            assert text == whole, f"stream {number}"
    wait_until_idle(native)
    assert httpx.get(f"{server.url}/load", timeout=WAIT_S).json() == {"server_load": 0}


# ----------------------------------------------------------------------------------------- metrics


def metrics(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=WAIT_S).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_those_of_known_traffic(server: Server, client: OpenAI, native: Client) -> None:
    """Also of the native client's. What is counted is the difference to what was before."""
    name = native.info().model
    before = metrics(server)
    prompt = "so long that not all of its rows are resident " * 12
    answer = client.completions.create(
        model=name, prompt=prompt, max_tokens=8, extra_body={"ignore_eos": True}
    )
    native.generate(prompt, max_tokens=4, ignore_eos=True)
    with pytest.raises(PromptTooLong):
        native.generate(prompt, max_tokens=5000)
    stream = native.stream(prompt, max_tokens=1000, ignore_eos=True)
    pieces = iter(stream)  # a loop that is left would cancel it
    next(pieces)
    during = metrics(server)
    stream.cancel()
    wait_until_idle(native)
    after = metrics(server)

    def of(sample: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        return f"vllm:{sample}", tuple(sorted((labels | {"model_name": name}).items()))

    def grown(sample: str, **labels: str) -> float:
        return after[of(sample, **labels)] - before[of(sample, **labels)]

    assert answer.usage is not None
    assert grown("prompt_tokens_total") == 3 * answer.usage.prompt_tokens
    cancelled = grown("generation_tokens_total") - 12
    assert cancelled >= 1
    reasons = ("stop", "length", "abort", "error")
    assert [grown("request_success_total", finished_reason=reason) for reason in reasons] == [0, 2, 1, 1]
    for histogram, count in (
        ("time_to_first_token_seconds", 3),
        ("inter_token_latency_seconds", 7 + 3 + cancelled - 1),
        ("e2e_request_latency_seconds", 4),
    ):
        assert grown(f"{histogram}_count") == grown(f"{histogram}_bucket", le="+Inf") == count, histogram
        assert grown(f"{histogram}_sum") > 0
    assert grown("iteration_tokens_total_sum") >= 12 + cancelled  # more where a step was on its way
    assert grown("iteration_tokens_total_bucket", le="1.0") == grown("iteration_tokens_total_count") >= 13
    assert (during[of("num_requests_running")], after[of("num_requests_running")]) == (1, 0)
    assert during[of("kv_cache_usage_perc")] > 0 == after[of("kv_cache_usage_perc")]

    info = native.info()
    ((store,), (worker,)) = info.stores, info.workers
    assert worker.drift_check is not None and worker.drift_check.checks > 0
    assert after["clo_drift_mean_kl", (("worker", "0"),)] == worker.drift_check.mean_kl
    assert after["clo_store_arena_bytes", (("store", "numa0"),)] == store.arena_bytes
    assert after["clo_store_blocks", (("store", "numa0"),)] == store.blocks
    assert after["clo_worker_resident_bytes", (("worker", "0"),)] == worker.resident_bytes
    assert after["clo_worker_index_bytes", (("worker", "0"),)] == worker.index_bytes
    assert after["clo_capacity_tokens", (("model_name", name),)] == info.capacity_tokens
    assert after["clo_selected_rows_total", ()] >= after["clo_fetched_rows_total", ()] > 0
    late = after["clo_late_rows_total", (("worker", "0"),)]
    assert late == worker.late_rows and 0 < late <= after["clo_fetched_rows_total", ()]
    share = after["clo_fetched_rows_total", ()] / after["clo_selected_rows_total", ()]
    assert after["clo_hit_rate", ()] == pytest.approx(1 - share)
    assert 0 < after["clo_tail_share", ()] < 1 and 0 <= after["clo_dropped_share", ()] < 1
    assert after["clo_http_requests_open", (("model_name", name),)] == 0


ACCEPTS = (
    "",
    "text/plain",
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",  # Prometheus 2.42
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.1",  # Prometheus 3
)


@pytest.mark.parametrize("accept", ACCEPTS)
def test_metrics_have_their_names_in_whatever_format(server: Server, accept: str) -> None:
    answer = httpx.get(f"{server.url}/metrics", headers={"accept": accept}, timeout=WAIT_S)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) > 30
    for family in families:
        assert family.samples and family.type != "unknown", family.name
        assert all(sample.name.startswith(family.name) for sample in family.samples), family.name


def test_the_dashboard_asks_for_what_there_is(server: Server) -> None:
    """Every metric in its queries, with labels that it has."""
    answer = httpx.get(f"{server.url}/metrics", timeout=WAIT_S).text
    labels = {
        sample.name: {*sample.labels, "job", "instance"}
        for family in text_string_to_metric_families(answer)
        for sample in family.samples
    }
    dashboard = json.loads((ROOT / "examples/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 15
    for query in queries:
        asked = re.findall(r"\b((?:vllm:|clo_)\w+)(?:\{([^}]*)\})?", query)
        assert asked, query
        for name, selectors in asked:
            assert name in labels, f"{name} in {query}"
            assert set(re.findall(r"(\w+)\s*=", selectors)) <= labels[name], query
        for grouped in re.findall(r"by\s*\(([^)]*)\)", query):
            assert set(re.split(r",\s*", grouped)) <= set.union(*(labels[name] for name, _ in asked)), query
