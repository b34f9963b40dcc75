"""prefill/32k and prefill/128k: one prompt at the Llama-3-8B shape, from its tokens to its last logits;
prefill/128k/sparse and prefill/1m: prompts that attend to chosen blocks.

The floor is what its matrix products and its causal attention take in all layers, at the best rates that
any library reaches in this run. The prefill computes the last layer for the last token alone, which saves
about 3 % of it. How much of the copy to the arena is hidden comes from a second prefill, which does not copy.

Random queries look everywhere alike: which blocks are chosen means nothing, but they are as many as those of
a real prompt. A million tokens are computed in one layer, whose time is multiplied with the layers.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import LLAMA_8B, QWEN_7B, Model, arena_of, random_decoder, random_weights
from benchmarks.result import Result
from clo.gpu_worker.cache.layer import LayerCache
from clo.gpu_worker.cache.prompt import LastTokens, Prompts, one_prompt
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.model.weights import Layer
from clo.gpu_worker.prefill import CHUNK_TOKENS, DENSE, SPARSE, Prefill, PromptAttention
from clo.kernels.attend_prompt import attend_prompt, flash_attention
from clo.kernels.sparse_prompt import attend_prompt_sparse
from clo.runtime.config import CacheConfig

LENGTHS = (32768, 131072)
MILLION = 2**20
ARENA_GIB = 17
CHUNK = 4096  # tokens of a prompt that are computed at a time
_SUSTAINED = (200, 40)  # repeats of products and of attention: half a second or more, so that clocks settle


class WatchedLayer(LayerCache):
    """Which copies prompts to the arena while ``copies`` says so."""

    copies = True

    def store(self, rows: Tensor, prompts: Prompts) -> None:
        if WatchedLayer.copies:
            super().store(rows, prompts)


@torch.inference_mode()
def measure(machine: Machine) -> list[Result]:
    model, room = LLAMA_8B, max(LENGTHS) + 512
    weights = random_weights(model)
    decoder = Decoder(weights, model.shape, 1e-5)
    arena = arena_of(machine.memory, model.shape, 1, room)
    config = CacheConfig()
    engine = Engine(decoder, arena, config, 1, room, layer_type=WatchedLayer)
    prefill(engine, LENGTHS[0])  # compiles
    gemm = gemm_rate(weights.layers[0])
    results = [Result("ceiling", "GEMMs of a prompt", gemm / 1e12, "TFLOP/s")]
    for total in LENGTHS:
        results += measure_prompt(machine, engine, model, total, gemm)
    took = next(result.value for result in reversed(results) if result.metric == "time")
    results += measure_sparse(engine, model, max(LENGTHS), took)
    del engine, decoder, weights
    torch.cuda.empty_cache()
    return results + measure_million(machine)


def measure_sparse(engine: Engine, model: Model, total: int, dense: float) -> list[Result]:
    """One length with sparse attention. dense: seconds without it."""
    shape, scale = model.shape, engine.decoder.scale
    prefill(engine, total, SPARSE)  # compiles
    took = prefill(engine, total, SPARSE)
    rows = torch.randn(total, shape.kv_heads, 2, shape.head_dim, dtype=shape.dtype, device="cuda")
    size = CHUNK_TOKENS["cuda"]
    query = torch.randn(size, shape.query_heads, shape.head_dim, dtype=shape.dtype, device="cuda")
    spent = [
        sum(seconds(partial(attend, query, rows[:end], scale), 3) for end in range(size, total + 1, size))
        for attend in (attend_prompt, attend_prompt_sparse)
    ]
    case = f"prefill/{total // 1024}k/sparse"
    return [
        Result(case, "time", took, "s", dense, took / dense),
        Result(case, "attention", spent[1] * 1e3, "ms/layer", spent[0] * 1e3, spent[1] / spent[0]),
    ]


def measure_million(machine: Machine) -> list[Result]:
    """A million tokens at the Qwen2.5-7B shape, dense and sparse."""
    model, room = replace(QWEN_7B, layers=2), MILLION + 512
    decoder = random_decoder(model)
    arena = arena_of(machine.memory, model.shape, 1, room)
    engine = Engine(decoder, arena, CacheConfig(), 1, room)
    prefill(engine, LENGTHS[0], SPARSE)  # compiles
    dense, sparse = (
        QWEN_7B.layers * layer_seconds(engine, MILLION, attention) for attention in (DENSE, SPARSE)
    )
    return [
        Result("prefill/1m", "time, dense, all layers like the first", dense, "s"),
        Result("prefill/1m", "time, sparse, all layers like the first", sparse, "s", dense, sparse / dense),
    ]


def measure_prompt(machine: Machine, engine: Engine, model: Model, total: int, gemm: float) -> list[Result]:
    """One length. gemm: FLOP/s."""
    case, shape = f"prefill/{total // 1024}k", model.shape
    rows = torch.randn(total, shape.kv_heads, 2, shape.head_dim, dtype=shape.dtype, device="cuda")
    queries = torch.randn(CHUNK, shape.query_heads, shape.head_dim, dtype=shape.dtype, device="cuda")
    engine.place(0, list(range(engine.max_blocks)))
    blocks = list(range(engine.max_blocks))
    prompts = one_prompt(0, total, blocks, *engine.tables(0), shape.block_tokens)
    layer_cache, *_ = engine.cache.sparse_layers
    rates = dict(attention_rates(queries, rows, engine.decoder.scale))
    results = [
        Result("ceiling", f"{name} attention, {total}", rate / 1e12, "TFLOP/s")
        for name, rate in rates.items()
    ]
    attention = max(rates.values())
    alone = seconds(lambda: layer_cache.store(rows, prompts))
    last = LastTokens(queries, torch.zeros(CHUNK, shape.query_heads, device="cuda"))
    indexed = seconds(lambda: layer_cache.index.write_prompts(rows, prompts.blocks))
    filled = seconds(lambda: layer_cache.fill(rows, prompts, last.lse[-1:], last))

    took = prefill(engine, total)
    WatchedLayer.copies = False
    without = prefill(engine, total)
    WatchedLayer.copies = True
    entries = sum(outputs * inputs for outputs, inputs in model.matrices.values())
    width = shape.query_heads * shape.head_dim
    floor = model.layers * (2 * total * entries / gemm + 2 * total**2 * width / attention)
    rate, layer = rows.nbytes / alone, took / model.layers
    return [
        *results,
        Result(case, "time", took, "s", floor, took / floor),
        Result(case, "copy alone", rate / 1e9, "GB/s", machine.to_cpu / 1e9, rate / machine.to_cpu),
        Result(case, "copy hidden", 100 * (1 - (took - without) / (model.layers * alone)), "%"),
        Result(case, "index", indexed * 1e3, "ms/layer", layer * 1e3, indexed / layer),
        Result(case, "first set", filled * 1e3, "ms/layer", layer * 1e3, filled / layer),
    ]


def prefill(engine: Engine, total: int, attention: PromptAttention = DENSE) -> float:
    """Seconds of a prefill, until all of it lies in the arena."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work = begun(engine, total, attention)
    while work.advance() is None:
        pass
    engine.cache.join_prompts()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def layer_seconds(engine: Engine, total: int, attention: PromptAttention) -> float:
    """Seconds of the first layer of a prefill."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work = begun(engine, total, attention)
    begin.record()
    while work.done < total // engine.decoder.shape.layers:
        work.advance()
    engine.cache.join_prompts()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def begun(engine: Engine, total: int, attention: PromptAttention) -> Prefill:
    """A prefill of random tokens in slot 0."""
    decoder = engine.decoder
    tokens = torch.randint(0, decoder.vocab, (total,)).tolist()
    blocks = list(range(-(-total // decoder.shape.block_tokens)))
    engine.place(0, blocks)
    return Prefill(decoder, engine.cache, 0, tokens, blocks, *engine.tables(0), attention=attention)


def gemm_rate(layer: Layer) -> float:
    """FLOP/s of a layer's matrix products over a chunk, one after another."""
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    inputs = {
        size: torch.randn(CHUNK, size, dtype=linears[0].weight.dtype, device="cuda")
        for size in {linear.weight.shape[1] for linear in linears}
    }
    took = seconds(
        lambda: [linear(inputs[linear.weight.shape[1]]) for linear in linears], repeats=_SUSTAINED[0]
    )
    return 2 * CHUNK * sum(linear.weight.numel() for linear in linears) / took


def attention_rates(queries: Tensor, rows: Tensor, scale: float) -> Iterator[tuple[str, float]]:
    """FLOP/s of what attends a chunk's queries [N, query_heads, head_dim] to all rows [T, kv_heads, 2,
    head_dim], none masked, by library."""
    keys, values = rows.permute(2, 1, 0, 3).unsqueeze(1)
    query = queries.transpose(0, 1).unsqueeze(0)
    flops = 4 * queries.numel() * len(rows)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                yield (
                    name,
                    flops
                    / seconds(
                        lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True),
                        _SUSTAINED[1],
                    ),
                )
        except RuntimeError as error:  # it has no plan for every shape and version
            print(f"{name} does not attend: {error}", file=sys.stderr)
    flash = flash_attention()
    if flash is not None:
        arguments = queries[None], rows[None, :, :, 0], rows[None, :, :, 1]
        yield "flash 4", flops / seconds(lambda: flash(*arguments, softmax_scale=scale), _SUSTAINED[1])
