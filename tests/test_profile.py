"""Profiles: what is refused and how, and that each head gets its own gate."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import clo.launch as launcher
from clo.gpu_worker.in_process import make_engine, teacher_force
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ModelConfig, WorkerConfig
from clo.runtime.model.files import resolve
from clo.runtime.model.ranks import Rank
from clo.runtime.profile import Profile, ProfiledLayer, ProfiledModel
from tests.server import READY_S, Server

LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 16  # of the tiny model


def layer(**changes: Any) -> dict[str, Any]:
    """Head 0 never selects, head 1 always."""
    return {"select_k": 16, "resident": 32, "thresholds": [0.0, 2.0], **changes}


def profile_of(**changes: Any) -> dict[str, Any]:
    """A profile for the tiny model, as JSON has it."""
    model = {"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return {"model": model, "layers": [layer()] * LAYERS, **changes}


def write(folder: Path, content: dict[str, Any] | bytes) -> str:
    path = folder / "profile.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


WRONG: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "no JSON": (b"thresholds: 0.9", "is not a profile: JSON is malformed"),
    "no text": (b"\xff\xfe\x00", "is not a profile: "),
    "missing field": ({"layers": []}, "is not a profile: Object missing required field `model`"),
    "unknown field": (profile_of(k=1), "is not a profile: Object contains unknown field `k`"),
    "wrong type": (profile_of(layers=[layer(resident="32")]), "is not a profile: Expected `int`, got `str`"),
    "nothing selected": (profile_of(layers=[layer(select_k=0)]), "is not a profile: Expected `int` >= 1"),
    "threshold that is no cosine": (
        profile_of(layers=[layer(thresholds=[-0.1, 1.0])]),
        "is not a profile: Expected `float`",
    ),
    "too few layers": (
        profile_of(layers=[layer()]),
        "does not hold 2 thresholds for each of the 4 layers of its model",
    ),
    "too many heads": (
        profile_of(layers=[layer(thresholds=[0.0, 1.0, 2.0])] * LAYERS),
        "does not hold 2 thresholds for each of the 4 layers of its model",
    ),
    "fewer kept than selected": (
        profile_of(layers=[layer()] * (LAYERS - 1) + [layer(resident=15)]),
        "keeps 15 rows of 16 that it selects in layer 3",
    ),
}


@pytest.mark.parametrize(("content", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused(
    content: dict[str, Any] | bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main(["--profile", write(tmp_path, content)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --profile {tmp_path / 'profile.json'} ")
    assert error.count("\n") == 1
    assert expected in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--gate 0.9", "--gate and --profile exclude each other"),
        ("--select-k 16", "--select-k and --profile exclude each other"),
        ("--resident 32", "--resident and --profile exclude each other"),
        ("--attention topk", "--profile is for --attention clo"),
    ],
)
def test_options_that_do_not_go_with_a_profile(
    options: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main([*options.split(), "--profile", write(tmp_path, profile_of())]) == 2
    assert expected in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--profile", str(tmp_path / "none")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --profile {tmp_path}/none cannot be read: No such file or directory.\n"
    )


def test_a_profile_of_another_model_stops_the_start(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path, tmp_path: Path
) -> None:
    other = profile_of(model={"layers": 5, "kv_heads": 2, "head_dim": 16}, layers=[layer()] * 5)
    arguments = ("--model", str(tiny_model), "--kv-size", "64MiB", "--max-num-seqs", "8")
    with launch(*arguments, "--profile", write(tmp_path, other), ready=False) as server:
        assert server.process.wait(READY_S) == 1
        assert server.stderr.read_text() == (
            "error: --profile is of a model of 5 layers, 2 KV heads and head_dim 16, and this one has 4, 2 "
            "and 16; make one for it with benchmarks.calibrate.\n"
        )


def test_sizes_and_thresholds_reach_layers_and_heads(tiny_model: Path, tmp_path: Path) -> None:
    """On their way to the worker they are JSON. A head of threshold 0 keeps the rows of the prompt."""
    sizes = [(16, 32), (8, 64), (16, 16), (24, 40)]
    layers = [layer(select_k=k, resident=resident) for k, resident in sizes]
    config = CacheConfig(profile=Profile.load(Path(write(tmp_path, profile_of(layers=layers)))))
    model = resolve(ModelConfig(model=str(tiny_model), device="cpu"))
    sent = msgspec.json.encode(WorkerConfig(0, "", {0: ""}, model, config))
    received = msgspec.json.decode(sent, type=WorkerConfig).cache
    assert received == config
    decoder = load_decoder(model)
    engine = make_engine(decoder, received, 1, 450)
    cache = engine.cache
    assert cache.thresholds.tolist() == [[0.0, 2.0]] * LAYERS
    assert [layer.resident.capacity for layer in cache.sparse_layers] == [resident for _, resident in sizes]
    tokens = torch.randint(0, decoder.vocab, (421,)).tolist()
    teacher_force(engine, tokens[:400], tokens[400:])
    checks, selections, selected, moved, *_ = cache._counters[:, 0].unbind(-1)
    assert checks.tolist() == [[20, 20]] * LAYERS
    assert selections.tolist() == [[0, 20]] * LAYERS
    assert selected.tolist() == [[0, k * 20] for k, _ in sizes]
    assert (moved[:, 0] == 0).all() and (moved[:, 1] > 0).all()


def test_a_rank_has_the_gates_of_its_heads() -> None:
    layer = ProfiledLayer(8, 16, (0.1, 0.2, 0.3, 0.4))
    part = Profile(ProfiledModel(2, 4, 16), (layer, layer)).part(Rank(1, 2).kv_heads(4))
    part.check(2, 2, 16)
    assert [own.thresholds for own in part.layers] == [(0.3, 0.4)] * 2
