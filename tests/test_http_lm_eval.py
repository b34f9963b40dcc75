"""lm-evaluation-harness, unmodified: ``pip install 'lm-eval[api]'``, which CI does without."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval[api]")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

Launch = Callable[..., AbstractContextManager[Server]]

TASK = """
task: cities
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: right
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
CITIES = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}


def test_its_log_likelihoods_are_those_of_its_own_backend(
    launch: Launch, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    documents = [
        {"text": f"The capital of {country} is", "choices": list(CITIES.values()), "right": number}
        for number, country in enumerate(CITIES)
    ]
    data = tmp_path / "cities.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "cities.yaml").write_text(TASK.format(data=data))
    tasks = TaskManager(include_path=str(tmp_path))

    def likelihoods(backend: str, **options: Any) -> list[tuple[float, bool]]:
        found = lm_eval.simple_evaluate(
            model=backend, model_args=options, tasks=["cities"], task_manager=tasks, log_samples=True
        )
        samples = sorted(found["samples"]["cities"], key=lambda sample: sample["doc_id"])
        return [(float(value), bool(greedy)) for sample in samples for ((value, greedy),) in sample["resps"]]

    expected = likelihoods("hf", pretrained=str(tiny_model), dtype="float32", device="cpu")
    with launch("--model", str(tiny_model), "--dtype", "float32", "--http", "0") as server:
        found = likelihoods(
            "local-completions",
            model=str(tiny_model),
            base_url=f"{server.url}/v1/completions",
            num_concurrent=4,
        )
    assert len(found) == 16
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
