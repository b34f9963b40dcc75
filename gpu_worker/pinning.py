"""GPU memory planned, CPU memory pinned: what a worker on a GPU needs before it can begin."""

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.drift_check import drift_check_bytes
from clo.gpu_worker.prefill import prefill_bytes
from clo.runtime.config import CacheConfig, format_size
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.wire.errors import ConfigError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**30  # registered by one thread at a time
_THREADS = 8
_GRAPH_BYTES = 2**30
_PORTABLE_MAPPED = 3  # flags of cudaHostRegister


def check_gpu_memory(
    shape: KVShape, config: CacheConfig, slots: int, blocks: int, max_tokens: int, utilization: float
) -> None:
    """Check, with the weights loaded, that all else fits into the GPU memory that may be used, and log it.

    Args:
        slots: sequences at a time; blocks: of the arena; max_tokens: longest sequence.
        utilization: share of the GPU's memory.

    Raises:
        ConfigError: it does not fit.
    """
    free, total = torch.cuda.mem_get_info()
    tokens = blocks * shape.block_tokens
    index = TwoBitIndex.bytes_per_token(shape) * tokens if config.attention == "clo" else 0
    kept = sum(sizes.resident for sizes in config.sizes(max_tokens, shape.layers))
    rows = 0 if config.attention == "full" else shape.layers * (config.sinks + config.recent) + kept
    resident = shape.kv_heads * rows * shape.row_bytes
    prefill = prefill_bytes(shape, max_tokens)
    drift_check = drift_check_bytes(shape, max_tokens) if config.drift_check is not None else 0
    wanted = index + slots * resident + prefill + drift_check + _GRAPH_BYTES
    spare = int(utilization * total) - (total - free)
    parts = (
        f"{format_size(total - free)} in use with the weights, {format_size(index)} index of {tokens} "
        f"tokens, {slots} x {format_size(resident)} resident rows, {format_size(prefill)} prefill of "
        f"{max_tokens} tokens, {format_size(drift_check)} drift_check, {format_size(_GRAPH_BYTES)} graphs"
    )
    if wanted > spare:
        raise ConfigError(
            f"The GPU has {format_size(utilization * total)} for CLO and that is too little ({parts}): lower "
            "--max-num-seqs, --resident, --kv-size or --max-model-len, or raise --gpu-memory-utilization."
        )
    fitting = slots + (spare - wanted) // max(1, resident)
    logger.info(
        "GPU memory: %s; %s stay free. %d sequences at a time would fit; the store holds %d of %d tokens.",
        parts, format_size(spare - wanted), fitting, tokens // max_tokens, max_tokens,
    )  # fmt: skip


class _Pointer:
    """CPU memory as ``__cuda_array_interface__``, which torch takes without a copy."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory  # lives as long as the view
        self.__cuda_array_interface__ = {
            "shape": (memory.nbytes,),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


def device_view(memory: Tensor) -> Tensor:
    """Pinned CPU memory (contiguous) as a tensor on the current CUDA device."""
    view = torch.as_tensor(_Pointer(memory), device=torch.device("cuda"))
    return view.view(memory.dtype).view(memory.shape)


def pin(memory: Tensor) -> Tensor:
    """Register CPU memory with CUDA, in parallel and with a progress bar.

    Args:
        memory: contiguous and page-aligned. It must outlive the view, and stays registered as long as the
            process runs.

    Returns:
        The same memory as a tensor on the current CUDA device.

    Raises:
        ConfigError: CUDA refuses.
    """
    base = memory.data_ptr()
    runtime, device = torch.cuda.cudart(), torch.cuda.current_device()

    def register(start: int) -> int:
        torch.cuda.set_device(device)  # a new thread stands on device 0, and would make a context there
        size = min(_CHUNK_BYTES, memory.nbytes - start)
        status = int(runtime.cudaHostRegister(base + start, size, _PORTABLE_MAPPED))
        if status:
            raise ConfigError(
                f"CUDA could not pin {format_size(memory.nbytes)} of CPU memory (error {status} at "
                f"{format_size(start)}): lower --kv-size, or raise the limit of locked memory "
                "(ulimit -l unlimited; docker run --ulimit memlock=-1)."
            )
        return size

    with (
        ThreadPoolExecutor(_THREADS) as threads,
        tqdm(  # disable=None: shown only where stderr is a terminal
            total=memory.nbytes, desc="Pinning", unit="B", unit_scale=True, unit_divisor=1024, disable=None
        ) as bar,
    ):
        for size in threads.map(register, range(0, memory.nbytes, _CHUNK_BYTES)):
            bar.update(size)
    return device_view(memory)
