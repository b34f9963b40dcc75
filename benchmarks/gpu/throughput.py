"""throughput/32k: tokens per second of as many sequences of 32K as the arena holds, with the default cache.

At every step each head selects and takes 9 % of k new rows. In each result the value is CLO's rate, and the
reference is the rate of what the case names:

- throughput/32k: the floor of full attention whose KV never left the GPU, at the largest batch that fits;
- .../gate.9: the same floor, where a random half of the heads selects at a step, as real queries do at a gate
  of 0.9, and takes half as many rows again;
- .../transformers-dynamic and -offloaded: transformers' decode with its KV on the GPU, and in CPU memory.
"""

import torch
from torch import Tensor

from benchmarks.gpu.baseline import decode_rates, release
from benchmarks.gpu.ceilings import full_attention
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.step import CONFIG, CONTEXT, MAX_TOKENS, SELECTED, step_seconds
from benchmarks.gpu.synthetic import (
    LLAMA_8B,
    QWEN_14B,
    Model,
    ReplayLayer,
    arena_of,
    filled_engine,
    random_decoder,
    replay,
)
from benchmarks.result import Result
from clo.gpu_worker.cache.batch import Batch

ARENA_GIB = 98
_NEW = 0.09  # of k
_NEW_GATED = 0.135  # of k
_OFFLOADED_BYTES = 8 * 2**30  # of KV in CPU memory beside the arena; PCIe bound, so more would be no faster


def measure(machine: Machine) -> list[Result]:
    return [
        *_compare(machine, LLAMA_8B, "throughput/32k"),
        *_compare(machine, QWEN_14B, "throughput/32k/qwen2.5-14b"),
    ]


def _compare(machine: Machine, model: Model, case: str) -> list[Result]:
    shape = model.shape
    sequences = ARENA_GIB * 2**30 // (-(-MAX_TOKENS // shape.block_tokens) * shape.block_bytes)
    held, floor = full_attention(model, CONTEXT, machine.hbm)
    every, gated = _rates(machine, model, sequences)
    release()
    on_gpu = 1 << held.bit_length() - 1
    offloaded = _OFFLOADED_BYTES // (CONTEXT * shape.token_bytes)
    dynamic_rate, offloaded_rate = decode_rates(model, CONTEXT, on_gpu, offloaded)
    release()

    def result(name: str, rate: float, batch: int, reference: float) -> Result:
        metric = f"{sequences} sequences against {batch}"
        return Result(case + name, metric, rate, "tokens/s", reference, rate / reference)

    return [
        result("", every, held, floor),
        result("/gate.9", gated, held, floor),
        result("/transformers-dynamic", every, on_gpu, dynamic_rate),
        result("/transformers-offloaded", every, offloaded, offloaded_rate),
    ]


def _rates(machine: Machine, model: Model, sequences: int) -> tuple[float, float]:
    """Tokens per second of CLO where every head selects at every step, and where half of them do."""
    arena = arena_of(machine.memory, model.shape, sequences, MAX_TOKENS)
    decoder = random_decoder(model)

    def rate(layer_type: type[ReplayLayer], new: float) -> float:
        engine = filled_engine(
            decoder, arena, CONFIG, sequences, CONTEXT - 300, MAX_TOKENS, layer_type=layer_type
        )
        replay(engine, round(SELECTED * new))
        return sequences / step_seconds(engine, sequences)

    every = rate(ReplayLayer, _NEW)
    release()
    return every, rate(_half_selecting(model.layers), _NEW_GATED)


def _half_selecting(layers: int) -> type[ReplayLayer]:
    """Layers in which a random half of the heads selects, drawn anew for every step. The gate does its work
    all the same.

    Args:
        layers: of the model, each of which selects once a step.
    """
    drawn: list[Tensor] = []  # of the layers to come, the last one first

    class HalfLayer(ReplayLayer):
        def gate(self, query: Tensor, batch: Batch) -> Tensor:
            reselect = super().gate(query, batch)
            if not drawn:  # once for all layers, so that drawing costs next to nothing
                drawn.extend(torch.rand(layers, *reselect.shape, device=reselect.device) < 0.5)
            return drawn.pop()

    return HalfLayer
