"""What a worker checks before it uses a GPU, and how long it waits for one."""

import mmap
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from clo.gpu_worker import outputs, pinning
from clo.gpu_worker.memory import plan_cpu_memory, plan_gpu_memory, rank_memory
from clo.gpu_worker.outputs import Mailbox
from clo.gpu_worker.pinning import pin
from clo.runtime.config import CacheConfig, EngineConfig
from clo.runtime.model.kv_shape import KVShape, LayerSpec
from clo.runtime.wire.errors import ConfigError, DeviceStuck
from tests.server import Server

GIB = 2**30
VOCAB = 128_256
LLAMA = KVShape((LayerSpec(),) * 32, query_heads=32, kv_heads=8, head_dim=128, dtype_name="bfloat16")


def check(
    config: CacheConfig, slots: int | None, tokens: int, utilization: float = 0.9, longest: int = 131_072
) -> int:
    engine = EngineConfig(slots, utilization)
    memory = torch.cuda.mem_get_info()
    return plan_gpu_memory(LLAMA, config, engine, tokens // LLAMA.block_tokens, longest, VOCAB, memory).slots


def test_what_does_not_fit_into_the_gpu_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB with 15 GiB of weights: each knob that the sentence names makes it fit."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (65 * GIB, 80 * GIB))
    large, small = CacheConfig(resident=8192), CacheConfig(resident=2048)
    with pytest.raises(ConfigError) as caught:
        check(large, slots=48, tokens=500_000)
    text = str(caught.value)
    assert text.startswith(
        "The GPU has 72.0 GiB for CLO and that is too little (15.0 GiB in use with the weights, "
    )
    assert "48 x 1.0 GiB resident rows" in text
    assert re.search(r"[\d.]+ GiB index of 499712 tokens, .* prefill of 131072 tokens", text)
    assert text.endswith("or raise --gpu-memory-utilization.")
    check(large, slots=32, tokens=500_000)
    check(small, slots=48, tokens=500_000)
    check(large, slots=48, tokens=100_000, utilization=1.0)
    with pytest.raises(ConfigError):
        check(small, slots=48, tokens=500_000, utilization=0.4)


def test_other_attention_needs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact top-k has no index, full attention has no rows either."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (65 * GIB, 80 * GIB))
    for attention in ("topk", "full"):
        check(CacheConfig(attention=attention, resident=8192), slots=100, tokens=8_000_000)
    with pytest.raises(ConfigError):
        check(CacheConfig(select_k=64, resident=64), slots=100, tokens=8_000_000)


@pytest.mark.parametrize(
    ("free", "total", "tokens", "longest", "slots"),
    [
        (64, 79.2, 772_096, 131_072, 64),  # an H100 with Llama-3.1-8B, by default and with 128 GiB
        (64, 79.2, 786_432, 32_768, 64),
        (8, 23.5, 400_000, 32_768, 2),  # a GPU of 24 GB
        (64, 79.2, 3 * 512, 32_768, 3),  # a store of three blocks
    ],
)
def test_as_many_sequences_as_fit_by_default(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: float,
    total: float,
    tokens: int,
    longest: int,
    slots: int,
) -> None:
    """One more would be refused, unless it is the bound; the line on stderr says what the memory is for."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), int(total * GIB)))
    assert check(CacheConfig(), None, tokens, longest=longest) == slots
    text = capsys.readouterr().err
    assert text.startswith(f"--max-num-seqs auto: {slots} (of ") and text.count("\n") == 1
    check(CacheConfig(), slots, tokens, longest=longest)
    assert capsys.readouterr().err == "", "what was asked for needs no reason"
    if total < 30:
        with pytest.raises(ConfigError):
            check(CacheConfig(), slots + 1, tokens, longest=longest)


def test_where_not_even_one_sequence_fits_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * GIB, 20 * GIB))
    with pytest.raises(ConfigError, match=r"1 x .* resident rows"):
        check(CacheConfig(), None, 100_000)


def test_what_does_not_fit_into_cpu_memory_is_refused_in_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"100000 requests at a time take .* lower --max-num-seqs"
    ) as caught:
        plan_cpu_memory(LLAMA, CacheConfig(), EngineConfig(100_000), 4, 131_072, VOCAB, (2**40, "here"))
    assert "\n" not in str(caught.value)
    full = CacheConfig(attention="full")
    assert plan_cpu_memory(LLAMA, full, EngineConfig(3), 4, 1000, VOCAB, (2**40, "here")).slots == 3
    each = rank_memory(2**33, "here", 2)
    with pytest.raises(ConfigError, match=r"only 4\.0 GiB are available to each of 2 ranks here: lower"):
        plan_cpu_memory(LLAMA, CacheConfig(), EngineConfig(1000), 4, 131_072, VOCAB, each)


@pytest.mark.parametrize(("blocks", "slots"), [(100, 8), (3, 3)])
def test_on_the_cpu_some_sequences_are_taken_by_default(
    capsys: pytest.CaptureFixture[str], blocks: int, slots: int
) -> None:
    small = KVShape((LayerSpec(),) * 2, query_heads=4, kv_heads=2, head_dim=16, dtype_name="float32")
    slots_planned = plan_cpu_memory(
        small, CacheConfig(), EngineConfig(), blocks, 4096, 512, (2**34, "here")
    ).slots
    assert slots_planned == slots
    assert capsys.readouterr().err.startswith(f"--max-num-seqs auto: {slots} (with ")


@pytest.mark.gpu
def test_a_server_that_does_not_fit_into_the_gpu_says_so(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path
) -> None:
    """Before it pins memory or captures graphs: one line, exit code 1."""
    options = ("--device", "cuda", "--kv-size", "16MiB", "--gpu-memory-utilization", "0.01")
    with launch("--model", str(tiny_model), *options, ready=False) as server:
        server.process.wait(120)
        assert server.wait() == 1
        text = server.stderr.read_text()
    assert text.startswith("error: The GPU has ") and text.count("\n") == 1, text
    assert "that is too little" in text


@pytest.mark.gpu
def test_pinned_memory_is_one_for_both_sides_and_is_pinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several pieces, the last one short. What CUDA refuses is a sentence, and CUDA goes on."""
    monkeypatch.setattr(pinning, "REGISTERED_BYTES", 2**20)
    memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, 9 * 2**19), np.uint8)).view(torch.int32)
    memory.fill_(1)
    view = pin(memory)
    try:
        assert view.is_cuda and view.shape == memory.shape and view.dtype == memory.dtype
        assert int(view.sum()) == len(memory)
        memory[-1] = 5
        assert int(view[-1]) == 5
        view.fill_(7)
        torch.cuda.synchronize()
        assert (memory == 7).all()
        with pytest.raises(
            ConfigError, match=r"CUDA could not pin 4.5 MiB of CPU memory \(error 712 at "
        ) as caught:
            pin(memory)
        assert "lower --kv-size" in str(caught.value) and "ulimit -l" in str(caught.value)
        assert int(view.sum()) == 7 * len(memory)
    finally:
        for start in range(0, memory.nbytes, 2**20):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr() + start)


def test_a_gpu_that_does_not_answer_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry has the whole time for itself, and one that comes late is still taken."""
    monkeypatch.setattr(outputs, "_STUCK_SECONDS", 0.2)
    box = Mailbox(2, torch.device("cpu"))
    for number in range(1, 40):  # more than the ring holds
        assert box.read(number, 2) is None
        box.post(torch.tensor([number, -number]))
        assert box.read(number, 2) == [number, -number]
        assert box.read(number, 1) == [number]
    assert box.read(40, 1) is None
    time.sleep(0.25)
    with pytest.raises(DeviceStuck, match=r"has not finished a step for 0.2 s; look at it with nvidia-smi"):
        box.read(40, 1)
    box.post(torch.tensor([3]))
    assert box.read(40, 1) == [3]
    assert box.read(41, 1) is None
