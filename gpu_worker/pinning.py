"""Pinning: CPU memory that kernels read and write in place, over PCIe."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.config import format_size
from runtime.errors import ConfigError

_CHUNK_BYTES = 2**30  # registered by one thread at a time
_THREADS = 8
_PORTABLE_MAPPED = 3  # flags of cudaHostRegister


class _Pointer:
    """A device pointer as ``__cuda_array_interface__``, which torch takes without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


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
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.init()  # type: ignore[no-untyped-call]

    def register(start: int) -> int:
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
    view = torch.as_tensor(_Pointer(base, memory.nbytes), device=torch.device("cuda"))
    return view.view(memory.dtype).view(memory.shape)
