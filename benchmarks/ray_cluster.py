"""Several nodes of Ray on one machine, with CLO's application on them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

START_S = 300.0  # for replicas to be ready
_STORE_BYTES = 100 * 2**20  # of Ray's objects on a node: answers pass through in small pieces
_PAUSE_S = 0.2


class Nodes:
    """A cluster, and what runs on it.

    Attributes:
        url: of the application.
    """

    def __init__(self, cluster: Cluster, port: int) -> None:
        self._cluster = cluster
        self.url = f"http://127.0.0.1:{port}"

    def add(self, cpus: float) -> None:
        """Another node."""
        self._cluster.add_node(num_cpus=cpus, object_store_memory=_STORE_BYTES)

    def deploy(self, config: dict[str, Any], replicas: int) -> None:
        """Deploy an application from a configuration as ``serve deploy`` takes it, and wait for its replicas.

        Raises:
            RuntimeError: Serve says that it has failed.
        """
        schema = ServeDeploySchema.model_validate({"applications": [{"name": "clo", **config}]})
        _get_global_client().deploy_apps(schema)
        self.wait_for(replicas)

    def replicas(self) -> int:
        """How many run."""
        application = serve.status().applications["clo"]
        if application.status.value == "DEPLOY_FAILED":
            raise RuntimeError(application.message)
        deployments = application.deployments
        if not {"CLO", "OpenAI"} <= deployments.keys():  # not built yet
            return 0
        ready = [deployments[name].replica_states.get("RUNNING", 0) for name in ("CLO", "OpenAI")]
        return ready[0] if ready[1] else 0

    def wait_for(self, replicas: int) -> None:
        """Until so many run."""
        wait_until(lambda: self.replicas() == replicas, f"{replicas} replicas run")


@contextmanager
def nodes(count: int, cpus: float, port: int) -> Iterator[Nodes]:
    """So many nodes with so many CPUs each, by name; they compute on the same ones in truth.

    Args:
        port: of HTTP.
    """
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": False},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        found = Nodes(cluster, port)
        for _ in range(count - 1):
            found.add(cpus)
        serve.start("HeadOnly", {"host": "127.0.0.1", "port": port})
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Raises ``TimeoutError`` where that takes longer than replicas take to start."""
    deadline = time.monotonic() + START_S
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {START_S:g} s: {what}")
        time.sleep(_PAUSE_S)


def actors(deployment: str = "CLO") -> list[psutil.Process]:
    """The processes of Ray in which replicas are."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith(f"ray::ServeReplica:clo:{deployment}"):
            found.append(process)
    return found
