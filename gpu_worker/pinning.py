"""CPU memory registered with CUDA, so that kernels read and write it in place."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from clo.kernels.limits import REGISTERED_BYTES
from clo.runtime.units import format_size
from clo.runtime.wire.errors import ConfigError

_THREADS = 8
_PORTABLE_MAPPED = 3  # flags of cudaHostRegister


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
        torch.cuda.set_device(device)  # a new thread starts on device 0 and would make a context there
        size = min(REGISTERED_BYTES, memory.nbytes - start)
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
        for size in threads.map(register, range(0, memory.nbytes, REGISTERED_BYTES)):
            bar.update(size)
    return device_view(memory)
