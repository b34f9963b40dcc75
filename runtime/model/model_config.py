"""Which models CLO can serve, and what their configuration means for it."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from clo.runtime.config import Architecture
from clo.runtime.model.kv_shape import kv_shape, layer_specs
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


def architecture(config: Any) -> Architecture:
    """What the other processes have to know of a configuration that ``read_config`` has read."""
    kinds = getattr(config, "layer_types", None)
    return Architecture(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=kv_shape(config, "float32").head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope_parameters),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        layer_types=None if kinds is None else tuple(kinds),
        sliding_window=getattr(config, "sliding_window", None),
    )


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
    if config.rms_norm_eps != 0 and not _is_positive(config.rms_norm_eps):
        raise ConfigError(f"{path} has an rms_norm_eps of {config.rms_norm_eps}; it is a number from 0 on.")
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
