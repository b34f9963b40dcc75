"""The drift check: it measures what the cache loses, and changes nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import divergence, make_arena, make_engine, prefill, teacher_force
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.pacing import Pacing
from clo.gpu_worker.scheduler import Scheduler
from clo.runtime.client import Client
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.wire.messages import (
    Allocate,
    Allocated,
    Done,
    DriftStats,
    FromWorker,
    Run,
    Sampling,
    Stepped,
    ToStore,
)
from tests.server import Server

MAX_TOKENS = 700
WHOLE = CacheConfig(resident=MAX_TOKENS, select_k=64)
TINY = CacheConfig(resident=8, select_k=8, recent=8)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def decoder(tiny_model: Path, request: pytest.FixtureRequest) -> Decoder:
    return load_decoder(resolve(ModelConfig(model=str(tiny_model), device=request.param, dtype="float32")))


def random_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, 500, (count,), generator=generator).tolist()
    return tokens


def checked(decoder: Decoder, config: CacheConfig, every: int, slots: int) -> tuple[Engine, DriftCheck]:
    """An engine, over an arena for three sequences, whose steps are compared."""
    arena = make_arena(decoder, 3, MAX_TOKENS)
    engine = Engine(decoder, arena, config, slots, MAX_TOKENS)
    return engine, DriftCheck(engine, arena, every, MAX_TOKENS)


def serve(engine: Engine, drift_check: DriftCheck | None, counts: tuple[int, ...]) -> dict[int, list[int]]:
    """Greedy tokens of a request for each count, by request, through a scheduler with a store of its own."""
    engine.capture()
    granted: list[Allocated] = []
    tokens: dict[int, list[int]] = {number: [] for number in range(len(counts))}
    done: list[int] = []
    blocks = iter(range(1, 1 + len(counts) * engine.max_blocks))

    def report(message: FromWorker) -> None:
        if isinstance(message, Stepped):
            for step in message.steps:
                tokens[step.sequence].append(step.token)
        elif isinstance(message, Done):
            done.append(message.sequence)

    def ask_store(message: ToStore) -> None:
        if isinstance(message, Allocate):
            granted.append(Allocated(message.sequence, [next(blocks) for _ in range(message.blocks)]))

    scheduler = Scheduler(engine, MAX_TOKENS, 1000, Pacing(None, 1.0), report, ask_store, drift_check)
    for number, count in enumerate(counts):
        sampling = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
        scheduler.add(Run(number, random_tokens(150 * (number + 1), number), sampling, 0, [], None))
    while len(done) < len(counts):
        while granted:
            scheduler.granted(granted.pop(0))
        scheduler.advance()
    if engine.decoder.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens


def test_a_set_of_the_whole_context_is_full_attention(decoder: Decoder) -> None:
    engine, drift_check = checked(decoder, WHOLE, every=4, slots=3)
    serve(engine, drift_check, (21, 21, 21))
    stats = drift_check.stats()
    assert 12 <= stats.checks <= 15, "each of three sequences every four of its 20 steps, but one at a time"
    assert stats.mean_kl == pytest.approx(0.0, abs=1e-5)
    assert stats.agreement == 1.0


def test_a_tiny_set_is_measured_as_teacher_forcing_measures_it(decoder: Decoder) -> None:
    """The first step after a prompt, whose rows no cache has touched."""
    prompt, token = random_tokens(600, 1), 7
    full, tiny = (
        teacher_force(make_engine(decoder, config, 1, MAX_TOKENS), prompt, [token, 0])[1:]
        for config in (CacheConfig(attention="full"), TINY)
    )
    engine, drift_check = checked(decoder, TINY, every=1, slots=1)
    prefill(engine, 0, prompt, MAX_TOKENS)
    engine.feed(0, token)
    drift_check.before({0: 601})
    drift_check.after(engine.step([0], 601))
    if decoder.device.type == "cuda":
        torch.cuda.synchronize()
    stats = drift_check.stats()
    assert stats.mean_kl > 0.01
    assert stats.mean_kl == pytest.approx(divergence(tiny, full), rel=1e-3)
    assert stats.agreement == float(tiny.argmax() == full.argmax())


def test_the_tokens_are_the_same_with_and_without(decoder: Decoder) -> None:
    """Three requests over two slots, with rows dropped."""
    counts = (40, 25, 30)
    engine, drift_check = checked(decoder, TINY, every=1, slots=2)
    without = serve(Engine(decoder, make_arena(decoder, 3, MAX_TOKENS), TINY, 2, MAX_TOKENS), None, counts)
    assert serve(engine, drift_check, counts) == without
    assert drift_check.stats().mean_kl > 0.01
    assert drift_check.stats().agreement < 1.0


def test_a_server_reports_it(launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path) -> None:
    arguments = ("--model", str(tiny_model), "--device", "cpu", "--kv-size", "64MiB", "--select-k", "8")
    with (
        launch(*arguments, "--resident", "8", "--drift-check", "3") as server,
        Client(server.address) as client,
    ):
        assert client.info().workers[0].drift_check == DriftStats(0, 0.0, 0.0)
        client.generate(random_tokens(300, 1), max_tokens=20, temperature=0.0, ignore_eos=True)
        stats = client.info().workers[0].drift_check
        assert stats is not None
        assert stats.checks == 6, "of 19 decode steps"
        assert stats.mean_kl > 0.01
