"""``benchmarks.serve``: its figures, from scripted streams and from a real server."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from inspect import signature
from pathlib import Path

import psutil
import pytest
from transformers import AutoConfig

from benchmarks.gpu.synthetic import LLAMA_8B, ReplayLayer
from benchmarks.result import Result
from benchmarks.serve.__main__ import chosen, run
from benchmarks.serve.cases import Bench, cases_of
from benchmarks.serve.endpoint import EndpointError
from benchmarks.serve.prompts import Prompts, text_of
from benchmarks.serve.server import serving, write_model
from benchmarks.serve.tables import CPU, GPU, REFERENCE_NOTE, Load, Server, Table
from benchmarks.serve.traces import Trace, gaps, percentile, rate_from_first, rate_of_all, seconds
from benchmarks.serve.worker import ReplayEngine
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import GREEDY, make_arena
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.model.model_config import kv_shape, read_config
from clo.runtime.tokenizer import Tokenizer
from tests.conftest import VOCABULARY


async def scripted(clock: list[float], script: list[tuple[float, int]]) -> AsyncIterator[int]:
    """Numbers of tokens, each at its moment."""
    for moment, count in script:
        clock[0] = moment
        yield count


@pytest.fixture
def trace_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trace]:
    """``trace_of(sent, (moment, tokens), ...)``: what a trace makes of a stream."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def follow(sent: float, *script: tuple[float, int]) -> Trace:
        trace = Trace(sent)
        asyncio.run(trace.follow(scripted(clock, list(script))))
        return trace

    return follow


def test_figures_of_one_stream(trace_of: Callable[..., Trace]) -> None:
    """Messages without a token, as the end of a text is one, are no arrivals; tokens together are one."""
    trace = trace_of(10.0, (12.0, 0), (12.5, 1), (12.75, 1), (14.0, 3), (14.5, 0))
    assert (trace.ttft, trace.first, trace.last, trace.tokens) == (2.5, 12.5, 14.0, 5)
    assert gaps([trace]) == [0.25, 1.25]
    assert [trace.by(moment) for moment in (12.0, 12.5, 13.9, 14.0, 99.0)] == [0, 1, 2, 5, 5]
    assert Trace(0.0).tokens == 0


def test_gaps_within_a_stretch_of_time(trace_of: Callable[..., Trace]) -> None:
    """A stall counts also where only a part of it lies within, but not where it only touches an end."""
    first = trace_of(0.0, (1.0, 1), (2.0, 1), (5.0, 1), (6.0, 1))
    second = trace_of(0.0, (1.5, 1), (9.0, 1))
    assert gaps([first, second], 3.0, 4.0) == [3.0, 7.5]
    assert gaps([first], 2.0, 5.0) == [3.0]
    assert gaps([first], 6.0, 7.0) == []


def test_rates_of_several_streams(trace_of: Callable[..., Trace]) -> None:
    first = trace_of(0.0, (1.0, 1), (2.0, 1), (3.0, 2), (4.0, 1))
    second = trace_of(0.5, (2.0, 1), (3.0, 1), (6.0, 4))
    assert seconds([first, second]) == 6.0
    assert rate_from_first([first, second]) == 11 / 5.0
    assert rate_of_all([first, second]) == (3 + 1) / 2.0, "from 2.0, which is no longer counted, to 4.0"
    assert rate_of_all([first, trace_of(3.0, (4.0, 1), (5.0, 1))]) is None


def test_percentiles_against_their_definition() -> None:
    rng = random.Random(5)
    values = [rng.random() for _ in range(101)]
    assert percentile(values, 99) == sorted(values)[99]
    assert percentile(values, 50) == sorted(values)[50]
    assert percentile([4.0], 99) == 4.0


def test_no_two_prompts_begin_alike() -> None:
    text = random.Random(3).sample(range(10_000), 500)
    prompts = Prompts(text)
    taken = [prompt for count in (1, 7, 3) for prompt in prompts.take(count, 600)]
    assert len({prompt[0] for prompt in taken}) == 11
    for prompt in taken:
        start = text.index(prompt[0])
        assert prompt == (text[start:] + text + text)[:600]
    again = Prompts(text)
    assert again.take(1, 600) + again.take(10, 600) == taken, "every run asks the same"


class Blocking:
    """An endpoint that answers one token at a time, and lets all others wait while it reads a long prompt."""

    def __init__(self, stall: float, longest: int = 10**9) -> None:
        self._stall, self._longest = stall, longest
        self._free = asyncio.Event()
        self._free.set()
        self.cancelled = 0

    async def stream(self, prompt: list[int], tokens: int) -> AsyncIterator[int]:
        try:
            if len(prompt) > 100:
                self._free.clear()
                await asyncio.sleep(self._stall)
                self._free.set()
            for _ in range(min(tokens, self._longest)):
                await self._free.wait()
                yield 1
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


TINY = Table(
    warm=Load(1, 8, 2),
    ttft={"16": Load(3, 16, 1), "200": Load(1, 200, 1)},
    short=Load(4, 8, 6),
    long=Load(2, 200, 4),
    many=Load(4, 8, 6),
    beside=Load(2, 20, 3000),
    tokens=Load(3, 8, 40),
    streams=Load(3, 10, 3000),
    quiet=8,
    arriving="200",
    servers=(),
    reference={"short": 50.0},
)


def figures(results: list[Result]) -> dict[tuple[str, str], Result]:
    return {(result.case.removeprefix("serve/"), result.metric): result for result in results}


def test_a_stall_of_all_streams_is_seen_whole() -> None:
    """Also its end, which comes after the first token of the prompt that caused it."""
    stall = 0.3

    async def measure() -> tuple[Blocking, list[Result]]:
        endpoint = Blocking(stall)
        bench = Bench(endpoint, Prompts(list(range(500))), TINY)
        return endpoint, await cases_of(TINY)["gaps"](bench)

    endpoint, results = asyncio.run(measure())
    found = figures(results)
    assert found["gaps", "gap p99 beside a prompt"].value >= stall * 1e3
    quiet = found["gaps", "gap p50"].value
    assert found["gaps", "gap p99 beside a prompt"].reference == quiet < stall * 1e3
    assert found["gaps", "TTFT beside streams"].value >= stall
    assert endpoint.cancelled == 3, "streams that nobody reads any more are ended"


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("short", "ended after 5 of 6 tokens"),
        ("mixed", "ended (after 5 of 6 tokens|before the short ones)"),
        ("gaps", "ended while it was needed"),
    ],
)
def test_an_answer_that_ends_early_is_an_error(case: str, sentence: str) -> None:
    async def measure() -> None:
        bench = Bench(Blocking(0.0, longest=5), Prompts(list(range(500))), TINY)
        await cases_of(TINY)[case](bench)

    with pytest.raises(EndpointError, match=sentence):
        asyncio.run(measure())


def test_an_error_of_one_request_ends_the_others() -> None:
    class Failing(Blocking):
        failed = False

        async def stream(self, prompt: list[int], tokens: int) -> AsyncIterator[int]:
            if not self.failed:
                self.failed = True
                raise EndpointError("it is gone")
            async for count in super().stream(prompt, tokens):
                yield count

    async def measure() -> Failing:
        endpoint = Failing(0.0)
        with pytest.raises(EndpointError, match="it is gone"):
            await Bench(endpoint, Prompts(list(range(500))), TINY).ask(Load(4, 8, 10**6))
        assert len(asyncio.all_tasks()) == 1
        return endpoint

    assert asyncio.run(measure()).cancelled == 3


@pytest.mark.parametrize("table", [GPU, CPU])
def test_the_tables_fit_their_servers(table: Table) -> None:
    """Every case is measured once, and its server can hold what it is asked."""
    assert sorted(table.cases) == sorted(cases_of(table))
    assert table.arriving in table.ttft
    assert set(table.reference) <= set(table.cases)
    arriving = table.ttft[table.arriving]
    for server in table.servers:
        options = dict(zip(server.options.split()[::2], server.options.split()[1::2], strict=True))
        loads = {"short": [table.short], "long": [table.long], "tokens": [table.tokens]}
        loads |= {f"ttft/{name}": [load] for name, load in table.ttft.items()}
        loads["mixed"] = [table.many, table.beside]
        loads["gaps"] = [table.streams, arriving._replace(requests=1)]
        asked = [load for case in server.cases for load in loads[case]]
        assert max(load.prompt + load.output for load in asked) <= int(options["--max-model-len"])
        together = max(
            (sum(load.requests for load in loads[case]) for case in server.cases if "/" not in case),
            default=1,
        )
        if "gaps" in server.cases:
            assert table.streams.requests < int(options["--max-num-seqs"])
        if table is GPU and server.model is not None:  # all at once, as the references have it
            assert together <= int(options["--max-num-seqs"])
            shape = server.model.shape
            held = [
                sum(
                    load.requests * -(-(load.prompt + load.output) // shape.block_tokens)
                    for load in loads[case]
                )
                for case in server.cases
                if "/" not in case
            ]
            assert (
                max(held, default=0) * shape.block_bytes
                <= int(options["--kv-size"].removesuffix("GiB")) * 2**30
            )


def test_the_engine_that_replays_takes_what_a_worker_gives_it() -> None:
    given = set(signature(Engine).parameters) - {"sources", "layer_type"}
    assert set(signature(ReplayEngine).parameters) == given


def test_cases_are_chosen_by_name_and_by_group() -> None:
    assert chosen(GPU, []) == GPU.cases
    assert chosen(GPU, ["tokens", "ttft/32k"]) == ["ttft/32k", "tokens"], "in the order of the table"
    assert chosen(GPU, ["ttft"]) == [f"ttft/{name}" for name in ("512", "32k", "128k", "128k/sparse")]
    for name in ("ttft/", "32k", "longest"):
        with pytest.raises(ValueError, match=f"there is no case {name}, only ttft/512, "):
            chosen(GPU, ["short", name])


def test_a_table_is_measured_on_a_real_server(tiny_model: Path) -> None:
    """Every case gives its figures, and all processes are gone at the end."""
    options = f"--model {tiny_model} --max-model-len 4096 --max-num-seqs 4 --kv-size 64MiB"
    server = Server(("ttft/16", "ttft/200", "short", "long", "gaps", "tokens"), options)
    table = Table(**{**vars(TINY), "servers": (server,)})
    text = text_of(Tokenizer(tiny_model, VOCABULARY))
    results: list[Result] = []
    notes = run(table, "cpu", text, table.cases, results)
    found = figures(results)
    assert next(case for case, _ in found) == "ttft/16"
    for case in ("short", "long", "tokens"):
        assert found[case, "TTFT p50"].value <= found[case, "TTFT p99"].value
        assert 0 <= found[case, "gap p50"].value <= found[case, "gap p99"].value
    rate = found["short", "rate"]
    assert rate.reference == 50.0 and rate.ratio == rate.value / 50.0
    assert found["long", "time"].reference is None
    assert found["tokens", "rate, first to last"].value > 0
    for process in ("router", "client"):
        assert found["tokens", f"{process} CPU"].value > 0
    assert found["gaps", "TTFT beside streams"].reference == found["ttft/200", "TTFT, median"].value
    assert notes == [server.note, REFERENCE_NOTE]
    assert options in server.note and "SYNTHETIC" not in server.note
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in left if any(str(tiny_model) in word for word in command or [])]


def test_a_server_that_does_not_start(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EndpointError, match="did not start"), serving(Server((), "--model /nowhere"), "cpu"):
        pass
    assert "error: --model /nowhere" in capfd.readouterr().err


def test_the_written_model_has_the_shape_that_it_stands_for(tmp_path: Path, smollm2: Path) -> None:
    """Its vocabulary is larger than its tokenizer's, whose text is what prompts are cut from."""
    write_model(LLAMA_8B, tmp_path)
    config = read_config(tmp_path)
    assert kv_shape(config, "bfloat16") == LLAMA_8B.shape
    assert (config.hidden_size, config.intermediate_size) == (LLAMA_8B.hidden, LLAMA_8B.intermediate)
    assert config.vocab_size == LLAMA_8B.vocab
    resolved = resolve(ModelConfig(str(tmp_path), "dummy", "cpu", "bfloat16", 135168))
    text = text_of(Tokenizer(resolved.folder, resolved.vocab_size))
    assert len(text) > 50_000
    assert max(text) < AutoConfig.from_pretrained(smollm2).vocab_size


def test_a_slot_of_the_replaying_engine_forgets_its_last_sequence(tiny_model: Path) -> None:
    """What the former one used may be later than anything in the next one, which the choice of rows on a GPU
    does not expect."""
    decoder = load_decoder(resolve(ModelConfig(str(tiny_model), device="cpu")))
    config, slots, longest = CacheConfig(select_k=16, resident=32), 3, 256
    engine = ReplayEngine(decoder, make_arena(decoder, slots, longest), config, slots, longest)
    layers = [layer for layer in engine.cache.layers if isinstance(layer, ReplayLayer)]
    assert len(layers) == decoder.shape.layers
    sets = [layer._own[-1] for layer in layers]
    for own in sets:
        own.last_used.fill_(200)
    engine.activate(1, 20, GREEDY, 0)
    for own in sets:
        assert own.last_used[1].eq(-1).all()
        assert own.last_used[0].eq(200).all() and own.last_used[2].eq(200).all()
