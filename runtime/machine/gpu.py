"""Whether this machine has a GPU that CLO can use, asked before anything is loaded.

``python -m clo.runtime.machine.gpu ASKED PARENT`` answers on stdout, for ``choose_device``.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from typing import NamedTuple

import msgspec

from clo.runtime.machine.numa import device_node
from clo.runtime.machine.process import EXIT_EXPLAINED, die_with_parent
from clo.runtime.wire.errors import ConfigError

_OLDEST = 8, 0  # compute capability: asynchronous copies and bfloat16


class Found(NamedTuple):
    """What a model runs on.

    Attributes:
        device: "cuda" or "cpu".
        nodes: NUMA node of each GPU, in the order in which PyTorch numbers them; None where the machine does
            not say.
    """

    device: str
    nodes: tuple[int | None, ...] = ()


def choose_device(asked: str) -> Found:
    """The GPUs, or the CPU.

    PyTorch and CuPy are asked in a process of their own, so that the launcher's, which computes nothing,
    stays without them and without a context on a GPU.

    Args:
        asked: "cuda", "cpu", or "auto", which takes the GPUs if PyTorch sees any.

    Raises:
        ConfigError: a GPU is wanted, and something that it needs is missing.
    """
    if asked == "cpu":
        return Found("cpu")
    command = [sys.executable, "-m", "clo.runtime.machine.gpu", asked, str(os.getpid())]
    asking = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    answer = asking.stdout.rstrip().rpartition("\n")[2]  # behind whatever a library has printed
    if asking.returncode == EXIT_EXPLAINED:
        raise ConfigError(answer)
    if asking.returncode != 0:  # such as a crash in a driver
        raise ConfigError(
            f"PyTorch could not say which GPUs are here (exit code {asking.returncode}); start with "
            "--device cpu, or see what it says: python -c 'import torch; torch.cuda.init()'."
        )
    return msgspec.json.decode(answer, type=Found)


def find_device(asked: str) -> Found:
    """The same in this process, where "cpu" is not asked for. Raises what ``choose_device`` does."""
    import torch  # here, because it takes seconds

    if not torch.cuda.is_available():
        if asked == "auto":
            return Found("cpu")
        if torch.version.cuda is None:
            raise ConfigError(
                "This PyTorch was built without CUDA; install a CUDA build (pip install torch on Linux), or "
                "start with --device cpu."
            )
        raise ConfigError(
            "PyTorch sees no CUDA GPU here: run nvidia-smi to see what is wrong, or start with --device cpu."
        )
    _check_capability(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    _check_cupy((torch.version.cuda or "").partition(".")[0])
    return Found("cuda", tuple(map(device_node, range(torch.cuda.device_count()))))


def _check_capability(name: str, capability: tuple[int, int]) -> None:
    if capability < _OLDEST:
        raise ConfigError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, and CLO's kernels need "
            f"{_OLDEST[0]}.{_OLDEST[1]} (Ampere) or newer; start with --device cpu."
        )


def _check_cupy(cuda: str) -> None:
    """CuPy compiles and launches the kernels; its major version of CUDA has to be PyTorch's."""
    install = f"pip install 'cupy-cuda{cuda}x[ctk]>=14.2'"
    if importlib.util.find_spec("cupy") is None:
        raise ConfigError(
            f"A GPU is here but CuPy, which launches CLO's kernels, is not installed: {install} (the extra "
            "'cuda' of clo-llm holds it), or start with --device cpu."
        )
    try:
        cupy = importlib.import_module("cupy")
        found = cupy.cuda.runtime.runtimeGetVersion() // 1000
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # whatever an import of a broken installation raises
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"CuPy cannot use this machine's CUDA ({reason}): {install}, or start with --device cpu."
        ) from None
    if str(found) != cuda:
        raise ConfigError(
            f"CuPy is built for CUDA {found} and PyTorch for CUDA {cuda}: {install} in its place, or start "
            "with --device cpu."
        )


def main() -> int:
    """Answer with a ``Found`` as JSON, or with a sentence and the exit code of an error that is explained."""
    die_with_parent(int(sys.argv[2]))
    try:
        print(msgspec.json.encode(find_device(sys.argv[1])).decode())
    except ConfigError as error:
        print(error)
        return EXIT_EXPLAINED
    return 0


if __name__ == "__main__":
    sys.exit(main())
