"""Which worker uses which KV store, and on which NUMA node it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.config import ServerConfig
from runtime.errors import ConfigError

_NODES = Path("/sys/devices/system/node")
_PCI_DEVICES = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Place:
    """Of one worker: the index of its store among ``ServerConfig.stores``, and its NUMA node."""

    store: int
    node: int


def store_nodes(config: ServerConfig) -> list[int]:
    """NUMA node of each store. Raises ``ConfigError`` where the machine has no such node."""
    nodes = [int(name.removeprefix("numa")) for name in config.stores]
    for node in nodes:
        if node != 0 and not (_NODES / f"node{node}").exists():
            present = ", ".join(
                sorted(path.name.replace("node", "numa") for path in _NODES.glob("node[0-9]*"))
            )
            raise ConfigError(f"--kvstore numa{node} does not exist on this machine, which has {present}.")
    return nodes


def place_workers(config: ServerConfig) -> list[Place]:
    """The place of each worker: at the store on its GPU's node, else at the stores in turn.

    Raises:
        ConfigError: there are fewer GPUs than workers, or a store's node does not exist.
    """
    nodes = store_nodes(config)
    gpus = 0 if config.model.device == "cpu" else torch.cuda.device_count()
    if config.model.device == "cuda" and gpus == 0:
        raise ConfigError(
            "--device cuda finds no GPU; use --device cpu, or check nvidia-smi and torch's build."
        )
    if 0 < gpus < config.workers:
        raise ConfigError(f"--workers is {config.workers}, but there are {gpus} GPUs; each worker takes one.")
    places = []
    for worker in range(config.workers):
        # Asking for a GPU's node starts CUDA in this process, so only where the answer decides something.
        node = _gpu_node(worker) if gpus and len(nodes) > 1 else -1
        store = nodes.index(node) if node in nodes else worker % len(nodes)
        places.append(Place(store, node if node >= 0 else nodes[store]))
    return places


def _gpu_node(gpu: int) -> int:
    """NUMA node of a GPU, or -1 where the machine does not say."""
    device: Any = torch.cuda.get_device_properties(gpu)
    address = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    entry = _PCI_DEVICES / address / "numa_node"
    return int(entry.read_text()) if entry.exists() else -1
