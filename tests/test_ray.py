"""Replicas on Ray: two nodes on one machine, real servers, the openai client."""

import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from openai import OpenAI

pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")

from ray.serve.schema import ServeDeploySchema

from benchmarks.ray_cluster import Nodes, actors, nodes, wait_until
from clo import ray as clo_ray
from clo.runtime.wire.errors import ConfigError
from tests.server import ROOT

WAIT_S = 300.0  # only a failure takes as long
CLIENTS = 8
REPLICA = {"num_cpus": 0.6}  # of the one that a node has, so each has one
PROMPT = "and then she said that "


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def left_of(model: Path) -> list[psutil.Process]:
    """Processes that name the model on their command lines: launchers, gateways, workers."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if any(str(model) in word for word in process.cmdline()) else []
    return found


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes with a replica each; a third one starts when requests are many and there is a node for it.
    At the end nothing is left."""
    runtime = tmp_path_factory.mktemp("runtime")
    runtime.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        with nodes(2, 1.0, free_port()) as found:
            found.deploy(
                {
                    "route_prefix": "/",
                    "import_path": "clo.ray:app",
                    "args": {
                        "model": str(tiny_model),
                        "served-model-name": "tiny",
                        "device": "cpu",
                        "kv-size": "16MiB",
                        "max-num-seqs": 8,
                        "select_k": 32,
                        "resident": 128,
                        "prefix-caching": True,
                    },
                    "deployments": [
                        {
                            "name": "CLO",
                            "ray_actor_options": REPLICA,
                            "autoscaling_config": {
                                "min_replicas": 2,
                                "max_replicas": 3,
                                "target_ongoing_requests": 2,
                                "upscale_delay_s": 1,
                                "look_back_period_s": 2,
                            },
                        },
                        {"name": "OpenAI", "ray_actor_options": {"num_cpus": 0.1}},
                    ],
                },
                replicas=2,
            )
            yield found
    wait_until(lambda: not left_of(tiny_model), "all processes have ended")
    assert not list(runtime.glob("clo-*"))


@pytest.fixture
def client(cluster: Nodes) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


def server_url(actor: psutil.Process) -> str:
    """Where the server of a replica listens for HTTP."""
    (gateway,) = (child for child in actor.children(recursive=True) if "clo.runtime.http" in child.cmdline())
    (port,) = (at.laddr.port for at in gateway.net_connections("tcp") if at.status == psutil.CONN_LISTEN)
    return f"http://127.0.0.1:{port}"


@pytest.mark.slow
def test_answers_are_those_of_a_replica_byte_by_byte(cluster: Nodes) -> None:
    direct = server_url(actors()[0])
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "seed": 1}
    for path, body, status in (
        ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}, 200),
        ("/v1/chat/completions", chat, 200),
        ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}, 200),
        ("/v1/completions", {"prompt": "", "temperature": -1}, 400),
        ("/v1/completions", {"prompt": PROMPT, "model": "another"}, 404),
        ("/v1/nothing?at=all", {}, 404),
        ("/tokenize", {"prompt": PROMPT}, 200),
    ):
        answers = []
        for url in (cluster.url, direct):
            answer = httpx.post(url + path, json=body, headers={"X-Request-Id": "same"}, timeout=WAIT_S)
            assert answer.status_code == status
            kinds = [answer.headers.get_list(name) for name in ("content-type", "x-request-id", "date")]
            assert [len(kind) for kind in kinds] == [1, 1, 1]
            answers.append((kinds[:2], re.sub(rb'"created":\d+', b"", answer.content)))
        assert answers[0] == answers[1]
    broken = httpx.post(
        f"{cluster.url}/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_json"


@pytest.mark.slow
def test_the_openai_client(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, stream=True,
                                            extra_body={"ignore_eos": True}))  # fmt: skip
    assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) > 3
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="x" * 20_000, max_tokens=1)


@pytest.mark.slow
def test_a_client_that_goes_away_ends_its_request(cluster: Nodes, client: OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3000, stream=True,
                                       extra_body={"ignore_eos": True})  # fmt: skip
    next(iter(stream))
    urls = [server_url(actor) for actor in actors()]

    def load() -> int:
        return sum(httpx.get(f"{url}/load", timeout=WAIT_S).json()["server_load"] for url in urls)

    assert load() == 1
    stream.close()
    wait_until(lambda: load() == 0, "no request is open")


@pytest.mark.slow
def test_prompts_that_begin_alike_go_to_one_replica(cluster: Nodes, client: OpenAI) -> None:
    """So all but the first of a conversation find its beginning in the cache."""
    for document in ("first", "second", "third"):
        text = f"{document} document " * 60
        cached = []
        for turn in range(4):
            text += f" and question {turn}"
            usage = client.completions.create(model="tiny", prompt=text, max_tokens=1).usage
            assert usage is not None
            details = usage.prompt_tokens_details
            cached.append(details.cached_tokens if details is not None else 0)
        assert not cached[0] and all(cached[1:]), cached


class Clients:
    """Streams, one after another in each of several threads.

    Attributes:
        whole: how many have come to their end.
        errors: with which the others ended.
    """

    def __init__(self, client: OpenAI) -> None:
        self._client, self._stop = client, threading.Event()
        self.whole, self.errors = 0, list[Exception]()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                chunks = self._client.completions.create(
                    model="tiny", prompt=secrets.token_hex(16), max_tokens=60, stream=True,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )  # fmt: skip
                tokens = sum(len(self._ids(chunk)) for chunk in chunks)
            except Exception as error:
                self.errors.append(error)
            else:
                assert tokens == 60
                self.whole += 1

    @staticmethod
    def _ids(chunk: Any) -> list[int]:
        return getattr(chunk.choices[0], "token_ids", None) or [] if chunk.choices else []

    def go_on(self) -> None:
        """Until more of them have come to their end."""
        enough = self.whole + 2 * CLIENTS
        wait_until(lambda: self.whole >= enough, "streams go on")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.slow
def test_a_replica_dies_and_a_node_comes_while_clients_stream(cluster: Nodes, client: OpenAI) -> None:
    clients = Clients(client)
    try:
        clients.go_on()
        assert not clients.errors
        victim, other = actors()
        server = victim.children(recursive=True)
        assert len(server) >= 4  # launcher, gateway, store, worker
        victim.kill()
        wait_until(lambda: not any(process.is_running() for process in server), "its server dies with it")
        clients.go_on()
        # What had begun to be answered ends with an error in its stream; everything else is answered.
        assert len(clients.errors) <= CLIENTS
        for error in clients.errors:
            assert isinstance(error, openai.APIError) and error.code == "worker_died", error
        cluster.wait_for(2)
        assert other.is_running() and victim.pid not in {actor.pid for actor in actors()}
        clients.errors.clear()
        cluster.add(1.0)  # the autoscaler wants a third replica, and had no place for it
        cluster.wait_for(3)
        clients.go_on()
        assert not clients.errors
        urls = [server_url(actor) for actor in actors()]
        served = [httpx.get(f"{url}/metrics", timeout=WAIT_S).text for url in urls]
        assert all(re.search(r'finished_reason="length".*} [1-9]', text) for text in served)
    finally:
        clients.stop()


@pytest.mark.slow
def test_a_server_that_ends_takes_its_replica_along(cluster: Nodes, client: OpenAI) -> None:
    victim = actors()[0]
    launcher = next(child for child in victim.children() if "clo.replica" in child.cmdline())
    before = time.monotonic()
    launcher.kill()
    wait_until(lambda: not victim.is_running(), "the replica ends")
    assert time.monotonic() - before < 20  # rather than after three failed health checks
    for _ in range(6):  # a replica that is not known to be dead yet costs a pause and no error
        assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices


@pytest.mark.slow
def test_a_replica_dies_together_with_the_entrance(cluster: Nodes, client: OpenAI) -> None:
    """As on a machine that is lost: nobody takes the replica out of the tree by which requests are routed."""
    for process in (*actors("OpenAI"), actors()[0]):
        process.kill()
    wait_until(lambda: len(actors("OpenAI")) == 1, "there is an entrance again")
    for _ in range(6):
        asked = client.with_options(timeout=60, max_retries=2)
        assert asked.completions.create(model="tiny", prompt=secrets.token_hex(16), max_tokens=1).choices


@pytest.mark.parametrize(
    "args",
    [
        *({"nonsense": 1}, {"workers": 0}, {"http": 8000}, {"host": "0.0.0.0"}),
        *({"ssl-certfile": "cert.pem"}, {"ssl_keyfile": "key.pem"}, {"model": None}),
        *({"kvstore": ["numa0", "numa1"]}, {"allowed-origins": ["http://one", "http://two"]}),
    ],
    ids=lambda args: next(iter(args)),
)
def test_wrong_options_are_refused_before_anything_starts(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(args)).replace("_", "-")) as caught:
        clo_ray.app(args)
    assert "clo.ray --help" not in str(caught.value), "there is no such command"


def test_an_option_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        clo_ray.app({"kv-size": "1GiB", "kv_size": "2GiB"})


def serve_configurations() -> dict[str, Any]:
    """Those that the examples show."""
    kuberay = yaml.safe_load((ROOT / "examples/kuberay.yaml").read_text())
    return {
        "ray.yaml": yaml.safe_load((ROOT / "examples/ray.yaml").read_text()),
        "kuberay.yaml": yaml.safe_load(kuberay["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", serve_configurations())
def test_the_configurations_of_the_examples_are_valid(name: str) -> None:
    (application,) = ServeDeploySchema.model_validate(serve_configurations()[name]).applications
    assert application.import_path == "clo.ray:app"
    entrance = clo_ray.app(application.args)._bound_deployment
    named = {entrance.name, entrance.init_args[0]._bound_deployment.name}
    assert {deployment.name for deployment in application.deployments} <= named


@pytest.mark.parametrize(
    ("args", "gpus"),
    [
        ({}, 1),
        ({"workers": "2"}, 2),
        ({"workers": 3, "device": "cuda"}, 3),
        ({"workers": 3, "device": "cpu"}, 0),
    ],
)
def test_a_replica_takes_the_gpus_that_its_workers_need(args: dict[str, Any], gpus: int) -> None:
    (replicas,) = clo_ray.app(args)._bound_deployment.init_args
    assert replicas._bound_deployment.ray_actor_options["num_gpus"] == gpus
