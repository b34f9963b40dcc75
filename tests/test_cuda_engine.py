"""The decode path on a GPU against the same on the CPU."""

from pathlib import Path

import pytest
import torch

from gpu_worker.engine import Engine
from gpu_worker.loader import load_decoder, resolve
from gpu_worker.model import Decoder
from runtime.config import CacheConfig, ModelConfig
from tests.reference import arrived, divergence, force, make_engine, prefill, stats_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def decoders(tiny_model: Path) -> tuple[Decoder, Decoder]:
    cpu, gpu = (
        load_decoder(resolve(ModelConfig(model=str(tiny_model), device=device, dtype="float32")))
        for device in ("cpu", "cuda")
    )
    return cpu, gpu


def random_tokens(count: int) -> list[int]:
    tokens: list[int] = torch.randint(0, 512, (count,)).tolist()
    return tokens


def greedy(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy continuations of all prompts in one batch."""
    total = max(map(len, prompts)) + count
    generated = [
        arrived(engine, engine.start(slot, prefill(engine, slot, prompt, total)))
        for slot, prompt in enumerate(prompts)
    ]
    slots = list(range(len(prompts)))
    for step in range(1, count):
        posted = engine.step(slots, max(map(len, prompts)) + step)
        for slot, token in enumerate(arrived(engine, posted)):
            generated[slot].append(token)
    return generated


@pytest.mark.parametrize("prefetch", ["off", "correct", "accept"])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_whole_set_gives_the_tokens_of_the_cpu(
    decoders: tuple[Decoder, Decoder], prefetch: str, graphs: bool
) -> None:
    config = CacheConfig(resident=1600, select_k=64, prefetch=prefetch, prefetch_from=1)  # type: ignore[arg-type]
    prompts = [random_tokens(count) for count in (1, 3, 63, 70, 511, 512, 700, 1300)]
    expected = greedy(make_engine(decoders[0], config, 8, 1600), prompts, 60)
    engine = make_engine(decoders[1], config, 8, 1600)
    if graphs:
        engine.capture()
    assert greedy(engine, prompts, 60) == expected


@pytest.mark.parametrize("attention", ["clo", "topk", "full"])
def test_logits_follow_those_of_the_cpu(decoders: tuple[Decoder, Decoder], attention: str) -> None:
    """With rows dropped a choice between equals may differ; what it costs does not."""
    prompt, continuation = random_tokens(500), random_tokens(300)
    config = CacheConfig(attention=attention, select_k=64, resident=256)  # type: ignore[arg-type]
    full, cpu, gpu = (
        force(make_engine(decoder, how, 1, 800), prompt, continuation).cpu()
        for decoder, how in (
            (decoders[0], CacheConfig(attention="full")), (decoders[0], config), (decoders[1], config)
        )
    )  # fmt: skip
    assert divergence(gpu, cpu) < 0.05 * divergence(cpu, full) + 1e-4
    assert divergence(gpu, full) < 1.1 * divergence(cpu, full) + 1e-4


def test_what_the_cache_moved_is_what_it_moves_on_the_cpu(decoders: tuple[Decoder, Decoder]) -> None:
    prompt, continuation = random_tokens(700), random_tokens(60)
    config = CacheConfig(select_k=32, resident=128, gate=0.7, prefetch="off")
    counted = []
    for decoder in decoders:
        engine = make_engine(decoder, config, 1, 800)
        force(engine, prompt, continuation)
        counted.append(stats_of(engine, 759, 59))
    cpu, gpu = counted
    assert gpu.gate_checks == cpu.gate_checks
    assert gpu.selections == pytest.approx(cpu.selections, rel=0.05)
    assert gpu.fetched_rows == pytest.approx(cpu.fetched_rows, rel=0.05)
    assert gpu.fetched_rows > 0


def test_the_default_model_gives_the_tokens_of_the_cpu(smollm2: Path) -> None:
    config = CacheConfig(resident=2048, select_k=64)
    cpu, gpu = (
        load_decoder(resolve(ModelConfig(device=device, dtype="float32"))) for device in ("cpu", "cuda")
    )
    prompts = [torch.randint(0, 49152, (count,)).tolist() for count in (20, 300, 1500)]
    expected = greedy(make_engine(cpu, config, 3, 1700), prompts, 48)
    engine = make_engine(gpu, config, 3, 1700)
    engine.capture()
    found = greedy(engine, prompts, 48)
    if found != expected:  # two tokens may be as likely as each other
        for prompt, mine, theirs in zip(prompts, found, expected, strict=True):
            if mine != theirs:
                logits = [
                    force(make_engine(decoder, config, 1, 1700), prompt, theirs).cpu()
                    for decoder in (cpu, gpu)
                ]
                assert divergence(logits[1], logits[0]) < 1e-5
