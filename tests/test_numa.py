"""Binding to a NUMA node, and the memory that is available there, in a container and on the machine."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from clo.gpu_worker import startup
from clo.runtime.config import ResolvedModel, WorkerConfig
from clo.runtime.machine import host_memory, numa
from clo.runtime.wire.errors import ConfigError
from tests.conftest import TINY
from tests.store import running_store

GIB = 2**30
NODE_0 = Path("/sys/devices/system/node/node0/cpulist")


def test_a_store_for_a_node_that_is_missing_warns_once_and_serves() -> None:
    with running_store(node=999) as store:
        store.worker(0)
        store.process.terminate()
        warnings = store.process.communicate()[1]
    assert warnings.count("\n") == 1
    assert "Not bound to NUMA node 999" in warnings


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
    monkeypatch.setattr(startup, "device_node", near.__getitem__)
    assert chosen_stores(monkeypatch, "cuda", nodes, len(near)) == chosen
    assert taken == list(near), "each worker has a GPU of its own"
    with pytest.raises(
        ConfigError, match=rf"Worker {len(near)} has no GPU .* sees {len(near)}: lower --work"
    ):
        startup._choose_store(worker_config("cuda", nodes, len(near)))


def test_workers_without_a_gpu_take_the_stores_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_stores(monkeypatch, "cpu", (1, 0), 3) == [1, 0, 1]


def chosen_stores(
    monkeypatch: pytest.MonkeyPatch, device: str, nodes: tuple[int, ...], workers: int
) -> list[int]:
    """The nodes of the stores that ``workers`` workers take."""
    bound: list[int] = []
    monkeypatch.setattr(startup, "bind", bound.append)
    addresses = [startup._choose_store(worker_config(device, nodes, number)) for number in range(workers)]
    assert addresses == [f"store of {node}" for node in bound]
    return bound


def worker_config(device: str, nodes: tuple[int, ...], number: int) -> WorkerConfig:
    model = ResolvedModel("tiny", "", TINY, 1, "float32", device, "auto", 0)
    return WorkerConfig(number, "", {node: f"store of {node}" for node in nodes}, model)
