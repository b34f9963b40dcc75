"""How much memory is really available, asked before any of it is touched."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from clo.runtime.units import format_size
from clo.runtime.wire.errors import ConfigError

_ROOT = Path("/")


def check_memory(wanted: Mapping[int, int]) -> None:
    """Check that arenas fit into the machine, the container and their NUMA nodes.

    Args:
        wanted: bytes of all arenas on each NUMA node.

    Raises:
        ConfigError: they do not fit.
    """
    total = sum(wanted.values())
    for available, place in _shared_limits():
        if total > available:
            raise _too_large(total, available, place)
    for node, size in wanted.items():
        for available, place in _node_limits(node):
            if size > available:
                raise _too_large(size, available, place)


def available_memory(arenas: Sequence[Sequence[int]]) -> tuple[int, str]:
    """Bytes that each of several arenas, all of one size, can have at most, and the place that sets this
    limit.

    Args:
        arenas: of each one the NUMA nodes of its parts, which are of one size, too: ``[[0], [1]]`` are two
            arenas, ``[[0, 1]]`` is one with a half on each node.
    """
    limits = [(available // len(arenas), place) for available, place in _shared_limits()]
    for node, share in node_shares(arenas).items():
        for available, place in _node_limits(node):
            where = place if share == 1 else f"with {share} of it {place}"
            limits.append((int(available / share), where))
    return min(*limits, (2**63, ""))


def node_shares(arenas: Sequence[Sequence[int]]) -> dict[int, Fraction]:
    """What lies on each NUMA node of arenas as in ``available_memory``, in sizes of one arena."""
    shares = dict[int, Fraction]()
    for nodes in arenas:
        for node, parts in Counter(nodes).items():
            shares[node] = shares.get(node, Fraction()) + Fraction(parts, len(nodes))
    return shares


def _too_large(wanted: int, available: int, place: str) -> ConfigError:
    return ConfigError(
        f"The KV cache wants {format_size(wanted)} of memory but only {format_size(max(0, available))} are "
        f"available {place}: lower --kv-size."
    )


def _node_limits(node: int) -> Iterator[tuple[int, str]]:
    """Bytes still available on a NUMA node, where there are several: the only one is the machine."""
    nodes = _ROOT / "sys/devices/system/node"
    meminfo = nodes / f"node{node}" / "meminfo"
    if len(list(nodes.glob("node[0-9]*"))) > 1 and meminfo.exists():
        fields = _fields(meminfo, first=2)
        free = sum(fields[key] for key in ("MemFree:", "Active(file):", "Inactive(file):"))
        yield 1024 * free, f"on NUMA node {node}"


def _shared_limits() -> Iterator[tuple[int, str]]:
    """Bytes still available to all arenas together, each with the place that sets the limit."""
    yield 1024 * _fields(_ROOT / "proc/meminfo")["MemAvailable:"], "on this machine"
    for folder in _memory_cgroups():
        for limit_name, usage_name, prefix in (
            ("memory.max", "memory.current", ""),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # version 1
        ):
            limit = folder / limit_name
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                stat = _fields(folder / "memory.stat")
                cache = stat[f"{prefix}active_file"] + stat[f"{prefix}inactive_file"]
                usage = int((folder / usage_name).read_text())
                yield int(text) - usage + cache, "in this container or control group"


def _memory_cgroups() -> Iterator[Path]:
    """Folders of this process's memory control group and of all groups around it."""
    paths = {}  # hierarchy -> path of this process in it; "" is version 2
    for line in (_ROOT / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in (_ROOT / "proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        visible_root, mount_point = mount.split(" ")[3:5]
        top = _ROOT / mount_point.lstrip("/")
        # A container may see a part of the hierarchy only: its own group is then the mount itself.
        inner = Path(paths[kind])
        inside = inner.relative_to(visible_root) if inner.is_relative_to(visible_root) else Path()
        for folder in (inside, *inside.parents):
            yield top / folder


def _fields(file: Path, first: int = 0) -> dict[str, int]:
    """Names and numbers of a /proc-like table whose names are in column ``first``."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[first]: int(words[first + 1]) for words in lines if len(words) > first + 1}
