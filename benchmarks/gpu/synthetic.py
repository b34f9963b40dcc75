"""Engines of the shape of known models, with random weights and rows: for speed, never for quality."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from clo.gpu_worker import cache as cache_module
from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.model.decoder import Decoder, Layer, Linear, Weights
from clo.kernels.launch import launch
from clo.kernels.update_resident import FetchList, update_resident
from clo.runtime.config import CacheConfig
from clo.runtime.model.kv_shape import KVShape, LayerSpec

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
        return KVShape(
            (LayerSpec(),) * self.layers, self.query_heads, self.kv_heads, self.head_dim, torch.bfloat16
        )

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
    sources = (
        (QuerySource.OWN,) * 2 + (QuerySource.MIDDLE,) + (QuerySource.INPUT,) * (decoder.shape.layers - 3)
    )
    engine = Engine(decoder, arena, config, sequences, max_tokens, sources)
    cache, index = engine.cache, engine.cache._index
    blocks = torch.arange(len(arena), device="cuda").view(sequences, -1)
    engine._block_table[:, : blocks.shape[1]] = blocks
    if isinstance(index, TwoBitIndex):
        index._codes.random_(0, 256)
        index._scales.uniform_(0.5, 1.5)
        index._centres.normal_(0.0, 0.3)
    capacity = cache._positions[0].shape[2]
    spread = torch.linspace(cache._sinks, length - cache._recent - 1, capacity, device="cuda")
    for rows, positions, last_used in zip(cache._resident, cache._positions, cache._last_used, strict=True):
        rows.normal_()
        positions[:] = spread.int()
        last_used.random_(length - 300, length)
    cache._lse.fill_(8.0)
    engine._lengths[:] = length
    return engine


@contextmanager
def replayed(rows: int) -> Iterator[None]:
    """Within, captured steps fetch ``rows`` rows for a head that selects, drawn anew for every step, in place
    of what their random queries would choose. The choice itself is made all the same, on sets of its own;
    they last as long as the context."""
    sets: dict[int, tuple[Tensor, Tensor]] = {}  # positions and last_used, by the address of the real ones

    def replay(
        keys: Tensor,
        reselect: Tensor,
        lengths: Tensor,
        tail: int,
        positions: Tensor,
        last_used: Tensor,
        counters: Tensor,
        k: int,
    ) -> FetchList:
        fetch_list = FetchList(
            torch.empty(*reselect.shape, k, dtype=torch.int32, device="cuda"),
            (torch.empty if rows else torch.zeros)(reselect.shape, dtype=torch.int32, device="cuda"),
        )
        if rows:  # before the choice, so that fetching begins where it ends
            launch(
                _REPLAY, "replay", (reselect.numel(),), 64,
                [lengths, reselect, next(_calls), rows, reselect.shape[1], k, positions.shape[2], 4, tail, positions,
                 *fetch_list],
            )  # fmt: skip
        if positions.data_ptr() not in sets:
            sets[positions.data_ptr()] = positions.clone(), last_used.clone()
        update_resident(keys, reselect, lengths, tail, *sets[positions.data_ptr()], counters, k)
        return fetch_list

    setattr(cache_module, "update_resident", replay)  # noqa: B010
    try:
        yield
    finally:
        setattr(cache_module, "update_resident", choose)  # noqa: B010
