"""Engines of the shape of known models, with random weights and rows: for speed, never for quality."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker import cache as cache_module
from gpu_worker.engine import Engine
from gpu_worker.index import TwoBitIndex
from gpu_worker.model import Decoder, Layer, Linear, Weights
from gpu_worker.prediction import Source
from gpu_worker.shape import KVShape
from kernels.cuda import launch
from kernels.select import Fresh, choose
from runtime.config import CacheConfig

_REPLAY = str(Path(__file__).with_name("replay.cu").resolve())
_calls = count(1)  # of the replay: no two draw the same rows


@dataclass(frozen=True)
class Model:
    """What decides the speed of a model."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocab: int
    head_dim: int = 128
    qkv_bias: bool = False

    @property
    def shape(self) -> KVShape:
        return KVShape(self.layers, self.query_heads, self.kv_heads, self.head_dim, torch.bfloat16)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the products of one layer."""
        width = self.query_heads * self.head_dim
        return {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "output": (self.hidden, width),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def weight_bytes(self) -> int:
        """In bfloat16, embedding and head apart, without the vectors."""
        layer = sum(outputs * inputs for outputs, inputs in self.matrices.values())
        return 2 * (self.layers * layer + 2 * self.vocab * self.hidden)


LLAMA_8B = Model("llama-3-8b", 32, 32, 8, 4096, 14336, 128256)
QWEN_7B = Model("qwen2.5-7b", 28, 28, 4, 3584, 18944, 152064, qkv_bias=True)
QWEN_14B = Model("qwen2.5-14b", 48, 40, 8, 5120, 13824, 152064, qkv_bias=True)


def random_decoder(model: Model, max_positions: int) -> Decoder:
    """A decoder on the GPU with random bfloat16 weights."""

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, 0.02)

    def ones() -> Tensor:
        return torch.ones(model.hidden, dtype=torch.bfloat16, device="cuda")

    def layer() -> Layer:
        products = {name: Linear(random(*size), None) for name, size in model.matrices.items()}
        if model.qkv_bias:
            products["qkv"] = Linear(products["qkv"].weight, random(len(products["qkv"].weight)))
        return Layer(
            ones(), products["qkv"], None, products["output"], ones(), products["gate_up"], products["down"]
        )

    frequencies = 5e5 ** -(torch.arange(0, model.head_dim, 2, device="cuda") / model.head_dim)
    weights = Weights(
        embedding=random(model.vocab, model.hidden),
        layers=tuple(layer() for _ in range(model.layers)),
        norm=ones(),
        head=random(model.vocab, model.hidden),
        rope_frequencies=frequencies,
        rope_scale=1.0,
    )
    return Decoder(weights, model.shape, 1e-5, max_positions)


def arena_of(memory: Tensor, model: Model, sequences: int, tokens: int) -> Tensor:
    """An arena for so many sequences, cut from pinned memory [bytes] as the GPU sees it."""
    shape = model.shape
    blocks = sequences * -(-tokens // shape.block_tokens)
    layout = (shape.layers, shape.kv_heads, blocks, shape.block_tokens, 2, shape.head_dim)
    size = blocks * shape.block_bytes
    return memory[:size].view(shape.dtype).view(layout).permute(2, 0, 1, 3, 4, 5)


def filled_engine(
    decoder: Decoder, arena: Tensor, config: CacheConfig, sequences: int, length: int, max_tokens: int
) -> Engine:
    """An engine in the midst of decoding: every slot holds ``length`` tokens; all state is random."""
    # Random weights predict nothing. These are the layers that fail at the start of the default model, which
    # has four more further on.
    sources = (Source.OWN,) * 2 + (Source.MIDDLE,) + (Source.INPUT,) * (decoder.shape.layers - 3)
    engine = Engine(decoder, arena, config, sequences, max_tokens, sources)
    cache, index = engine.cache, engine.cache._index
    blocks = torch.arange(len(arena), device="cuda").view(sequences, -1)
    engine._table[:, : blocks.shape[1]] = blocks
    if isinstance(index, TwoBitIndex):
        index._codes.random_(0, 256)
        index._scales.uniform_(0.5, 1.5)
        index._centres.normal_(0.0, 0.3)
    capacity = cache._members[0].shape[2]
    spread = torch.linspace(cache._sinks, length - cache._recent - 1, capacity, device="cuda")
    for rows, members, stamps in zip(cache._resident, cache._members, cache._stamps, strict=True):
        rows.normal_()
        members[:] = spread.int()
        stamps.random_(length - 300, length)
    cache._norms.fill_(8.0)
    engine._lengths[:] = length
    return engine


@contextmanager
def replayed(rows: int) -> Iterator[None]:
    """Within, captured steps fetch ``rows`` rows for a head that selects, drawn anew for every step, in place
    of what their random queries would choose. The choice itself is made all the same, on sets of its own;
    they last as long as the context."""
    sets: dict[int, tuple[Tensor, Tensor]] = {}  # members and stamps, by the address of the real ones

    def replay(
        keys: Tensor,
        miss: Tensor,
        lengths: Tensor,
        tail: int,
        members: Tensor,
        stamps: Tensor,
        tally: Tensor,
        k: int,
    ) -> Fresh:
        fresh = Fresh(
            torch.empty(*miss.shape, k, dtype=torch.int32, device="cuda"),
            (torch.empty if rows else torch.zeros)(miss.shape, dtype=torch.int32, device="cuda"),
        )
        if rows:  # before the choice, so that fetching begins where it ends
            launch(
                _REPLAY, "replay", (miss.numel(),), 64,
                [lengths, miss, next(_calls), rows, miss.shape[1], k, members.shape[2], 4, tail, members,
                 *fresh],
            )  # fmt: skip
        if members.data_ptr() not in sets:
            sets[members.data_ptr()] = members.clone(), stamps.clone()
        choose(keys, miss, lengths, tail, *sets[members.data_ptr()], tally, k)
        return fresh

    setattr(cache_module, "choose", replay)  # noqa: B010
    try:
        yield
    finally:
        setattr(cache_module, "choose", choose)  # noqa: B010
