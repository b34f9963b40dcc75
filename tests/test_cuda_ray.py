"""Replicas on Ray take the GPUs that Ray chose for them: one each, or two for one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")

from benchmarks.ray_cluster import Nodes, actors, nodes, wait_until
from tests.replicas import free_port, left_of, server_url

pytestmark = pytest.mark.gpu
MIB = 2**20
WAIT_S = 300.0  # only a failure takes as long
GPUS = min(2, torch.cuda.device_count())


@contextmanager
def replicas(model: Path, count: int, **options: Any) -> Iterator[Nodes]:
    """So many, on one node. At the end nothing is left on the GPUs, and no process."""
    before = free()
    with nodes(1, 4.0, free_port(), gpus=GPUS) as found:
        found.deploy(
            {
                "route_prefix": "/",
                "import_path": "clo.ray:app",
                "args": {
                    "model": str(model), "dtype": "float32", "kv-size": "16MiB", "max-num-seqs": 2,
                    **options,
                },
                "deployments": [
                    {"name": "CLO", "autoscaling_config": {"min_replicas": count, "max_replicas": count}},
                    {"name": "OpenAI"},
                ],
            },
            replicas=count,
        )  # fmt: skip
        yield found
    wait_until(lambda: not left_of(model), "all processes have ended")
    wait_until(
        lambda: all(then - now < 16 * MIB for then, now in zip(before, free(), strict=True)), "memory is free"
    )


def free() -> list[int]:
    """Bytes of each GPU, asked so that this process takes none."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(line) * MIB for line in told.split()[:GPUS]]


def workers(actor: psutil.Process) -> list[psutil.Process]:
    """The processes that compute for a replica, the ranks of one worker or several workers."""
    return [child for child in actor.children(recursive=True) if "clo.gpu_worker" in child.cmdline()]


def gpus_of(actor: psutil.Process) -> str:
    """Those that a replica's workers see."""
    seen: set[str] = {worker.environ()["CUDA_VISIBLE_DEVICES"] for worker in workers(actor)}
    return seen.pop() if len(seen) == 1 else f"several: {seen}"


def answer(url: str) -> list[int]:
    """The tokens of a greedy answer."""
    body = {
        "prompt": list(range(5, 105)), "max_tokens": 20, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    tokens: list[int] = httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S).json()["choices"][0][
        "token_ids"
    ]
    return tokens


def test_each_replica_has_a_gpu_of_its_own(tiny_model: Path) -> None:
    """Also the one that comes for one that was killed: it gets the GPU that has become free."""
    before = free()
    with replicas(tiny_model, GPUS) as cluster:
        assert all(then - now > 100 * MIB for then, now in zip(before, free(), strict=True))
        found = actors()
        assert sorted(map(gpus_of, found)) == [str(gpu) for gpu in range(GPUS)]
        expected, *others = [answer(server_url(actor)) for actor in found]
        assert len(expected) == 20 and all(other == expected for other in others)
        freed, known = gpus_of(found[0]), {actor.pid for actor in found}
        found[0].kill()
        wait_until(lambda: any(actor.pid not in known for actor in actors()), "another one starts")
        cluster.wait_for(GPUS)
        (new,) = (actor for actor in actors() if actor.pid not in known)
        assert gpus_of(new) == freed
        assert answer(server_url(new)) == expected == answer(cluster.url)


@pytest.mark.gpu2
def test_a_replica_takes_two_gpus_for_a_model(tiny_model: Path) -> None:
    with replicas(tiny_model, 1) as cluster:
        expected = answer(cluster.url)
    with replicas(tiny_model, 1, **{"tensor-parallel-size": 2}) as cluster:
        (actor,) = actors()
        assert len(workers(actor)) == 2 and gpus_of(actor) == "0,1"
        assert answer(cluster.url) == expected
