"""real/smollm2, real/smollm2-32k: a real model, real prompts and what it really fetches, beside transformers.

The first is the default model over prompts of 6,000 tokens, the second the one that ``benchmarks.long_model``
wrote into the folder ``CLO_LONG_MODEL``, over 32,000. The prompts are items of ``benchmarks.tasks``, no two
alike, and the engine prefills each.

- decode: greedy, by graphs, as a worker does it: a step is launched before the last one's tokens are read.
  The reference is transformers on the same GPU, eager, its ``DynamicCache`` filled with the rows of the same
  prompts, at the largest batch up to this one that fits.
- KL and right answers: 256 tokens of every sequence of the largest batch, all but the first of them
  teacher-forced by decode steps. Both are measured against full attention by transformers, and the intervals
  of the KL are those of ``benchmarks.quality``. The reference of the KL is that of the engine's own prefill
  of the same tokens: both attend to everything then, and what is left is rounding to bfloat16. The KL
  contains up to as much of it (``benchmarks.closeness_gap``), which that of a float32 run does not.
"""

import os
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.gpu.baseline import release
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import arena_of
from benchmarks.quality.metrics import blocks, divergences, estimate
from benchmarks.result import Result
from benchmarks.tasks import KINDS, Item, documents, make_item
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import prefill, wait_for
from clo.gpu_worker.model.decoder import load_decoder
from clo.kernels.blocks import gather_tokens
from clo.runtime.config import CacheConfig, ModelConfig, ResolvedModel
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import CacheStats, Text

ARENA_GIB = 46
FORCED = 256  # tokens
STEPS, TRANSFORMERS_STEPS = 64, 12


@dataclass(frozen=True)
class Case:
    """A model and what it is asked. ``batches`` ascend."""

    name: str
    model: ModelConfig
    config: CacheConfig
    prompt: int  # tokens
    batches: tuple[int, ...]

    @property
    def max_tokens(self) -> int:
        """Of a sequence that takes part in all that is measured."""
        return self.prompt + FORCED + len(self.batches) * (STEPS + 1)


def measure(machine: Machine) -> list[Result]:
    default = ModelConfig(dtype="bfloat16")
    results = measure_case(machine, Case("real/smollm2", default, CacheConfig(), 6000, (1, 8, 64)))
    folder = os.environ.get("CLO_LONG_MODEL")
    if folder is None:
        print("CLO_LONG_MODEL is not set: real/smollm2-32k is left out", file=sys.stderr)
        return results
    release()
    long = ModelConfig(model=folder, dtype="bfloat16")
    return results + measure_case(machine, Case("real/smollm2-32k", long, CacheConfig(), 32000, (1, 16, 64)))


def measure_case(machine: Machine, case: Case) -> list[Result]:
    resolved = resolve(case.model)
    items = items_of(case, resolved)
    decoder = load_decoder(resolved)
    # One sequence more than decodes: `prefill` leaves out block 0, and `prefilled` wants blocks of its own.
    arena = arena_of(machine.memory, decoder.shape, len(items) + 1, case.max_tokens)
    engine = Engine(decoder, arena, case.config, len(items), case.max_tokens)
    engine.capture(case.batches)
    network = AutoModelForCausalLM.from_pretrained(resolved.folder, dtype=decoder.shape.dtype)
    network.to(decoder.device).eval()

    full = [full_logits(network, item) for item in items]
    rounding = [
        float(divergences([logits], [prefilled(engine, arena, item)]).mean())
        for item, logits in zip(items, full, strict=True)
    ]
    began = time.perf_counter()
    for slot, item in enumerate(items):
        start(engine, case, slot, item)
    rate = len(items) * case.prompt / (time.perf_counter() - began)
    results = [Result(case.name, "prefill", rate, "tokens/s")]
    forced = teacher_forced(engine, case, items)
    results += judge(items, full, forced, rounding, case.name)
    del full, forced

    steps = {batch: decode(engine, case, batch) for batch in case.batches}
    fitting = 0.0
    for batch, (seconds, stats) in steps.items():
        fitting = transformers_rate(network, case, arena, items[:batch]) or fitting
        name, rate = f"{case.name}/{batch}", batch / seconds
        results += [
            Result(name, "decode", rate, "tokens/s", fitting, rate / fitting),
            Result(name, "hit rate", stats.hit_rate, "of selected rows"),
            Result(name, "fetched", stats.rows_per_step_and_head, "rows per step and head"),
        ]
    return results


def items_of(case: Case, resolved: ResolvedModel) -> list[Item]:
    """One item for each sequence of the largest batch: kinds and documents in turn."""
    tokenizer = Tokenizer(resolved.folder, resolved.vocab_size)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**9, continues=True)

    texts = documents(encode)
    return [
        make_item(KINDS[number % len(KINDS)], texts[number % len(texts)], case.prompt, number, encode)
        for number in range(case.batches[-1])
    ]


@torch.inference_mode()
def full_logits(network: Any, item: Item) -> Tensor:
    """Logits [FORCED - 1, vocab] float32 that predict an answer but for its first token, by one pass of
    transformers over all tokens."""
    tokens = torch.tensor([item.prompt + item.answer[: FORCED - 1]], device=network.device)
    logits: Tensor = network(tokens, use_cache=False, logits_to_keep=FORCED - 1).logits[0].float()
    return logits


@torch.inference_mode()
def prefilled(engine: Engine, arena: Tensor, item: Item) -> Tensor:
    """The same by the engine's prefill, in slot 0, which must not be in use."""
    blocks = len(arena)
    own = [0, *range(blocks - engine.max_blocks + 1, blocks)]
    work = engine.prefill(0, item.prompt + item.answer[: FORCED - 1], own, last=FORCED - 1)
    while (logits := work.advance()) is None:
        pass
    engine.cache.join_prompts()
    return logits


def start(engine: Engine, case: Case, slot: int, item: Item) -> None:
    """Prefill a slot, which decodes from now on."""
    wait_for(engine, engine.start([slot], prefill(engine, slot, item.prompt, case.max_tokens)))


@torch.inference_mode()
def teacher_forced(engine: Engine, case: Case, items: list[Item]) -> Tensor:
    """Logits [items, FORCED - 1, vocab] that predict the answers but for their first tokens, by decode steps
    of all slots together."""
    device, slots = engine.decoder.device, list(range(len(items)))
    answers = torch.tensor([item.answer[:FORCED] for item in items], device=device)
    logits = torch.empty(len(items), FORCED - 1, engine.decoder.vocab, device=device)
    for token in range(FORCED - 1):
        engine.feed(slice(len(items)), answers[:, token])
        logits[:, token] = engine.step(slots, case.max_tokens).logits[: len(items)]
    return logits


def judge(
    items: list[Item], full: list[Tensor], forced: Tensor, rounding: list[float], name: str
) -> list[Result]:
    """KL and right answers of each kind.

    Args:
        full, forced: logits [FORCED - 1, vocab] of each item; rounding: the KL that each has without a cache.
        name: of the case.
    """
    results = []
    for number, kind in enumerate(KINDS):
        own, case = slice(number, None, len(KINDS)), f"{name}/{kind}"  # as ``items_of`` lays them out
        loss, least = estimate(blocks(divergences(full[own], forced[own]))), mean(rounding[own])
        results += [
            Result(case, "KL(full || CLO)", loss.value, "nats", least, loss.value / least),
            Result(case, "KL(full || CLO), 95% low", loss.low, "nats"),
            Result(case, "KL(full || CLO), 95% high", loss.high, "nats"),
        ]
        if kind != "text":
            right, best = (
                mean(share_right(item, logits) for item, logits in zip(items[own], said, strict=True))
                for said in (forced[own], full[own])
            )
            ratio = right / best if best else None
            results.append(Result(case, "right", right, "of answer tokens", best, ratio))
    return results


def share_right(item: Item, logits: Tensor) -> float:
    """Share of the scored tokens that are the most likely ones by the logits [FORCED - 1, vocab]."""
    right = logits.argmax(-1).cpu() == torch.tensor(item.answer[1:FORCED])
    return float(right[torch.tensor(item.scored[1:FORCED])].float().mean())


@torch.inference_mode()
def decode(engine: Engine, case: Case, batch: int) -> tuple[float, CacheStats]:
    """Seconds of the median step of the first slots, and what the cache did for them; the others stand still,
    since the graph of a batch leaves them out."""
    slots = list(range(batch))
    for slot in slots:
        engine.cache.reset_counters(slot)
    handle, times = engine.step(slots, case.max_tokens), []
    for _ in range(STEPS):
        following = engine.step(slots, case.max_tokens)
        wait_for(engine, handle)
        times.append(time.perf_counter())
        handle = following
    wait_for(engine, handle)
    counters = torch.stack([engine.cache.counters(slot) for slot in slots]).sum(0).tolist()
    stats = engine.cache.stats(counters, case.prompt, batch * (STEPS + 1))
    return median(after - before for before, after in pairwise(times)), stats


@torch.inference_mode()
def transformers_rate(network: Any, case: Case, arena: Tensor, items: list[Item]) -> float | None:
    """Tokens per second of transformers' median step; None where the KV does not fit.

    Args:
        arena: the blocks of the sequences follow each other from block 1 on.
    """
    release()
    cache = DynamicCache(config=network.config)
    pages = -(-case.max_tokens // arena.shape[3])
    block_table = torch.arange(1, 1 + len(items) * pages, device=arena.device).view(len(items), pages)
    held = case.prompt - TRANSFORMERS_STEPS  # so that the prompts are complete at the end
    times = []
    try:
        for layer in range(arena.shape[1]):
            rows = gather_tokens(arena[:, layer], block_table)[:, :, :held]
            cache.update(*rows.unbind(3), layer)
        tokens = torch.tensor([[item.prompt[held]] for item in items], device=network.device)
        for _ in range(TRANSFORMERS_STEPS):
            began = time.perf_counter()
            tokens = network(tokens, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    except torch.OutOfMemoryError:
        return None
    return len(items) / median(times)
