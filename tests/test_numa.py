"""Binding to a NUMA node, and the memory that is available there, in a container and on the machine."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from clo.commands import check
from clo.gpu_worker import startup
from clo.kvstore.arena import Arena, Piece
from clo.kvstore.layout import ArenaLayout
from clo.runtime.config import GroupConfig, ModelConfig, ResolvedModel, ServerConfig, WorkerConfig
from clo.runtime.machine import host_memory, numa
from clo.runtime.machine.gpu import Found
from clo.runtime.model import files, placement
from clo.runtime.model.placement import head_nodes
from clo.runtime.model.ranks import Rank
from clo.runtime.wire.errors import ConfigError
from tests.conftest import TINY
from tests.server import READY_S, Server
from tests.store import ARENA_BYTES, MIB, running_store

GIB = 2**30
Nodes = tuple[int | None, ...]
MISSING = 998  # a node that no machine has
NODE_0 = Path("/sys/devices/system/node/node0/cpulist")


def test_a_store_for_a_node_that_is_missing_warns_once_and_serves() -> None:
    with running_store(node=MISSING) as store:
        store.worker(0)
        store.process.terminate()
        warnings = store.process.communicate()[1]
    assert warnings.count("\n") == 1
    assert "Not bound to NUMA node 998" in warnings


def test_a_node_that_the_machine_has_not_got_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the machine does not say which nodes it has."""
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    numa.check_nodes([7])
    write(tmp_path, {f"{name}/cpulist": "0\n" for name in ("node0", "node10", "node2")} | {"has_cpu": ""})
    numa.check_nodes([10, 0])
    with pytest.raises(ConfigError, match=r"numa7 is none .* nodes: numa0, numa2, numa10"):
        numa.check_nodes([0, 7])


@pytest.mark.skipif(not NODE_0.exists(), reason="this kernel has no NUMA")
def test_binding_keeps_threads_and_memory_on_the_node() -> None:
    code = """
import logging, mmap, os
from clo.runtime.machine.numa import bind
bind(0)
memory = mmap.mmap(-1, 2**24)
memory.write(b"x" * 2**24)
print(sorted(os.sched_getaffinity(0)))
print(open("/proc/self/numa_maps").read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if "set_mempolicy" in done.stderr:
        pytest.skip("this container forbids set_mempolicy")
    assert done.stderr == ""
    cpus, *maps = done.stdout.splitlines()
    assert set(map(int, re.findall(r"\d+", cpus))) <= os.sched_getaffinity(0)
    assert any(" bind:0 " in line and " N0=4096 " in line for line in maps)


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None), (None, None)])
def test_the_node_of_a_gpu_is_what_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, node: int | None
) -> None:
    """-1, or nothing at all, on machines with one node and in many virtual ones."""
    cuda: Any = ModuleType("cupy.cuda")
    cuda.runtime = SimpleNamespace(deviceGetPCIBusId=lambda device: f"0000:3{device}:00.0".upper())
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(numa, "_DEVICES", tmp_path)
    if text is not None:
        write(tmp_path, {"0000:3b:00.0/numa_node": "7\n", "0000:35:00.0/numa_node": text})
    assert numa.device_node(5) == node


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root of a made-up machine with 64 GiB available, two nodes of 40 GiB and no control groups."""
    files = {
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {64 * 2**20} kB\n",
        "proc/self/cgroup": "",
        "proc/self/mountinfo": "22 27 0:21 / /proc rw,relatime - proc proc rw\n",
    }
    for node in (0, 1):
        files[f"sys/devices/system/node/node{node}/meminfo"] = "".join(
            f"Node {node} {name}: {gib * 2**20} kB\n"
            for name, gib in (("MemFree", 30), ("Active(file)", 4), ("Inactive(file)", 6), ("Shmem", 50))
        )
    write(tmp_path, files)
    monkeypatch.setattr(host_memory, "_ROOT", tmp_path)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_arenas_have_to_fit_the_machine_together_and_each_its_node(machine: Path) -> None:
    host_memory.check_memory({0: 32 * GIB, 1: 32 * GIB})
    with pytest.raises(ConfigError, match=r"wants 66\.0 GiB .* only 64\.0 GiB .* on this machine"):
        host_memory.check_memory({0: 33 * GIB, 1: 33 * GIB})
    host_memory.check_memory({1: 40 * GIB})
    with pytest.raises(ConfigError, match=r"wants 41\.0 GiB .* only 40\.0 GiB .* on NUMA node 1: lower --kv"):
        host_memory.check_memory({1: 41 * GIB})


def test_the_only_node_is_the_machine(machine: Path) -> None:
    (machine / "sys/devices/system/node/node1").rename(machine / "gone")
    host_memory.check_memory({0: 64 * GIB})


def group(limit: str, usage: int, cache: int, version: int) -> dict[str, str]:
    """Files of one memory control group; sizes in GiB, half of the page cache active."""
    names = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    half = cache * GIB // 2
    stat = f"anon 1\n{names[2]}active_file {half}\n{names[2]}inactive_file {half}\n"
    return {names[0]: limit, names[1]: str(usage * GIB), "memory.stat": stat}


@pytest.mark.parametrize(
    ("version", "cgroup", "mount"),
    [
        (2, "0::/outer/inner", "/ /sys/fs/cgroup rw - cgroup2 cgroup rw"),
        (1, "3:cpu:/\n4:cpuacct,memory:/outer/inner", "/ /sys/fs/cgroup rw - cgroup cgroup rw,memory"),
        (1, "4:memory:/host/outer/inner", "/host /sys/fs/cgroup rw - cgroup cgroup rw,memory"),
    ],
)
def test_the_smallest_room_of_all_groups_around_the_process_counts(
    machine: Path, version: int, cgroup: str, mount: str
) -> None:
    unlimited = "max" if version == 2 else "9223372036854771712"
    files = {
        "proc/self/cgroup": cgroup + "\n",
        "proc/self/mountinfo": f"30 20 0:27 {mount}\n31 20 0:28 / /cpu rw - cgroup cgroup rw,cpu\n",
    }
    outer = group(str(20 * GIB), usage=10, cache=4, version=version)  # 14 GiB of room
    inner = group(unlimited, usage=5, cache=0, version=version)
    files |= {f"sys/fs/cgroup/outer/{name}": text for name, text in outer.items()}
    files |= {f"sys/fs/cgroup/outer/inner/{name}": text for name, text in inner.items()}
    write(machine, files)
    host_memory.check_memory({0: 14 * GIB})
    with pytest.raises(ConfigError, match=r"only 14\.0 GiB .* container"):
        host_memory.check_memory({0: 15 * GIB})


@pytest.mark.parametrize(
    ("nodes", "near", "chosen"),
    [
        ((0, 1), {0: 0, 1: 0, 2: 1, 3: 1}, [0, 0, 1, 1]),  # the nearest, also where two share it
        ((1, 0), {0: 0, 1: 1}, [0, 1]),
        ((0, 1), {0: 1, 1: 7, 2: None}, [1, 1, 0]),  # others than the nearest, in turn
        ((3,), {0: 0, 1: None}, [3, 3]),
    ],
)
def test_a_worker_on_a_gpu_takes_the_store_of_the_nearest_node(
    monkeypatch: pytest.MonkeyPatch, nodes: tuple[int, ...], near: dict[int, int | None], chosen: list[int]
) -> None:
    """And binds itself to the node of its store."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(near))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    gpus = tuple(near.values())
    assert chosen_stores(monkeypatch, "cuda", nodes, len(near), gpus) == chosen
    assert taken == list(near), "each worker has a GPU of its own"
    with pytest.raises(
        ConfigError, match=rf"Worker {len(near)} has no GPU .* sees {len(near)}: lower --work"
    ):
        startup._choose_store(worker_config("cuda", nodes, len(near), gpus))


def test_workers_without_a_gpu_take_the_stores_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_stores(monkeypatch, "cpu", (1, 0), 3) == [1, 0, 1]


def chosen_stores(
    monkeypatch: pytest.MonkeyPatch, device: str, nodes: tuple[int, ...], workers: int, gpus: Nodes = ()
) -> list[int]:
    """The nodes of the stores that ``workers`` workers take."""
    bound: list[int] = []
    monkeypatch.setattr(startup, "bind", bound.append)
    configs = [worker_config(device, nodes, number, gpus) for number in range(workers)]
    addresses = list(map(startup._choose_store, configs))
    assert addresses == [f"store of {node}" for node in bound]
    return bound


def worker_config(device: str, nodes: tuple[int, ...], number: int, gpus: Nodes) -> WorkerConfig:
    model = ResolvedModel("tiny", "", TINY, 1, "float32", device, "auto", 0, gpus)
    return WorkerConfig(number, "", {node: f"store of {node}" for node in nodes}, model)


def test_ranks_bind_themselves_to_their_own_nodes_and_share_the_store_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound: list[int] = []
    monkeypatch.setattr(startup, "bind", bound.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    config = worker_config("cuda", (0, 1), 1, (0, 0, 1, 0))
    for rank in range(2):
        ranked = replace(config, group=GroupConfig(rank, 2, -1, (), -1))
        assert startup._choose_store(ranked) == "store of 1"
    assert bound == [1, 0]
    ranked = replace(config, group=GroupConfig(2, 3, -1, (), -1))
    with pytest.raises(
        ConfigError, match=r"Rank 2 of worker 1 has no GPU of its own, .* or --tensor-parallel"
    ):
        startup._choose_store(ranked)


# ------------------------------------------------------------------------- heads on several nodes


@pytest.mark.parametrize(
    ("stores", "workers", "ranks", "heads", "gpus", "placed"),
    [
        ((0,), 1, 2, 8, (0, 1), [(0,) * 4 + (1,) * 4]),
        ((0,), 1, 4, 4, (0, 0, 1, 1), [(0, 0, 1, 1)]),
        ((0,), 1, 2, 4, (1, 0), [(1, 1, 0, 0)]),  # the first GPU is elsewhere
        ((1,), 1, 2, 2, (0, None), [(0, 1)]),  # not known: the store's
        ((0,), 2, 2, 4, (0, 1, 0, 1), [(0, 0, 1, 1)]),
        ((0, 1), 2, 2, 4, (0, 1, 1, 0), [(0, 0, 1, 1), (1, 1, 0, 0)]),  # each has its own group
        ((0, 1), 1, 2, 4, (0, 1), [(0, 0, 1, 1), (1, 1, 1, 1)]),  # nobody uses the other one
        ((0,), 1, 4, 2, (0, 1, 1, 1), [(0, 1)]),  # two ranks share a head: the first one's node
        ((0,), 1, 4, 1, (0, 0, 1, 1), [(0,)]),
        ((0,), 2, 2, 4, (0, 0, 1, 1), [(0, 0, 0, 0)]),  # a node for each worker
        ((0, 1), 2, 2, 4, (0, 0, 1, 1), [(0, 0, 0, 0), (1, 1, 1, 1)]),
        ((0,), 1, 2, 4, (1, 1), [(0, 0, 0, 0)]),
        ((0,), 2, 1, 4, (0, 1), [(0, 0, 0, 0)]),
        ((0,), 1, 2, 4, (None, None), [(0, 0, 0, 0)]),
        ((0,), 1, 2, 4, (), [(0, 0, 0, 0)]),  # no GPUs
        ((0,), 2, 2, 4, (0, 1, 1), [(0, 0, 1, 1)]),  # too few, which the worker says
    ],
)
def test_heads_lie_on_the_nodes_of_their_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stores: tuple[int, ...], workers: int,
    ranks: int, heads: int, gpus: Nodes, placed: list[tuple[int, ...]],
) -> None:  # fmt: skip
    monkeypatch.setattr(placement, "check_pages", lambda node: None)
    config, model = of_ranks(stores, workers, ranks, heads, gpus)
    assert head_nodes(config, model, stores) == placed
    assert not caplog.records


def test_workers_that_differ_leave_a_store_on_its_own_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is said once, of that store alone."""
    monkeypatch.setattr(placement, "check_pages", lambda node: None)
    config, model = of_ranks((0, 1), 4, 2, 4, (0, 1, 0, 0, 1, 0, 1, 0))
    assert head_nodes(config, model, (0, 1)) == [(0,) * 4, (1, 1, 0, 0)]
    assert [record.getMessage() for record in caplog.records] == [
        "KV store numa0 lies on one NUMA node alone, rows take longer to GPUs on others: "
        "the GPUs of its workers are not on the same nodes, rank by rank."
    ]


def test_where_memory_cannot_be_bound_a_store_stays_on_its_own_node(caplog: pytest.LogCaptureFixture) -> None:
    config, model = of_ranks((0,), 1, 2, 4, (0, MISSING))
    assert head_nodes(config, model, [0]) == [(0,) * 4]
    (record,) = caplog.records
    assert re.search(r"numa0 lies on one .* on others: \[Errno \d+\] mbind: ", record.getMessage())


def of_ranks(
    stores: tuple[int, ...], workers: int, ranks: int, heads: int, gpus: Nodes
) -> tuple[ServerConfig, ResolvedModel]:
    names = tuple(f"numa{node}" for node in stores)
    config = ServerConfig(workers=workers, tensor_parallel_size=ranks, kvstore=names)
    architecture = replace(TINY, num_key_value_heads=heads)
    return config, ResolvedModel("tiny", "", architecture, 1, "float32", "cuda", "auto", 0, gpus)


def test_every_byte_lies_on_one_node_and_whole_pages_of_a_rank_on_its_own() -> None:
    """For random shapes, with codes behind the rows or without, and with bytes behind the last block."""
    draw = random.Random()
    page = 2 * MIB
    for _ in range(200):
        ranks = draw.choice((1, 2, 4, 8))
        heads = ranks * draw.randint(1, 3)
        layers, blocks, part = draw.randint(1, 5), draw.randint(1, 60), draw.randint(1, 3000) * 128
        layout = ArenaLayout(layers, heads, blocks, part)
        used = layers * heads * blocks * part
        size = used + draw.randrange(layers * heads * part)
        near = [draw.randrange(3) for _ in range(ranks)]
        nodes = [near[rank] for rank in range(ranks) for _ in range(heads // ranks)]
        pieces = list(layout.on_nodes(nodes, size))
        case = layout, size, nodes
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])], case
        assert pieces[-1].stop == size and all(piece.start < piece.stop for piece in pieces), case
        assert all(piece.start % page == 0 for piece in pieces), case
        assert all(one.node != other.node for one, other in pairwise(pieces)), case
        for layer, rank in product(range(layers), range(ranks)):
            own = Rank(rank, ranks).kv_heads(heads)
            start, stop = (layout.offset(layer, head, 0) for head in (own.start, own.stop))
            for byte in range(-(-start // page) * page, stop, page):  # pages that begin in its heads
                (node,) = (piece.node for piece in pieces if piece.start <= byte < piece.stop)
                assert node == near[rank], (*case, layer, rank)


@pytest.mark.skipif(not NODE_0.exists(), reason="this kernel has no NUMA")
def test_pieces_of_an_arena_are_bound_before_it_is_touched() -> None:
    pages = 2 * MIB // os.sysconf("SC_PAGESIZE")
    try:
        arena = Arena.create(8 * MIB, [Piece(2 * MIB, 4 * MIB, 0), Piece(6 * MIB, 8 * MIB, 0)])
    except OSError as error:
        pytest.skip(f"this container forbids it: {error}")
    try:
        found = [line.split() for line in maps(os.getpid()) if "clo-arena" in line]
        assert [words[1] for words in found] == ["default", "bind:0", "default", "bind:0"]
        assert all(f"N0={pages}" in words for words in found[1::2])
    finally:
        arena.close()
    with pytest.raises(OSError, match="mbind: Invalid argument"):
        Arena.create(2 * MIB, [Piece(0, 2 * MIB, MISSING)])


@pytest.mark.skipif(not NODE_0.exists(), reason="this kernel has no NUMA")
def test_a_store_places_its_heads() -> None:
    """It is bound to no node itself, so that what its arena's policy says is that of the heads."""
    with running_store(node=MISSING, head_nodes=(0, 0)) as store:
        _, attached = store.worker(0)
        (line,) = (line for line in maps(attached.pid) if "clo-arena" in line)
        if line.split()[1] != "bind:0":
            pytest.skip("this container forbids mbind")
        assert attached.arena_bytes == ARENA_BYTES


def maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/numa_maps").read_text().splitlines()


PLACED = f"""
import sys
from clo import launch
from clo.runtime.machine.gpu import Found
from clo.runtime.model import files, placement
files.choose_device = lambda asked: Found("cpu", (0, {MISSING}))
placement.check_pages = lambda node: None
sys.exit(launch.main(sys.argv[1:]))
"""
"""A launcher that takes the ranks of a CPU worker to be on GPUs of two nodes, and finds nothing wrong with
the one that is not there."""


def test_the_launcher_tells_the_store_where_heads_lie(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path
) -> None:
    arguments = "--model", str(tiny_model), "--kv-size", "64MiB", "--tensor-parallel-size", "2"
    with launch(*arguments, program=("-c", PLACED), ready=False) as server:
        server.process.wait(READY_S)
        assert server.wait() == 1
        assert server.stderr.read_text().startswith(
            "error: The memory of numa0 cannot be bound to NUMA nodes: [Errno "
        )


def test_check_says_where_heads_lie(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(files, "choose_device", lambda asked: Found("cpu", (0, MISSING)))
    config = ServerConfig(ModelConfig(str(tiny_model)), tensor_parallel_size=2, kv_size=64 * MIB)
    line = f"KV heads in numa0 are on the NUMA nodes 0, {MISSING}, as their GPUs"
    assert line not in list(check.fitting(config))
    monkeypatch.setattr(placement, "check_pages", lambda node: None)
    assert line in list(check.fitting(config))
