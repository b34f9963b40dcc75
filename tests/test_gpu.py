"""Which device is chosen, and the sentence where a GPU is wanted and something that it needs is missing."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from clo.runtime.machine import numa
from clo.runtime.machine.gpu import Found, choose_device, find_device
from clo.runtime.wire.errors import ConfigError

INSTALL = "pip install 'cupy-cuda13x[ctk]>=14.2'"


def fail(error: Exception) -> Callable[[], int]:
    def call() -> int:
        raise error

    return call


def put_cupy(
    monkeypatch: pytest.MonkeyPatch, version: Callable[[], int], nvrtc: Callable[[], Any] = lambda: (13, 0)
) -> None:
    """A CuPy whose CUDA runtime has a version, or fails. GPU 2 is on bus 62."""
    cupy: Any = ModuleType("cupy")
    cupy.__spec__ = ModuleSpec("cupy", None)
    cupy.cuda = cuda = ModuleType("cupy.cuda")
    cupy.cuda.nvrtc = SimpleNamespace(getVersion=nvrtc)
    cupy.cuda.runtime = SimpleNamespace(
        runtimeGetVersion=version, deviceGetPCIBusId=lambda device: f"0000:6{device}:00.0"
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with three H100, PyTorch for CUDA 13.0 and a CuPy that fits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    put_cupy(monkeypatch, lambda: 13000)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """Their nodes are given in PyTorch's order, whatever the order of their buses."""
    monkeypatch.setattr(numa, "_DEVICES", tmp_path)
    for bus, node in (("60", "1\n"), ("61", "-1\n"), ("62", "0\n"), ("63", "7\n")):
        (tmp_path / f"0000:{bus}:00.0").mkdir()
        (tmp_path / f"0000:{bus}:00.0/numa_node").write_text(node)
    assert find_device(asked) == Found("cuda", (1, None, 0))


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_is_the_cpu() -> None:
    assert find_device("auto") == Found("cpu")


def test_who_wants_the_cpu_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked for GPUs"))
    assert choose_device("cpu") == Found("cpu")


PRETENDER = """
import sys, types
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_available=lambda: {seen})
torch.version = types.SimpleNamespace(cuda="13.0")
sys.modules["torch"] = torch
print("a greeting that a library prints")
"""


@pytest.mark.parametrize(
    ("asked", "seen", "answer"),
    [
        ("auto", "False", Found("cpu")),
        ("cuda", "False", "PyTorch sees no CUDA GPU here: run nvidia-smi"),
        ("auto", "__import__('os').abort()", "PyTorch could not say which GPUs are here (exit code -6)"),
    ],
)
def test_another_process_looks_for_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, seen: str, answer: str | Found
) -> None:
    """What it finds, and what it says, is what a server's user gets."""
    (tmp_path / "sitecustomize.py").write_text(PRETENDER.format(seen=seen))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    try:
        assert choose_device(asked) == answer
    except ConfigError as error:
        assert str(error).startswith(str(answer)) and "--device cpu" in str(error)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("built_for", "sentence"),
    [
        (None, "This PyTorch was built without CUDA; install a CUDA build"),
        ("13.0", "PyTorch sees no CUDA GPU here: run nvidia-smi"),
    ],
)
def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, sentence: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert_refused("cuda", sentence)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("asked", ["auto", "cuda"])
class TestSomethingIsMissing:
    def test_a_gpu_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        assert_refused(asked, "Tesla T4 has compute capability 7.5, and CLO's kernels need 8.0 (Ampere)")

    def test_no_cupy(self, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "cupy" else find(name, *rest)
        )
        assert_refused(asked, f"CuPy, which launches CLO's kernels, is not installed: {INSTALL}")

    @pytest.mark.parametrize("error", [ImportError("libnvrtc.so.13:\n no such file"), RuntimeError("driver")])
    def test_a_cupy_that_cannot_load_its_libraries(
        self, monkeypatch: pytest.MonkeyPatch, asked: str, error: Exception
    ) -> None:
        put_cupy(monkeypatch, fail(error))
        reason = " ".join(str(error).split())
        assert_refused(asked, f"CuPy cannot use this machine's CUDA ({reason}): {INSTALL}")

    def test_a_cupy_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
        put_cupy(monkeypatch, lambda: 13000, fail(RuntimeError("no NVRTC")))
        assert_refused(asked, f"CuPy cannot use this machine's CUDA (no NVRTC): {INSTALL}")

    def test_a_cupy_for_another_cuda(self, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
        put_cupy(monkeypatch, lambda: 12090)
        assert_refused(asked, f"CuPy is built for CUDA 12 and PyTorch for CUDA 13: {INSTALL}")


def assert_refused(asked: str, sentence: str) -> None:
    """One sentence, which says how to go on without a GPU."""
    with pytest.raises(ConfigError) as caught:
        find_device(asked)
    text = str(caught.value)
    assert sentence in text
    assert "\n" not in text and text.endswith("start with --device cpu.")
