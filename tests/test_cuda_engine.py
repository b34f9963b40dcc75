"""The decode path on a GPU against the same on the CPU, and that the host does not wait in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import (
    blocks_of,
    divergence,
    make_engine,
    prefill,
    stats_of,
    teacher_force,
    wait_for,
)
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.kernels.sample import LATE
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Sampling, Text
from examples.document import document

pytestmark = pytest.mark.gpu

Answer = tuple[list[int], Tensor]  # greedy tokens, and the logits [tokens, vocab] that chose them

FULL = CacheConfig(attention="full")
SOURCES = (QuerySource.OWN, QuerySource.INPUT, QuerySource.MIDDLE, QuerySource.INPUT)
LENGTHS = (1, 3, 63, 70, 511, 512, 700, 1300)
COUNT = 60


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, 512, (count,), generator=generator).tolist()
    return tokens


def answers(engine: Engine, prompts: list[list[int]], count: int) -> list[Answer]:
    """Greedy continuations of all prompts in one batch."""
    longest = max(map(len, prompts))
    tokens: list[list[int]] = []
    logits: list[list[Tensor]] = []
    for slot, prompt in enumerate(prompts):
        handle = engine.start([slot], prefill(engine, slot, prompt, longest + count))
        tokens.append(wait_for(engine, handle))
        logits.append([handle.logits[0].cpu()])
    slots = list(range(len(prompts)))
    for step in range(1, count):
        handle = engine.step(slots, longest + step)
        for slot, token in enumerate(wait_for(engine, handle)):
            tokens[slot].append(token)
            logits[slot].append(handle.logits[slot].cpu())  # waits, so the next step cannot overwrite it
    return [(mine, torch.stack(rows)) for mine, rows in zip(tokens, logits, strict=True)]


def assert_follows(found: list[Answer], expected: list[Answer], limit: float) -> None:
    """At each position the logits agree to ``limit`` nats of KL. Then greedy tokens can only differ where two
    are as good as equally likely; what comes after that has another context and is not compared."""
    for (mine, logits), (theirs, reference) in zip(found, expected, strict=True):
        same = [token == other for token, other in zip(mine, theirs, strict=True)]
        end = len(same) if all(same) else same.index(False) + 1
        worst = max(divergence(logits[at : at + 1], reference[at : at + 1]) for at in range(end))
        assert worst < limit, f"{mine[:end]} and {theirs[:end]}"


@pytest.fixture(scope="module")
def decoders(tiny_model: Path) -> tuple[Decoder, Decoder]:
    """The tiny model on the CPU and on the GPU, both in float32 (torch multiplies in full precision)."""
    assert torch.get_float32_matmul_precision() == "highest"
    cpu, gpu = (
        load_decoder(resolve(ModelConfig(model=str(tiny_model), device=device, dtype="float32")))
        for device in ("cpu", "cuda")
    )
    return cpu, gpu


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [random_tokens(count, seed) for seed, count in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(decoders: tuple[Decoder, Decoder], prompts: list[list[int]]) -> list[Answer]:
    """Of full attention on the CPU, which a set of the whole context has to repeat."""
    return answers(make_engine(decoders[0], FULL, len(prompts), 1600), prompts, COUNT)


@pytest.mark.parametrize("prefetch", ["off", "verified", "predicted"])
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
def test_a_whole_set_gives_the_tokens_of_the_cpu(
    decoders: tuple[Decoder, Decoder],
    prompts: list[list[int]],
    expected: list[Answer],
    prefetch: str,
    graphs: bool,
) -> None:
    config = CacheConfig(resident=1600, select_k=64, prefetch=prefetch)  # type: ignore[arg-type]
    engine = make_engine(decoders[1], config, len(prompts), 1600, SOURCES)
    if graphs:
        engine.capture()
    assert_follows(answers(engine, prompts, COUNT), expected, 1e-5)


def test_every_graph_gives_the_tokens_of_the_cpu(
    decoders: tuple[Decoder, Decoder], prompts: list[list[int]], expected: list[Answer]
) -> None:
    """The same engine with 1 to 8 slots in use, each taken again after it was left."""
    engine = make_engine(decoders[1], CacheConfig(resident=1600, select_k=64), len(prompts), 1600)
    engine.capture()
    for used in (8, 1, 3, 2, 5, 4):
        short = [(tokens[:8], logits[:8]) for tokens, logits in expected[-used:]]
        assert_follows(answers(engine, prompts[-used:], 8), short, 1e-5)
        for slot in range(used):
            engine.retire(slot)


@pytest.mark.parametrize(
    ("attention", "prefetch"),
    [("clo", "off"), ("clo", "verified"), ("clo", "predicted"), ("topk", "off"), ("full", "off")],
)
def test_logits_follow_those_of_the_cpu(
    decoders: tuple[Decoder, Decoder], attention: str, prefetch: str
) -> None:
    """With rows dropped, rounding may choose another of two rows that are worth the same. That moves logits
    by a small part of what dropping rows moves them."""
    prompt, continuation = random_tokens(500, 1), random_tokens(300, 2)
    config = CacheConfig(
        attention=attention,  # type: ignore[arg-type]
        prefetch=prefetch,  # type: ignore[arg-type]
        select_k=64,
        resident=256,
        tail=0,
    )
    full, cpu, gpu = (
        teacher_force(make_engine(decoder, how, 1, 800, SOURCES), prompt, continuation).cpu()
        for decoder, how in ((decoders[0], FULL), (decoders[0], config), (decoders[1], config))
    )
    assert divergence(gpu, cpu) < 0.1 * divergence(cpu, full) + 1e-5
    assert divergence(gpu, full) < 1.1 * divergence(cpu, full) + 1e-5


@pytest.mark.parametrize("prefetch", ["off", "predicted"])
def test_a_tail_brings_logits_nearer_to_full_attention(
    decoders: tuple[Decoder, Decoder], prefetch: str
) -> None:
    prompt, continuation = random_tokens(500, 1), random_tokens(300, 2)
    without, tail = (
        CacheConfig(prefetch=prefetch, select_k=64, resident=256, tail=tokens)  # type: ignore[arg-type]
        for tokens in (0, 800)
    )
    full, dropping, gpu = (
        teacher_force(make_engine(decoder, how, 1, 800, SOURCES), prompt, continuation).cpu()
        for decoder, how in ((decoders[0], FULL), (decoders[1], without), (decoders[1], tail))
    )
    assert divergence(gpu, full) < 0.5 * divergence(dropping, full)


def test_what_the_cache_moved_is_what_it_moves_on_the_cpu(decoders: tuple[Decoder, Decoder]) -> None:
    prompt, continuation = random_tokens(700, 1), random_tokens(60, 2)
    config = CacheConfig(select_k=32, resident=128, gate=0.7, prefetch="off")
    counted = []
    for decoder in decoders:
        engine = make_engine(decoder, config, 1, 800)
        teacher_force(engine, prompt, continuation)
        counted.append(stats_of(engine, 759, 59))
    cpu, gpu = counted
    assert gpu.gate_checks == cpu.gate_checks
    assert gpu.selections == pytest.approx(cpu.selections, rel=0.05)
    assert gpu.fetched_rows == pytest.approx(cpu.fetched_rows, rel=0.05)
    assert gpu.fetched_rows > 0


def test_the_host_does_not_wait_for_the_device(decoders: tuple[Decoder, Decoder]) -> None:
    """A whole request, from prefill to its end, is launched without one synchronisation."""
    engine = make_engine(decoders[1], CacheConfig(resident=128, select_k=32), 2, 800)
    engine.capture()
    prompt = random_tokens(700, 1)
    answers(engine, [prompt], 5)  # what is made at its first use
    engine.retire(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.start([0], prefill(engine, 0, prompt, 705))
        for step in range(1, 5):
            handle = engine.step([0], 700 + step)
        engine.feed(0, 7)
        release = engine.retire(0)
        while not release.event.reached:
            pass
        assert len(wait_for(engine, handle)) == 1
        assert release.finish(704, 4).steps == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait_for_what_changes_logits_and_scores_prompts(
    decoders: tuple[Decoder, Decoder],
) -> None:
    engine = make_engine(decoders[1], CacheConfig(resident=128, select_k=32), 2, 800)
    engine.capture()
    prompt = random_tokens(700, 1)
    sampling = Sampling(
        temperature=0.0, min_p=0.1, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={5: 1.0},
        min_tokens=3, grammar="any",
    )  # fmt: skip
    everything = np.full(engine.decoder.vocab // 32, -1, np.int32)

    def request() -> list[int]:
        work = engine.prefill(0, prompt, blocks_of(engine, 0, 705), score=2)
        while (logits := work.advance()) is None:
            pass
        engine.activate(0, len(prompt), sampling, 0)
        engine.adjust(0, sampling, prompt, [7])
        engine.constrain(0, everything, len(prompt))
        handle, tokens = engine.start([0], logits), []
        for step in range(1, 5):
            tokens += wait_for(engine, handle)  # which has read its mask
            engine.constrain(0, everything, len(prompt) + step)
            handle = engine.step([0], 700 + step)
        tokens += wait_for(engine, handle)
        release = engine.retire(0)
        while not release.event.reached:
            pass
        assert work.scores is not None and len(work.scores.read()) == 699
        return tokens

    first = request()  # what is made at its first use
    assert LATE not in first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert request() == first
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_masks_that_arrive_while_their_step_runs_and_later(decoders: tuple[Decoder, Decoder]) -> None:
    """Two steps are on their way at a time. One slot has a mask for each token, some of them late, and has
    the tokens that it has on the CPU in time; the slot beside it has penalties."""
    prompts, count = [random_tokens(5, 1), random_tokens(300, 2)], 40
    allowed = torch.rand(count, 512, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32)
    samplings = [
        Sampling(temperature=0.0, grammar="any"),
        Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.2),
    ]

    def run(decoder: Decoder, late: set[int]) -> list[list[int]]:
        engine = make_engine(decoder, CacheConfig(resident=400, select_k=64), 2, 400)
        engine.capture()
        logits = [prefill(engine, slot, prompt, 400) for slot, prompt in enumerate(prompts)]
        for slot, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            engine.activate(slot, len(prompt), sampling, seed=0)
            engine.adjust(slot, sampling, prompt, [])
        engine.constrain(0, bits[0], len(prompts[0]))
        handles = [engine.start([0, 1], torch.cat(logits))]
        found: list[list[int]] = [[], []]
        steps = 0
        while len(found[0]) < count:
            if len(handles) < engine.depth:
                handles.append(engine.step([0, 1], 400))
            mine, its = wait_for(engine, handles.pop(0))
            found[1].append(its)
            if mine != LATE:
                found[0].append(mine)
            if steps not in late and len(found[0]) < count:
                engine.constrain(0, bits[len(found[0])], len(prompts[0]) + len(found[0]))
            steps += 1
        return [found[0], found[1][:count]]

    expected = run(decoders[0], set())
    assert all(allowed[place, token] for place, token in enumerate(expected[0]))
    assert run(decoders[1], set()) == expected
    assert run(decoders[1], {3, 4, 11, 12, 13, 30}) == expected


@pytest.mark.parametrize("length", [2, 70, 1500])
def test_prompts_are_scored_as_on_the_cpu(decoders: tuple[Decoder, Decoder], length: int) -> None:
    prompt, found = random_tokens(length, 3), []
    for decoder in decoders:
        engine = make_engine(decoder, CacheConfig(resident=128), 1, 1600)
        work = engine.prefill(0, prompt, blocks_of(engine, 0, 1600), score=1)
        while work.advance() is None:
            pass
        if decoder.device.type == "cuda":
            torch.cuda.synchronize()
        assert work.scores is not None
        found.append(work.scores.read())
    for mine, its in zip(*found, strict=True):
        assert mine.token == its.token and abs(mine.logprob - its.logprob) < 1e-3


@pytest.fixture(scope="module")
def pages(smollm2: Path) -> list[list[int]]:
    """Prompts from a real document."""
    tokens = Tokenizer(smollm2, vocab_size=2**31).encode(Text(document("compound")), limit=10**6)
    return [tokens[:20], tokens[1000:1150], tokens[3000:3500]]


@pytest.fixture(scope="module")
def real(pages: list[list[int]]) -> list[Answer]:
    """Of the default model with full attention on the CPU."""
    decoder = load_decoder(resolve(ModelConfig(device="cpu")))
    return answers(make_engine(decoder, FULL, len(pages), 600), pages, 16)


@pytest.mark.parametrize(
    ("dtype", "attention", "limit"),
    [
        ("float32", "clo", 1e-4),
        ("bfloat16", "clo", 0.03),
        ("bfloat16", "full", 0.03),
        ("bfloat16", "topk", 0.3),  # which drops rows
    ],
)
def test_the_default_model_gives_the_tokens_of_the_cpu(
    pages: list[list[int]], real: list[Answer], dtype: str, attention: str, limit: float
) -> None:
    """In bfloat16 rounding alone costs about 0.001 nats on average."""
    decoder = load_decoder(resolve(ModelConfig(device="cuda", dtype=dtype)))  # type: ignore[arg-type]
    config = CacheConfig(attention=attention, resident=600, select_k=64)  # type: ignore[arg-type]
    engine = make_engine(decoder, config, len(pages), 600)
    engine.capture()
    assert_follows(answers(engine, pages, 16), real, limit)
