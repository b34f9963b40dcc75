"""Which models CLO can serve, and what their configuration means for it."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from clo.runtime.model.kv_shape import ITEM_BYTES, KVShape, LayerSpec
from clo.runtime.wire.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYER_TYPES = {"full_attention", "sliding_attention"}
_SCALED = ("factor", "original_max_position_embeddings")
_ROPE = {  # the numbers that each type computes with, and those that it may leave out
    "default": (("rope_theta",), ()),
    "linear": (("rope_theta", "factor"), ()),
    "llama3": (("rope_theta", *_SCALED, "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (
        ("rope_theta", *_SCALED),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}
_COUNTS = (  # transformers takes any whole number for these
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_MOST = 2**31  # for sizes and positions
_FLOAT32_MOST = 3e38


def quiet_transformers() -> None:
    """Let transformers report errors only, and show progress bars only on a terminal."""
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def read_config(folder: Path) -> PreTrainedConfig:
    """The transformers configuration in ``folder``, checked: CLO computes such a model correctly.

    Raises:
        ConfigError: there is none, it is not valid, or it asks for something that CLO does not do.
    """
    path = folder / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no config.json; give a folder in Hugging Face format.") from None
    except (OSError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy the model again.") from None
    family = written.get("model_type") if isinstance(written, dict) else None
    if family not in FAMILIES:
        raise ConfigError(f"{path} is of the model family '{family}'; CLO knows {', '.join(FAMILIES)}.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its work on a wrong value comes upon
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a valid configuration: {reason}.") from None
    _check(config, path)
    return config


def _check(config: Any, path: Path) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "unknown")
        raise ConfigError(
            f"{path} is of a model quantised with '{method}'; CLO takes float32, bfloat16 or float16."
        )
    if config.hidden_act != "silu":
        raise ConfigError(f"{path} has the activation '{config.hidden_act}'; CLO knows silu.")
    for name in _COUNTS:
        if not 1 <= getattr(config, name) < _MOST:
            raise ConfigError(f"{path} has a {name} of {getattr(config, name)}; copy the model again.")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"{path} has {config.num_attention_heads} query heads and {config.num_key_value_heads} KV heads; "
            "the first must be a multiple of the second."
        )
    head_dim = kv_shape(config, "float32").head_dim
    if head_dim < 1 or head_dim % 4:
        raise ConfigError(f"{path} has a head_dim of {head_dim}; the index needs a positive multiple of 4.")
    kinds = getattr(config, "layer_types", None) or []
    if kinds and (len(kinds) != config.num_hidden_layers or not set(kinds) <= LAYER_TYPES):
        raise ConfigError(
            f"{path} has {config.num_hidden_layers} layers and the layer_types {', '.join(map(str, kinds))}; "
            f"CLO takes one for each layer and knows {', '.join(sorted(LAYER_TYPES))}."
        )
    _check_rope(config, path)


def _check_rope(config: Any, path: Path) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] not in _ROPE:
        raise ConfigError(
            f"{path} has RoPE scaling of type '{rope['rope_type']}'; CLO knows {', '.join(_ROPE)}."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{path} rotates only a part of each head (partial_rotary_factor); CLO rotates all."
        )
    needed, others = _ROPE[rope["rope_type"]]
    valid = all(_is_positive(rope.get(name)) for name in needed)
    valid = valid and all(_is_positive(rope[name]) for name in others if rope.get(name) not in (None, 0))
    valid = valid and rope["rope_theta"] > 1 and 1 <= _scaled_positions(config) < _MOST
    if not valid or (rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]):
        raise ConfigError(f"{path} has RoPE parameters that cannot be computed with: {rope}.")


def _is_positive(value: object) -> bool:
    """Whether a value is a number that float32 can hold, and positive."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 1 / _FLOAT32_MOST < value < _FLOAT32_MOST


def kv_shape(config: Any, dtype: str, *, codes: bool = False) -> KVShape:
    """Shape of the KV cache of a model whose weights are held in ``dtype``, in the arena with ``codes`` or
    without.

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


def context_length(config: Any, asked: int | None) -> int:
    """Tokens that a sequence may have: ``asked``, or all that the model was made for.

    Raises:
        ConfigError: the model was made for fewer, or attends only to a window of fewer.
    """
    own = _scaled_positions(config)
    length = own if asked is None else asked
    if length > own:
        raise ConfigError(
            f"--max-model-len {length} exceeds the {own} positions that the model was made for."
        )
    window = min((spec.window for spec in layer_specs(config) if spec.window), default=None)
    if window is not None and length > window:
        raise ConfigError(
            f"The model attends to a sliding window of {window} tokens, which CLO does not do; "
            f"start with --max-model-len {window} or less, where it makes no difference."
        )
    return length


def _scaled_positions(config: Any) -> int:
    """Positions that a model was made for, RoPE scaling included, as vLLM derives them: linear scaling
    multiplies ``max_position_embeddings``, YaRN the length before it; llama3's length holds it already."""
    rope, positions = config.rope_parameters, config.max_position_embeddings
    if rope["rope_type"] == "yarn":
        positions = rope["original_max_position_embeddings"]
    return int(positions * rope["factor"]) if rope["rope_type"] in ("linear", "yarn") else int(positions)


def layer_specs(config: Any) -> tuple[LayerSpec, ...]:
    """What each layer of a model is."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if config.model_type == "mistral":  # its layers all slide where there is a window at all
        kinds = ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    return tuple(LayerSpec(window if kind == "sliding_attention" else None) for kind in kinds)
