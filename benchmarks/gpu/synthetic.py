"""Engines of the shape of known models, with random weights and rows: for speed, never for quality."""

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.layer import LayerCache
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.group import Group
from clo.gpu_worker.in_process import GREEDY
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.model.weights import Layer, Linear, Weights
from clo.kernels.launch import launch
from clo.kernels.limits import CODES_PER_BYTE, RUN
from clo.kernels.resident import ResidentSet
from clo.kernels.score import Scores
from clo.kernels.update_resident import FetchList, update_resident
from clo.kvstore.layout import by_block
from clo.runtime.config import CacheConfig
from clo.runtime.model.kv_shape import KVShape, LayerSpec
from clo.runtime.model.ranks import Rank

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
    qk_norm: bool = False

    def share(self, rank: Rank) -> "Model":
        """What a rank computes of it; its heads are those of its share."""
        own = rank.shape(self.shape)
        return replace(
            self, query_heads=own.query_heads, kv_heads=own.kv_heads,
            intermediate=self.intermediate // rank.count, vocab=self.vocab // rank.count,
        )  # fmt: skip

    @property
    def shape(self) -> KVShape:
        return KVShape(
            (LayerSpec(),) * self.layers, self.query_heads, self.kv_heads, self.head_dim, "bfloat16"
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

    @property
    def bytes_read(self) -> int:
        """Of these, by a decode step: all but the embedding."""
        return self.weight_bytes - 2 * self.vocab * self.hidden


LLAMA_8B = Model("llama-3-8b", 32, 32, 8, 4096, 14336, 128256)
QWEN_HALF_B = Model("qwen2.5-0.5b", 24, 14, 2, 896, 4864, 151936, head_dim=64, qkv_bias=True)
QWEN_7B = Model("qwen2.5-7b", 28, 28, 4, 3584, 18944, 152064, qkv_bias=True)
QWEN_14B = Model("qwen2.5-14b", 48, 40, 8, 5120, 13824, 152064, qkv_bias=True)
QWEN3_32B = Model("qwen3-32b", 64, 64, 8, 5120, 25600, 151936, qk_norm=True)


def random_weights(model: Model) -> Weights:
    """Random bfloat16 weights on the GPU."""

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0.0, 0.02)

    def ones() -> Tensor:
        return torch.ones(model.hidden, dtype=torch.bfloat16, device="cuda")

    def layer() -> Layer:
        products = {name: Linear(random(*size), None) for name, size in model.matrices.items()}
        if model.qkv_bias:
            products["qkv"] = Linear(products["qkv"].weight, random(len(products["qkv"].weight)))
        heads = model.query_heads + 2 * model.kv_heads
        qk_norm = torch.ones(heads, model.head_dim, dtype=torch.bfloat16, device="cuda")
        return Layer(
            ones(), products["qkv"], qk_norm if model.qk_norm else None, products["output"], ones(),
            products["gate_up"], products["down"],
        )  # fmt: skip

    frequencies = 5e5 ** -(torch.arange(0, model.head_dim, 2, device="cuda") / model.head_dim)
    return Weights(
        embedding=random(model.vocab, model.hidden),
        layers=tuple(layer() for _ in range(model.layers)),
        norm=ones(),
        head=random(model.vocab, model.hidden),
        rope_frequencies=frequencies,
        rope_scale=1.0,
    )


def random_decoder(model: Model, group: Group | None = None) -> Decoder:
    """A decoder on the GPU with random bfloat16 weights, or this rank's share of one."""
    if group is None:
        return Decoder(random_weights(model), model.shape, 1e-5)
    weights = random_weights(model.share(group.rank))
    return Decoder(weights, group.rank.shape(model.shape), 1e-5, group, model.vocab)


def arena_of(memory: Tensor, shape: KVShape, sequences: int, tokens: int) -> Tensor:
    """An arena for so many sequences, cut from pinned memory [bytes] as the GPU sees it."""
    blocks = sequences * -(-tokens // shape.block_tokens)
    order = (shape.layers, shape.kv_heads, blocks, shape.block_tokens, 2, shape.head_dim)
    return by_block(memory[: blocks * shape.block_bytes].view(shape.dtype).view(order))


class ReplayLayer(LayerCache):
    """Fetches a given number of rows in place of those that its random query would choose.

    The choice itself is made all the same, on a set of its own.
    """

    _rows = 0
    _own: tuple[ResidentSet, ...] = ()  # the last one is in use, the others are in graphs captured before

    def replay(self, rows: int, last_used: Tensor) -> None:
        """From now on a head that selects fetches ``rows`` rows, drawn anew for every step.

        Args:
            last_used: [slots, kv_heads, capacity] int32, of the set on which the choice is made.
        """
        self._rows = rows
        positions = self.resident.positions.clone()
        self._own = (*self._own, self.resident._replace(positions=positions, last_used=last_used))

    def update_resident(self, scores: Scores, reselect: Tensor, batch: Batch, latest: int) -> FetchList:
        rows, k, slots = self._rows, self.select_k, len(batch.lengths)
        fetch_list = FetchList(
            torch.empty(*reselect.shape, k, dtype=torch.int32, device="cuda"),
            (torch.empty if rows else torch.zeros)(reselect.shape, dtype=torch.int32, device="cuda"),
        )
        resident, own = self.resident.slots(slots), self._own[-1].slots(slots)
        if rows:  # before the choice, so that fetching begins where it ends
            launch(
                _REPLAY, "replay", (reselect.numel(),), 64,
                [batch.lengths, reselect, next(_calls), rows, resident.kv_heads, k, resident.capacity,
                 resident.sinks, latest, resident.positions, *fetch_list],
            )  # fmt: skip
        tail = None if self.state.tail is None else self.state.tail.slots(slots)
        update_resident(
            scores, reselect, batch.lengths, latest, own, self.state.counters[:slots], k, tail,
            successors=self.successors,
        )  # fmt: skip
        return fetch_list


def replay(engine: Engine, rows: int) -> Tensor:
    """Let all layers, each a ``ReplayLayer``, replay so many rows.

    Returns:
        [layers, slots, kv_heads, capacity] int32, ``last_used`` of the sets on which the layers make their
        own choices. Where a slot gets another sequence it has to become -1, as a prefill makes that of the
        real sets: no row was used later than now.
    """
    last_used = torch.stack([layer.resident.last_used for layer in engine.cache.sparse_layers])
    for layer, own in zip(engine.cache.layers, last_used, strict=True):
        assert isinstance(layer, ReplayLayer)
        layer.replay(rows, own)
    return last_used


def index_bytes_read(engine: Engine, sequences: int, length: int) -> int:
    """Bytes of the index that a decode step cannot do without: the keys' codes, with which heads select, and
    keys' and values' codes of the tail, where there is one."""
    shape = engine.cache.shape
    tails = [layer.state.tail for layer in engine.cache.sparse_layers]
    tokens = sum(tail.runs.shape[2] * RUN for tail in tails if tail is not None) * shape.kv_heads
    row = 2 * (shape.head_dim // CODES_PER_BYTE + 2)
    return sequences * (length * TwoBitIndex.bytes_per_token(shape, values=False) + tokens * row)


def typical_sources(layers: int) -> tuple[QuerySource, ...]:
    """The query that each layer selects with. Random weights predict nothing; these are the layers that fail
    at the start of the default model, which has four more further on."""
    return (QuerySource.OWN,) * 2 + (QuerySource.MIDDLE,) + (QuerySource.INPUT,) * (layers - 3)


def filled_engine(
    decoder: Decoder,
    arena: Tensor,
    config: CacheConfig,
    sequences: int,
    length: int,
    max_tokens: int,
    layer_type: type[ReplayLayer] = ReplayLayer,
    engine_type: type[Engine] = Engine,
) -> Engine:
    """An engine in the midst of decoding: every slot holds ``length`` tokens; all state is random. ``replay``
    has to follow before its first step."""
    sources = typical_sources(decoder.shape.layers)
    engine = engine_type(decoder, arena, config, sequences, max_tokens, sources, layer_type)
    blocks = len(arena) // sequences
    for slot in range(sequences):
        engine.place(slot, list(range(slot * blocks, (slot + 1) * blocks)))
        engine.activate(slot, length, GREEDY, seed=0)
    for layer in engine.cache.sparse_layers:
        index, resident = layer.index, layer.resident
        if isinstance(index, TwoBitIndex):
            index.pages.codes.random_(0, 256)
            index.pages.scales.uniform_(0.5, 1.5)
            index.pages.centres.normal_(0.0, 0.3)
            if index.values is not None:
                index.values.codes.random_(-(2**15), 2**15)
                index.values.scales.uniform_(0.5, 1.5)
        spread = torch.linspace(
            resident.sinks, length - resident.recent - 1, resident.capacity, device="cuda"
        )
        resident.rows.normal_()
        resident.positions[:] = spread.int()
        resident.last_used.random_(length - 300, length)
        layer.state.lse.fill_(8.0)
    return engine
