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
from clo.gpu_worker.memory import plan_cpu_memory, plan_gpu_memory
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.pinning import pin
from clo.kernels.launch import block_shared_bytes
from clo.kernels.limits import SHARED_BYTES, check_limits
from clo.kernels.sparse_prompt import DENSE_TOKENS, block_sparse_attention
from clo.kvstore.arena import Arena
from clo.kvstore.client import StoreClient
from clo.kvstore.layout import arena_parts, by_block, codes_of, rows_of
from clo.runtime.config import CacheConfig, PrefillAttention, ResolvedModel, WorkerConfig
from clo.runtime.machine.host_memory import available_memory
from clo.runtime.machine.numa import bind, device_node
from clo.runtime.model.model_config import kv_shape, read_config
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.messages import Attach, Attached

_logger = logging.getLogger(__name__)


class Started(NamedTuple):
    """Everything that a worker serves with."""

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
    config = replace(config, cache=check_model(config.model, config.cache))
    decoder = load_decoder(config.model)
    store = StoreClient(context, endpoint, key)
    attached = store.attach(Attach(config.worker, os.getpid()))
    engine, drift_check = _engine(config, decoder, attached, engine_type)
    capacity = attached.blocks * decoder.shape.block_tokens
    constraints = Constraints(config.model.folder, decoder.vocab)
    return Started(engine, drift_check, constraints, store, attached.store, capacity)


def _choose_store(config: WorkerConfig) -> str:
    """Take the worker's GPU, and the store on its NUMA node; returns the store's address."""
    nodes = list(config.stores)
    node = nodes[config.worker % len(nodes)]  # without a GPU one is as near as another
    if config.model.device == "cuda":
        gpus = torch.cuda.device_count()
        if config.worker >= gpus:
            raise ConfigError(
                f"Worker {config.worker} has no GPU of its own, PyTorch sees {gpus}: lower --workers."
            )
        torch.cuda.set_device(config.worker)
        near = device_node(config.worker)
        if near in config.stores:
            node = near
        elif near is not None:
            _logger.info("GPU %d is on NUMA node %d, which has no KV store.", config.worker, near)
    bind(node)
    return config.stores[node]


def check_model(model: ResolvedModel, cache: CacheConfig) -> CacheConfig:
    """Refuse what the kernels cannot do, before the weights are read.

    Returns:
        The configuration with what "auto" stands for.

    Raises:
        ConfigError: says what.
    """
    shape = kv_shape(read_config(model.folder), model.dtype)
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
                f"the packages of 'clo[cuda]' ({error}): pip install them, or use --prefill-attention dense."
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
    shape, max_tokens = decoder.shape, config.model.max_model_len
    shared = Arena.open(attached.pid, attached.fd, attached.arena_bytes)
    held = replace(shape, codes=config.cache.prefix_attention == "sparse")
    parts = arena_parts(shared, held, attached.blocks)
    sizes = shape, config.cache, config.engine, attached.blocks, max_tokens, decoder.vocab
    if decoder.device.type == "cuda":
        plan = plan_gpu_memory(*sizes, torch.cuda.mem_get_info())
    else:
        plan = plan_cpu_memory(*sizes, available_memory([0]))
    if decoder.device.type == "cuda":
        parts = pin(parts)
    arena, codes = by_block(rows_of(parts, held)), codes_of(parts, held)
    engine = engine_type(decoder, arena, config.cache, plan.slots, max_tokens, codes=codes, spare=plan.spare)
    engine.capture()
    engine.warm_up()
    drift_check = None
    if config.cache.drift_check is not None:
        drift_check = DriftCheck(engine, arena, config.cache.drift_check, max_tokens)
    return engine, drift_check
