"""From ``ModelConfig`` to a checked folder (launcher and worker) and from there to a ``Decoder`` (worker)."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gpu_worker.families import context_length, read_config
from gpu_worker.gguf import default_model
from gpu_worker.model import Decoder, Layer, Linear, Weights
from gpu_worker.shape import KVShape
from runtime.config import DEFAULT_MODEL, LoadFormat, ModelConfig
from runtime.errors import ConfigError

logger = logging.getLogger(__name__)

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model")


@dataclass(frozen=True)
class Resolved:
    """A model that CLO can serve: where it lies and how it is to be held."""

    name: str
    folder: Path
    config: Any  # transformers' configuration
    max_model_len: int
    dtype: torch.dtype
    device: torch.device
    load_format: LoadFormat
    seed: int


def resolve(model: ModelConfig) -> Resolved:
    """Find the model and check all that can be checked without its weights.

    Raises:
        ConfigError: unknown model or family, a model that CLO would compute wrongly, or a missing GPU.
    """
    folder = _find(model.model)
    config = read_config(folder)
    if model.device == "cuda":
        raise ConfigError("This version computes on the CPU only; start with --device cpu.")
    dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
    length = context_length(config, model.max_model_len)
    device = torch.device("cpu")
    return Resolved(model.model, folder, config, length, dtype, device, model.load_format, model.seed)


def _find(name: str) -> Path:
    if name == DEFAULT_MODEL:
        return default_model()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"--model {name} is neither a folder nor the name of a model on the hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), etag_timeout=5))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--model {name} could not be taken from the hub: {reason}") from None


def load_decoder(model: Resolved) -> Decoder:
    """Load the weights, or make random ones (``load_format`` "dummy").

    Raises:
        ConfigError: weights are missing, corrupt, of the wrong shape or not finite.
    """
    config = model.config
    source = _dummy(model) if model.load_format == "dummy" else _load(model)
    shape = KVShape(
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=model.dtype,
    )
    if shape.head_dim % 4:
        raise ConfigError(f"The model's head_dim is {shape.head_dim}; the index needs a multiple of 4.")
    return Decoder(_fuse(source), shape, config.rms_norm_eps, config.max_position_embeddings)


def _load(model: Resolved) -> Any:
    if not any(model.folder.glob("*.safetensors")):
        raise ConfigError(f"{model.folder} holds no *.safetensors; CLO loads no other weights.")
    transformers_logging.set_verbosity_error()
    try:
        source, report = AutoModelForCausalLM.from_pretrained(
            model.folder,
            dtype=model.dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"The weights in {model.folder} cannot be loaded, copy them again: {reason}"
        ) from None
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise ConfigError(
                f"The weights in {model.folder} do not fit config.json ({kind}: {sorted(report[kind])[0]})."
            )
    for name, tensor in source.state_dict().items():
        if not tensor.isfinite().all():
            raise ConfigError(
                f"The weights in {model.folder} are damaged: {name} holds values that are not finite."
            )
    return source.to(model.device)


def _dummy(model: Resolved) -> Any:
    """Random weights, normal with deviation 0.02 and norms at 1, made on the device in the final dtype."""
    with torch.device(model.device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        return AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)


def _fuse(source: Any) -> Weights:
    """Take the tensors of transformers' model, one layer after the other, so that nothing is held twice."""
    base = source.model
    layers = []
    for index, block in enumerate(base.layers):
        attention, mlp = block.self_attn, block.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            queries = attention.q_proj.out_features // attention.head_dim
            keys = attention.k_proj.out_features // attention.head_dim
            parts = [
                attention.q_norm.weight.data.expand(queries, -1),
                attention.k_norm.weight.data.expand(keys, -1),
            ]
            norms = torch.cat(parts)
        layers.append(
            Layer(
                attention_norm=block.input_layernorm.weight.data,
                qkv=_join(attention.q_proj, attention.k_proj, attention.v_proj),
                qk_norm=norms,
                output=_join(attention.o_proj),
                mlp_norm=block.post_attention_layernorm.weight.data,
                gate_up=_join(mlp.gate_proj, mlp.up_proj),
                down=_join(mlp.down_proj),
            )
        )
        base.layers[index] = torch.nn.Identity()
    rotary = base.rotary_emb
    return Weights(
        embedding=base.embed_tokens.weight.data,
        layers=tuple(layers),
        norm=base.norm.weight.data,
        head=source.lm_head.weight.data,
        rope_frequencies=rotary.inv_freq.float(),
        rope_scale=float(rotary.attention_scaling),
    )


def _join(*linears: torch.nn.Linear) -> Linear:
    """One projection whose outputs are those of all, in order."""
    if len(linears) == 1:
        only = linears[0]
        return Linear(only.weight.data, None if only.bias is None else only.bias.data)
    biases: list[Tensor] = [linear.bias.data for linear in linears if linear.bias is not None]
    weight = torch.cat([linear.weight.data for linear in linears])
    return Linear(weight, torch.cat(biases) if biases else None)
