"""The size of a KV store that nobody has chosen, on made-up machines, and what a server then says."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from transformers import LlamaConfig

from clo.runtime.config import EngineConfig, ResolvedModel, ServerConfig
from clo.runtime.machine import host_memory
from clo.runtime.model.kv_size import kv_size
from clo.runtime.model.model_config import architecture
from clo.runtime.wire.errors import ConfigError
from tests.server import Server

GIB = 2**30


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., ResolvedModel]:
    """Llama-3.1-8B, held in some way; only its configuration is there."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))

    def held(device: str, dtype: str, length: int) -> ResolvedModel:
        return ResolvedModel("8B", str(tmp_path), architecture(config), length, dtype, device, "dummy", 0)

    return held


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the machine one with so many GiB free, in all and on each of its nodes, and in its container."""

    def make(free: float, nodes: tuple[float, ...] = (1000.0,), container: float | None = None) -> None:
        root = tmp_path_factory.mktemp("machine")
        files = {
            "proc/meminfo": f"MemAvailable: {int(free * 2**20)} kB\n",
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": "30 20 0:27 / /group rw - cgroup2 cgroup rw\n",
        }
        if container is not None:
            files |= {
                "group/memory.max": str(int(container * GIB)),
                "group/memory.current": "0",
                "group/memory.stat": "active_file 0\ninactive_file 0\n",
            }
        for number, gib in enumerate(nodes):
            kib = int(gib * 2**20)
            files[f"sys/devices/system/node/node{number}/meminfo"] = (
                f"Node {number} MemFree: {kib} kB\nNode {number} Active(file): 0 kB\n"
                f"Node {number} Inactive(file): 0 kB\n"
            )
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        monkeypatch.setattr(host_memory, "_ROOT", root)

    return make


Llama = Callable[..., ResolvedModel]
Machine = Callable[..., None]


def test_an_8b_model_gets_24_requests_of_32k_on_a_machine_of_128_gib(
    llama: Llama, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(free=120.5)
    size = kv_size(ServerConfig(), llama("cuda", "bfloat16", 131_072), [[0]])
    assert size == int(0.8 * int(120.5 * 2**20) * 1024)
    assert size // (128 * 1024) >= 24 * 32_768
    assert capsys.readouterr().err == (
        "--kv-size auto: 96.4 GiB for each KV store (80% of 120.5 GiB free on this machine) hold 789504 "
        "tokens.\n"
    )


@pytest.mark.parametrize(
    ("free", "nodes", "container", "stores", "expected", "place"),
    [
        (100, (1000,), None, [[0]], 80, "on this machine"),
        (100, (60, 50), None, [[1]], 40, "on NUMA node 1"),
        (100, (60, 50), None, [[0], [1]], 40, "on"),  # 50 on each, of the machine and of the smaller node
        (100, (60, 60), 70, [[0], [1]], 28, "in this container or control group"),
        (100, (1000,), 10, [[0]], 8, "in this container or control group"),
        (100, (60, 40), None, [[0, 0, 1, 1]], 64, "with 1/2 of it on NUMA node 1"),
        (100, (60, 60), None, [[0, 0, 1, 1]], 80, "on this machine"),
        (200, (60, 90), None, [[0, 0, 0, 1], [1] * 4], 57.6, "with 5/4 of it on NUMA node 1"),
    ],
)
def test_the_smallest_limit_counts_and_stores_share_what_is_shared(
    llama: Llama,
    machine: Machine,
    capsys: pytest.CaptureFixture[str],
    free: float,
    nodes: tuple[float, ...],
    container: float | None,
    stores: list[list[int]],
    expected: float,
    place: str,
) -> None:
    machine(free, nodes, container)
    size = kv_size(ServerConfig(), llama("cuda", "bfloat16", 131_072), stores)
    assert abs(size - expected * GIB) < 2**20
    assert f"free {place}" in capsys.readouterr().err


def test_no_more_is_taken_than_all_requests_can_use(
    llama: Llama, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(free=2000)
    config = ServerConfig(engine=EngineConfig(max_num_seqs=24), workers=3)
    assert kv_size(config, llama("cuda", "bfloat16", 32_700), [[0]]) == 3 * 24 * 32_768 * 128 * 1024
    assert "(72 requests of 32700 tokens, the most at a time)" in capsys.readouterr().err
    assert kv_size(ServerConfig(), llama("cuda", "bfloat16", 1024), [[0]]) == 64 * 1024 * 128 * 1024
    assert kv_size(ServerConfig(), llama("cpu", "bfloat16", 1024), [[0]]) == 8 * 1024 * 128 * 1024


def test_on_the_cpu_the_weights_have_their_place_first(
    llama: Llama, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """8.03e9 parameters of Llama-3.1-8B, in 4 bytes each."""
    machine(free=50)
    size = kv_size(ServerConfig(), llama("cpu", "float32", 131_072), [[0]])
    assert abs(size - 0.8 * (50 * GIB - 4 * 8.03e9)) < 0.05 * GIB
    assert "beside 29.9 GiB of weights" in capsys.readouterr().err
    machine(free=20)
    assert kv_size(ServerConfig(), llama("cpu", "float32", 131_072), [[0]]) > 0, (
        "one block, which may not fit"
    )


def test_what_was_asked_for_is_checked_and_said_nothing_about(
    llama: Llama, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(free=10)
    model = llama("cuda", "bfloat16", 131_072)
    assert kv_size(ServerConfig(kv_size=10 * GIB), model, [[0]]) == 10 * GIB
    with pytest.raises(ConfigError, match=r"only 10\.0 GiB are available on this machine: lower --kv-size"):
        kv_size(ServerConfig(kv_size=11 * GIB), model, [[0]])
    assert capsys.readouterr().err == ""


def test_what_was_asked_for_has_to_fit_the_nodes_of_its_heads(llama: Llama, machine: Machine) -> None:
    machine(free=100, nodes=(63, 20))
    model = llama("cuda", "bfloat16", 131_072)
    heads = [[0] * 6 + [1] * 2]
    assert kv_size(ServerConfig(kv_size=80 * GIB), model, heads) == 80 * GIB
    with pytest.raises(ConfigError, match=r"wants 21\.0 GiB .* only 20\.0 GiB are available on NUMA node 1"):
        kv_size(ServerConfig(kv_size=84 * GIB), model, heads)
    with pytest.raises(ConfigError, match=r"wants 64\.0 GiB .* only 63\.0 GiB are available on NUMA node 0"):
        kv_size(ServerConfig(kv_size=64 * GIB), model, [[0] * 8])


def test_a_server_says_what_it_takes_by_itself(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path
) -> None:
    """Room for 8 requests of all 4,096 tokens, in one line for each choice, on stderr."""
    with launch("--model", str(tiny_model)) as server:
        assert server.stdout.read_text().endswith("capacity=32768 tokens\n")
        lines = server.stderr.read_text().splitlines()
    assert lines[0].startswith("--kv-size auto: 32.0 MiB for each KV store (8 requests of 4096 tokens, ")
    assert lines[1].startswith("--max-num-seqs auto: 8 (with ")
    assert len(lines) == 2
