"""``benchmarks.serve`` on a GPU: random weights, and workers that replay what a real model would fetch."""

import pytest
import torch

from benchmarks.gpu.synthetic import LLAMA_8B, Model, ReplayLayer, random_decoder
from benchmarks.result import Result
from benchmarks.serve.__main__ import run
from benchmarks.serve.prompts import text_of
from benchmarks.serve.tables import NEW_ROWS, Server, Table
from benchmarks.serve.worker import ReplayEngine
from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.in_process import make_arena
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from tests.tail_inputs import with_runs
from tests.test_serve import TINY, figures

pytestmark = pytest.mark.gpu

MODEL = Model("tiny", 4, 4, 2, 256, 512, LLAMA_8B.vocab, head_dim=64)


def test_only_sequences_with_more_rows_than_a_head_keeps_replay() -> None:
    """Those get the stated share of new rows, each from a place of its own among the candidates."""
    k, resident, longest, latest = 100, 128, 1024, 64
    decoder = random_decoder(MODEL)
    config = CacheConfig(select_k=k, resident=resident)
    engine = ReplayEngine(decoder, make_arena(decoder, 3, longest), config, 3, longest)
    layer = engine.cache.layers[0]
    assert isinstance(layer, ReplayLayer)
    lengths = torch.tensor([1000, 190, 0], device="cuda")
    blocks, pages = (torch.stack(tables) for tables in zip(*map(engine.tables, range(3)), strict=True))
    scores = torch.randint(0, 1000, (3, MODEL.kv_heads, longest), dtype=torch.int16, device="cuda")
    reselect = (lengths > 0).unsqueeze(1).expand(-1, MODEL.kv_heads).contiguous()
    scored = with_runs(scores, lengths, latest)
    fetch_list = layer.update_resident(scored, reselect, Batch(lengths, blocks, pages), latest)
    rows = round(NEW_ROWS * k)
    assert fetch_list.counts.tolist() == [[rows] * MODEL.kv_heads, [0] * MODEL.kv_heads, [0] * MODEL.kv_heads]
    for head in range(MODEL.kv_heads):
        entries = fetch_list.entries[0, head, :rows].long()
        positions = layer.resident.positions[0, head, entries]
        for ascending, below in ((entries, resident), (positions, 1000 - latest)):
            assert (ascending.diff() > 0).all() and 0 <= int(ascending[0]) <= int(ascending[-1]) < below


def test_a_table_is_measured_with_replay() -> None:
    """Through all processes; slots are used by several sequences, and most tokens have no text."""
    server = Server(
        ("ttft/16", "ttft/200", "short", "long", "gaps", "tokens"),
        "--dtype bfloat16 --max-model-len 4096 --max-num-seqs 4 --select-k 64 --resident 128 --kv-size 1GiB",
        MODEL,
    )
    table = Table(**{**vars(TINY), "servers": (server,)})
    default = resolve(ModelConfig(device="cpu"))
    text = text_of(Tokenizer(default.folder, default.vocab_size))
    results: list[Result] = []
    notes = run(table, "cuda", text, table.cases, results)
    assert {case for case, _ in figures(results)} == set(table.cases)
    assert "SYNTHETIC" in notes[0] and "9% of --select-k" in notes[0]
