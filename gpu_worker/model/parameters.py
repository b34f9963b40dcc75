"""The parameters of a model: which there are, by transformers' names, and where its files have them.

Read by safetensors alone: transformers' own classes of models take a worker's start more time to import than
all else together, and their modules have nothing that a decoder wants but the formulas of RoPE.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clo.runtime.config import Architecture, ResolvedModel
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.model.weight_files import weight_files
from clo.runtime.wire.errors import ConfigError

_BUFFER = "rotary_emb.inv_freq"  # which old checkpoints of Llama have, and is computed


def shapes(config: Architecture, shape: KVShape) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a model.

    Args:
        config: of the model.
        shape: of its KV cache.
    """
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(shape.layers):
        found |= {f"model.layers.{layer}.{name}": size for name, size in _of_layer(config, shape)}
    found["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return found


def _of_layer(config: Architecture, shape: KVShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, pairs = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    family = config.model_type
    # Qwen2 has biases without saying so, and its output none; Mistral has none.
    asked = family in ("llama", "qwen3") and config.attention_bias
    in_mlp = family == "llama" and config.mlp_bias
    products = (
        ("self_attn.q_proj", queries, hidden, asked or family == "qwen2"),
        ("self_attn.k_proj", pairs, hidden, asked or family == "qwen2"),
        ("self_attn.v_proj", pairs, hidden, asked or family == "qwen2"),
        ("self_attn.o_proj", hidden, queries, asked),
        ("mlp.gate_proj", inner, hidden, in_mlp),
        ("mlp.up_proj", inner, hidden, in_mlp),
        ("mlp.down_proj", hidden, inner, in_mlp),
    )
    for name, outputs, inputs, bias in products:
        yield f"{name}.weight", (outputs, inputs)
        if bias:
            yield f"{name}.bias", (outputs,)
    if family == "qwen3":
        yield "self_attn.q_norm.weight", (shape.head_dim,)
        yield "self_attn.k_norm.weight", (shape.head_dim,)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def read_parameters(model: ResolvedModel, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parameters in a model's files, which they map: nothing is read before it is used.

    Args:
        model: its folder has the files.
        wanted: what ``shapes`` says.

    Raises:
        ConfigError: parameters are missing, too many or of the wrong shape, or a file cannot be read.
    """
    found: dict[str, Tensor] = {}
    try:
        with ExitStack() as files:
            for path in weight_files(model.folder):
                file = files.enter_context(safe_open(path, framework="pt"))
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The weights in {model.folder} cannot be loaded ({reason}); copy the model again."
        ) from None
    more = {name for name in found if name not in wanted and not name.endswith(_BUFFER)}
    if "lm_head.weight" not in wanted:  # it is the embedding, which some files have twice
        more.discard("lm_head.weight")
    unfit = [f"lack {name}" for name in sorted(wanted.keys() - found.keys())]
    unfit += [f"have {name}, which is not part of it" for name in sorted(more)]
    unfit += [
        f"have {name} as {list(found[name].shape)} in place of {list(size)}"
        for name, size in sorted(wanted.items())
        if name in found and found[name].shape != size
    ]
    unfit += [
        f"have {name} in the type {str(found[name].dtype).removeprefix('torch.')}"
        for name in sorted(wanted.keys() & found.keys())
        if not found[name].is_floating_point() or found[name].element_size() < 2
    ]
    if unfit:
        raise ConfigError(
            f"The weights in {model.folder} do not fit its config: they {unfit[0]}; copy the model again."
        )
    return {name: found[name] for name in wanted}


def rope(config: Architecture, shape: KVShape) -> tuple[Tensor, float]:
    """RoPE's frequencies [head_dim / 2] float32, and the factor of its cosines and sines."""
    parameters, dim = config.rope_parameters, shape.head_dim
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    from transformers import PreTrainedConfig  # here, as most models need none of it, and it takes seconds
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    computed = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequencies, scale = computed(PreTrainedConfig(**asdict(config)), torch.device("cpu"))
    return frequencies, float(scale)
