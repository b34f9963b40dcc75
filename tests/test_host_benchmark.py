"""The benchmark of what the host does: its worker, its store and its silent router serve, here on the CPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import host
from clo.gpu_worker.in_process import make_arena
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve


@pytest.mark.timeout(120)
def test_requests_end_and_others_take_their_places(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_STEPS", 60)
    monkeypatch.setattr(host, "_PROFILED", 10)
    decoder = load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))
    sequences, tokens = 3, 1600
    arena = make_arena(decoder, sequences, tokens)
    engine = host.PrefilledEngine(decoder, arena, CacheConfig(), sequences, tokens)
    assert isinstance(engine.prefill(0, [1, 2], [0]).advance(), torch.Tensor)
    served = host.serve(engine, [1000, 980, 960], tokens)
    assert (served.begin.steps, served.end.steps, served.profiled) == (20, 80, 10)
    assert served.end.store >= served.begin.store > 0
