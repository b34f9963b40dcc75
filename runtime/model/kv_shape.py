"""The few numbers that the cache has to know of a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clo.runtime.wire.errors import ConfigError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The types in which weights and rows can be held."""

_BLOCK_LAYER_BYTES = 2 * 2**20  # one layer's part of a block: large enough for full PCIe speed
_BLOCK_TOKENS = (64, 512)
_CODES_ALIGNED = 128  # bytes: the rows of the next block begin where bulk copies like it


@dataclass(frozen=True)
class LayerSpec:
    """What a layer is. ``window`` is the number of latest tokens that it attends to, None for all."""

    window: int | None = None


@dataclass(frozen=True)
class KVShape:
    """Shape of a model's KV cache. A row is one token of one KV head: K then V, contiguous.

    Attributes:
        dtype_name: one of ``ITEM_BYTES``.
        codes: whether a block in the arena has the codes of its rows behind them.
        whole_heads: KV heads of the model, where this is the share of a rank; None where it is all of it.
        ranks: among which the model's query heads are divided. Hidden states are whole at each of them.
    """

    specs: tuple[LayerSpec, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype_name: str
    codes: bool = False
    whole_heads: int | None = None
    ranks: int = 1

    @property
    def dtype(self) -> "torch.dtype":
        """The type as PyTorch knows it."""
        import torch  # here, because the launcher needs none

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def layers(self) -> int:
        return len(self.specs)

    @property
    def all_heads(self) -> int:
        """KV heads of the model, of all ranks together; one that several of them have counts once."""
        return self.whole_heads or self.kv_heads

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def width_bytes(self) -> int:
        """Bytes of a token's queries, of these heads."""
        return self.query_heads * self.head_dim * ITEM_BYTES[self.dtype_name]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a token's hidden states, about: as wide as the queries of all ranks."""
        return self.ranks * self.width_bytes

    @property
    def row_bytes(self) -> int:
        return 2 * self.head_dim * ITEM_BYTES[self.dtype_name]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV over all layers and heads."""
        return self.layers * self.kv_heads * self.row_bytes

    @property
    def block_tokens(self) -> int:
        """Tokens of a block: a power of two so that one layer's part, of all ranks together, is about 2 MiB,
        within 64 to 512."""
        smallest, largest = _BLOCK_TOKENS
        fitting = _BLOCK_LAYER_BYTES // (self.all_heads * self.row_bytes)
        return max(smallest, min(largest, 1 << max(0, fitting.bit_length() - 1)))

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one layer and KV head of a block in the arena: of its keys and values, 2 bits
        an entry, with a scale for each and the keys' centre (``clo.kernels.copy_codes``); 0 without them."""
        if not self.codes:
            return 0
        keys, values = self.head_dim // 4 + 2, 16 * -(-self.head_dim // 64) + 2
        size = self.block_tokens * (keys + values) + 4 * self.head_dim
        return -(-size // _CODES_ALIGNED) * _CODES_ALIGNED

    @property
    def part_bytes(self) -> int:
        """Bytes of one layer and KV head of a block."""
        return self.block_tokens * self.row_bytes + self.code_bytes

    @property
    def block_bytes(self) -> int:
        return self.layers * self.kv_heads * self.part_bytes


def kv_shape(config: Any, dtype: str, *, codes: bool = False) -> KVShape:
    """Shape of the KV cache of a model whose weights are held in ``dtype``, in the arena with ``codes`` or
    without.

    Args:
        config: an ``Architecture``, or a configuration of transformers.

    Raises:
        ConfigError: CLO does not know that type.
    """
    if dtype not in ITEM_BYTES:
        raise ConfigError(
            f"The model is of the type {dtype}; CLO takes {', '.join(ITEM_BYTES)}, see --dtype."
        )
    return KVShape(
        specs=layer_specs(config),
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype_name=dtype,
        codes=codes,
    )


def layer_specs(config: Any) -> tuple[LayerSpec, ...]:
    """What each layer of a model is."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if config.model_type == "mistral":  # its layers all slide where there is a window at all
        kinds = ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    return tuple(LayerSpec(window if kind == "sliding_attention" else None) for kind in kinds)
