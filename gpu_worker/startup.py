"""From a ``WorkerConfig`` to an engine that can serve: device, model, arena, graphs."""

import logging
import os
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import zmq

from clo.gpu_worker.constraint import Constraints
from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.group import Group
from clo.gpu_worker.memory import MemoryPlan, plan_cpu_memory, plan_gpu_memory, rank_memory
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.pinning import pin
from clo.gpu_worker.prefill import CHUNK_TOKENS
from clo.kernels.launch import block_shared_bytes
from clo.kernels.limits import SHARED_BYTES, check_limits
from clo.kernels.sparse_prompt import DENSE_TOKENS, block_sparse_attention
from clo.kvstore.arena import Arena
from clo.kvstore.client import StoreClient
from clo.kvstore.layout import arena_parts, by_block, codes_of, rows_of
from clo.runtime.config import CacheConfig, GroupConfig, PrefillAttention, ResolvedModel, WorkerConfig
from clo.runtime.machine.host_memory import available_memory
from clo.runtime.machine.numa import bind
from clo.runtime.model.kv_shape import ITEM_BYTES, kv_shape
from clo.runtime.model.placement import store_of
from clo.runtime.model.ranks import Rank
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.messages import Attach, Attached

_NO_PLAN = MemoryPlan(2**62, 2**62)  # of a rank that does what the first one plans
_logger = logging.getLogger(__name__)


class Started(NamedTuple):
    """Everything that a worker, or a rank of one, serves with. Only the first rank has constraints."""

    engine: Engine
    drift_check: DriftCheck | None
    constraints: Constraints | None
    store: StoreClient
    store_name: str
    capacity_tokens: int  # tokens that the store holds


def start(
    config: WorkerConfig, context: zmq.Context[Any], key: str, engine_type: type[Engine] = Engine
) -> Started:
    """Bring a worker up.

    Args:
        config: the configuration that the launcher passed.
        context: ZeroMQ's context for its sockets.
        key: of the server's sockets.
        engine_type: class of the engine; benchmarks have one of their own.

    Raises:
        ConfigError: the model cannot be loaded, or the GPU has too little memory.
        WorkerDied: the store does not answer.
    """
    endpoint = _choose_store(config)
    group = None if config.group is None else _group(config.group, config.model)
    config = replace(config, cache=check_model(config.model, config.cache, config.ranks))
    decoder = load_decoder(config.model, group)
    store = StoreClient(context, endpoint, key)
    attached = store.attach(Attach(config.process, os.getpid()))
    engine, drift_check = _engine(config, decoder, attached, engine_type)
    capacity = attached.blocks * decoder.shape.block_tokens
    constraints = Constraints(config.model.folder, decoder.vocab) if config.rank == 0 else None
    return Started(engine, drift_check, constraints, store, attached.store, capacity)


def _choose_store(config: WorkerConfig) -> str:
    """Take this process's GPU, and the store on the NUMA node of the worker's first one; returns the store's
    address."""
    first = near = None  # without a GPU one store is as near as another
    if config.model.device == "cuda":
        gpus = torch.cuda.device_count()
        if config.process >= gpus:
            who, lower = f"Worker {config.worker}", "--workers"
            if config.group is not None:
                who, lower = (
                    f"Rank {config.rank} of worker {config.worker}",
                    "--workers or --tensor-parallel-size",
                )
            raise ConfigError(f"{who} has no GPU of its own, PyTorch sees {gpus}: lower {lower}.")
        torch.cuda.set_device(config.process)
        nodes = config.model.gpu_nodes
        first, near = nodes[config.process - config.rank], nodes[config.process]
        if first is not None and first not in config.stores:
            _logger.info(
                "The GPU of worker %d is on NUMA node %d, which has no KV store.", config.worker, first
            )
    store = store_of(config.worker, first, list(config.stores))
    bind(store if near is None or near == first else near)
    return config.stores[store]


def _group(config: GroupConfig, model: ResolvedModel) -> Group:
    """This process as a rank of its worker."""
    cuda = model.device == "cuda"
    own = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Group(Rank(config.rank, config.ranks), own, config.rendezvous, longest_sum(model))


def longest_sum(model: ResolvedModel) -> int:
    """Bytes of the longest sum of a group's ranks that a residual and a norm follow."""
    return CHUNK_TOKENS[model.device] * model.architecture.hidden_size * ITEM_BYTES[model.dtype]


def check_model(model: ResolvedModel, cache: CacheConfig, ranks: int = 1) -> CacheConfig:
    """Refuse what the kernels cannot do, before the weights are read.

    Args:
        ranks: among which the model is divided.

    Returns:
        The configuration with what "auto" stands for.

    Raises:
        ConfigError: says what.
    """
    shape = Rank(0, ranks).shape(kv_shape(model.architecture, model.dtype))
    cuda = model.device == "cuda"
    shared_bytes = block_shared_bytes() if cuda else max(SHARED_BYTES.values())
    for sizes in set(cache.sizes(model.max_model_len, shape.layers)):
        try:
            check_limits(
                shape.head_dim, shape.group, sizes.select_k, sizes.resident, model.max_model_len,
                shape.block_tokens, tail=cache.tail_tokens(model.max_model_len), cuda=cuda,
                shared_bytes=shared_bytes,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if cache.prefix_attention == "sparse" and not cache.tail_tokens(model.max_model_len):
        raise ConfigError(
            "--prefix-attention sparse needs a tail, and at --max-model-len "
            f"{model.max_model_len} all rows of a request are resident; use --prefix-attention exact."
        )
    return replace(cache, prefill_attention=_prefill_attention(model, cache.prefill_attention))


def _prefill_attention(model: ResolvedModel, asked: PrefillAttention) -> PrefillAttention:
    """What auto stands for: sparse where it runs and where a prompt can be long enough for it."""
    if asked == "dense" or (asked == "auto" and model.max_model_len <= DENSE_TOKENS):
        return "dense"
    if model.device != "cuda" or model.dtype == "float32" or torch.cuda.get_device_capability() < (9, 0):
        missing = "a 16-bit --dtype on a GPU from Hopper (H100) on; use --prefill-attention dense."
        level = logging.INFO
    else:
        try:
            block_sparse_attention()
            return "sparse"
        except ImportError as error:
            missing = (
                f"the packages of 'clo-llm[cuda]' ({error}): pip install them, or use "
                "--prefill-attention dense."
            )
            level = logging.WARNING
    if asked == "sparse":
        raise ConfigError(f"--prefill-attention sparse needs {missing}")
    _logger.log(
        level, "Prompts attend to all tokens. Sparse attention, much faster from 64K on, needs %s", missing
    )
    return "dense"


def _engine(
    config: WorkerConfig, decoder: Decoder, attached: Attached, engine_type: type[Engine]
) -> tuple[Engine, DriftCheck | None]:
    max_tokens, cache = config.model.max_model_len, config.cache
    whole = kv_shape(config.model.architecture, config.model.dtype, codes=cache.prefix_attention == "sparse")
    rank = Rank(config.rank, config.ranks)
    held, heads = rank.shape(whole), rank.kv_heads(whole.kv_heads)
    parts = arena_parts(Arena.open(attached.pid, attached.fd, attached.arena_bytes), whole, attached.blocks)
    plan = _plan(config, decoder, attached.blocks)
    if decoder.device.type == "cuda":
        parts = pin(parts)
    own = parts[:, heads]
    arena, codes = by_block(rows_of(own, held)), codes_of(own, held)
    if cache.profile is not None:
        cache = replace(cache, profile=cache.profile.part(heads))
    engine = engine_type(decoder, arena, cache, plan.slots, max_tokens, codes=codes, spare=plan.spare)
    engine.capture()
    engine.warm_up()
    drift_check = None
    if cache.drift_check is not None:
        drift_check = DriftCheck(engine, arena, cache.drift_check, max_tokens)
    return engine, drift_check


def _plan(config: WorkerConfig, decoder: Decoder, blocks: int) -> MemoryPlan:
    """What fits into the memory of each rank. The first one plans, with what is least free at any of them."""
    group = decoder.group
    sizes = decoder.shape, config.cache, config.engine, blocks, config.model.max_model_len, decoder.vocab
    if decoder.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        if group is None:
            return plan_gpu_memory(*sizes, (free, total))
        memory = group.least(free), group.least(total)
        plan = plan_gpu_memory(*sizes, memory) if group.leads else _NO_PLAN
    else:
        free, place = available_memory([[0]])
        if group is None:
            return plan_cpu_memory(*sizes, (free, place))
        each = rank_memory(group.least(free), place, config.ranks)
        plan = plan_cpu_memory(*sizes, each) if group.leads else _NO_PLAN
    return MemoryPlan(group.least(plan.slots), group.least(plan.spare))
