"""``clo check``: what this machine can run, and what of a model fits into it."""

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING

from clo import launch
from clo.runtime.config import ResolvedModel, ServerConfig
from clo.runtime.machine.host_memory import available_memory
from clo.runtime.units import format_size
from clo.runtime.wire.errors import ConfigError

if TYPE_CHECKING:
    from clo.runtime.model.kv_shape import KVShape

_MOST_RANKS = 8  # that are looked at where there is no GPU

_PACKAGES = {
    "cupy": ("cupy-cuda13x", "without it CLO uses no GPU"),
    "flash_attn.cute": (
        "flash-attn-4",
        "without it prompts take about twice as long on Hopper and Blackwell",
    ),
    "cudnn": ("nvidia-cudnn-frontend", "without it long prompts attend to everything, which takes longer"),
    "numba": ("numba", "CLO needs it"),
}
"""Modules, the packages that have them, and what is missing without them."""


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 where a server with these options would start, as far as can be told."""
    config = launch.config_from(argv, "clo check")
    for line in machine(config):
        print(line, flush=True)
    try:
        with redirect_stderr(sys.stdout):  # what is chosen is said there
            for line in fitting(config):
                print(line, flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("A server with these options should start.")
    return 0


def machine(config: ServerConfig) -> Iterator[str]:
    """Lines about machine and packages."""
    import torch  # here, because it takes seconds

    cpus = len(os.sched_getaffinity(0))
    yield f"System: {platform.system()} {platform.release()}, Python {platform.python_version()}, {cpus} CPUs"
    free, place = available_memory([[int(name.removeprefix("numa"))] for name in config.kvstore])
    yield f"CPU memory for each of {', '.join(config.kvstore)}: {format_size(free)} {place}"
    yield f"PyTorch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)
    if not torch.cuda.is_available():
        yield "No CUDA GPU: CLO runs on the CPU, for tests and studies"
        return
    for module, (package, why) in _PACKAGES.items():
        yield f"{package}: {_version(module, package) or f'not installed; {why}'}"


def fitting(config: ServerConfig) -> Iterator[str]:
    """Lines about the model. Raises ``ConfigError`` where it cannot be served with these options."""
    import torch

    from clo.gpu_worker.startup import check_model
    from clo.runtime.model.files import resolve
    from clo.runtime.model.kv_shape import kv_shape
    from clo.runtime.model.kv_size import kv_size, weight_bytes
    from clo.runtime.model.placement import head_nodes
    from clo.runtime.model.ranks import check_ranks, fitting_counts

    model, ranks = resolve(config.model), config.tensor_parallel_size
    model_config = model.architecture
    check_ranks(model_config, ranks)
    gpus = torch.cuda.device_count() if model.device == "cuda" else None
    if gpus is not None and config.workers * ranks > gpus:
        raise ConfigError(
            f"--workers {config.workers} with --tensor-parallel-size {ranks} takes {config.workers * ranks} "
            f"GPUs, and PyTorch sees {gpus}: lower one of them."
        )
    shape = kv_shape(model_config, model.dtype, codes=config.cache.prefix_attention == "sparse")
    cache = check_model(model, config.cache, ranks)
    weights = weight_bytes(model_config, model.dtype)
    yield (
        f"{model.name}: {shape.layers} layers of {shape.kv_heads} KV heads, in {model.dtype}, "
        f"up to {model.max_model_len} tokens; {format_size(weights)} of weights, "
        f"{format_size(shape.token_bytes)} of KV for each token"
    )
    nodes = [int(name.removeprefix("numa")) for name in config.kvstore]
    stores = head_nodes(config, model, nodes)
    for node, heads in zip(nodes, stores, strict=True):
        if set(heads) != {node}:
            yield f"KV heads in numa{node} are on the NUMA nodes {', '.join(map(str, heads))}, as their GPUs"
    blocks = kv_size(config, model, stores) // shape.block_bytes
    longest = blocks * shape.block_tokens / model.max_model_len
    yield f"Each KV store holds {blocks * shape.block_tokens} tokens, {longest:.1f} of the longest requests"
    plan = partial(_requests, replace(config, cache=cache), model, shape, blocks, weights)
    yield f"Each worker serves {plan(ranks)} requests at a time"
    for count in fitting_counts(model_config, _MOST_RANKS if gpus is None else gpus // config.workers):
        if count != ranks:
            try:
                with redirect_stderr(StringIO()):
                    serves = f"each worker serves {plan(count)} requests at a time"
            except ConfigError as error:
                serves = str(error)
            part = format_size(weights / count)
            yield f"With --tensor-parallel-size {count}, {part} of weights on each of its devices: {serves}"


def _requests(
    config: ServerConfig, model: ResolvedModel, shape: "KVShape", blocks: int, weights: int, ranks: int
) -> int:
    """Requests that a worker of so many ranks serves at a time; ``shape`` and ``weights`` are of the whole
    model. Raises ``ConfigError`` where not even one fits."""
    import torch

    from clo.gpu_worker.group import shared_bytes
    from clo.gpu_worker.memory import plan_cpu_memory, plan_gpu_memory, rank_memory
    from clo.gpu_worker.startup import longest_sum
    from clo.runtime.model.ranks import Rank

    own = Rank(0, ranks).shape(shape)
    sizes = own, config.cache, config.engine, blocks, model.max_model_len, model.vocab_size
    if model.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        taken = weights // ranks + shared_bytes(ranks, longest_sum(model))
        return plan_gpu_memory(*sizes, (free - taken, total)).slots
    free, place = available_memory([[0]])
    left = free - weights - blocks * shape.block_bytes
    return plan_cpu_memory(*sizes, rank_memory(left, place, ranks)).slots


def _gpu(number: int) -> str:
    import torch

    from clo.runtime.machine.numa import device_node

    about = torch.cuda.get_device_properties(number)
    text = (
        f"GPU {number}: {about.name}, {format_size(about.total_memory)}, compute {about.major}.{about.minor}"
    )
    if importlib.util.find_spec("cupy") is None:
        return text
    node = device_node(number)
    return text if node is None else f"{text}, on NUMA node {node}"


def _version(module: str, package: str) -> str | None:
    try:
        importlib.import_module(module)  # a package may be there while one that it needs is not
        return importlib.metadata.version(package)
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return None
