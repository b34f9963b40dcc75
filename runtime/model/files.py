"""From ``ModelConfig`` to a checked folder (launcher and worker) and from there to a ``Decoder`` (worker)."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of the HTTP library below it
    HTTPError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from clo.gpu_worker.model.decoder import Decoder, Layer, Linear, Weights
from clo.runtime.config import DEFAULT_MODEL, LoadFormat, ModelConfig
from clo.runtime.model.default_model import default_model
from clo.runtime.model.model_config import context_length, kv_shape, read_config
from clo.runtime.wire.errors import ConfigError

_HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer*"]
_HUB_SKIPPED = ["*/*", "consolidated*"]  # other formats of the same weights
_HUB_SECONDS = 5.0
_DUMMY_DEVIATION = 0.02

Place = Callable[[str, Tensor], Tensor]  # name and parameter -> the tensor that the decoder keeps


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
    """Find the model and check all that can be checked without reading its weights.

    Raises:
        ConfigError: no such model, weights cut short, a model that CLO would compute wrongly, or no GPU.
    """
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    visible = torch.cuda.is_available()
    if model.device == "cuda" and not visible:
        raise ConfigError("PyTorch sees no CUDA GPU here; start with --device cpu, or see nvidia-smi.")
    device = torch.device("cuda" if visible and model.device != "cpu" else "cpu")
    folder = _find(model)
    config = read_config(folder)
    if model.load_format != "dummy":
        _check_files(folder)
    return Resolved(
        name=model.model,
        folder=folder,
        config=config,
        max_model_len=context_length(config, model.max_model_len),
        dtype=_dtype(model.dtype, device, config),
        device=device,
        load_format=model.load_format,
        seed=model.seed,
    )


def _dtype(asked: str, device: torch.device, config: Any) -> torch.dtype:
    """On the CPU auto is float32, which is exact there and no slower."""
    if asked != "auto":
        return getattr(torch, asked)  # type: ignore[no-any-return]
    own = getattr(config, "dtype", None)
    return own if device.type == "cuda" and isinstance(own, torch.dtype) else torch.float32


def _find(model: ModelConfig) -> Path:
    name = model.model
    if name == DEFAULT_MODEL:
        return default_model()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"--model {name} is neither a folder nor the name of a model on the hub.")
    wanted = _HUB_FILES if model.load_format == "dummy" else [*_HUB_FILES, "*.safetensors"]
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=wanted, ignore_patterns=_HUB_SKIPPED, etag_timeout=_HUB_SECONDS
            )
        )
    except RepositoryNotFoundError:
        raise ConfigError(
            f"The Hugging Face hub shows no model '{name}'; check the name, or log in if it needs a licence."
        ) from None
    except (HTTPError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"--model {name} is no folder, and the Hugging Face hub did not give it ({reason}); "
            "give a local folder, or try again with a network."
        ) from None


def _check_files(folder: Path) -> None:
    """Refuse missing weight files, and damaged ones as far as their headers and lengths show it."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError(f"{index} is damaged; copy the model again.") from None
    for name in names:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except FileNotFoundError:
            raise ConfigError(f"{folder / name} is missing; CLO takes weights as safetensors only.") from None
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder / name} is damaged ({error}); copy the model again.") from None


def load_decoder(model: Resolved) -> Decoder:
    """Load the weights, or make random ones (``load_format`` "dummy").

    Raises:
        ConfigError: weights are missing, too many, damaged, of the wrong shape or not finite.
    """
    if model.load_format == "dummy":
        with torch.device("meta"):
            source = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
        place: Place = partial(_random, torch.Generator(model.device).manual_seed(model.seed))
    else:
        source, place = _read(model), partial(_checked, model)
    rotary = type(source.model.rotary_emb)(model.config)  # a meta model's own has no values
    shape = kv_shape(model.config, model.dtype)
    tensors = _Tensors(source, place)
    del source  # from here on only the tensors still to be taken are held
    embedding = tensors.take("model.embed_tokens.weight")
    weights = Weights(
        embedding=embedding,
        layers=tuple(
            tensors.layer(f"model.layers.{index}.", shape.query_heads, shape.kv_heads)
            for index in range(shape.layers)
        ),
        norm=tensors.take("model.norm.weight"),
        head=tensors.take("lm_head.weight") if "lm_head.weight" in tensors else embedding,
        rope_frequencies=rotary.inv_freq.to(model.device),
        rope_scale=float(rotary.attention_scaling),
    )
    return Decoder(weights, shape, model.config.rms_norm_eps, model.config.max_position_embeddings)


def _read(model: Resolved) -> Any:
    """transformers' model with the weights of the folder, all of which must fit."""
    try:
        source, report = AutoModelForCausalLM.from_pretrained(
            model.folder,
            config=model.config,
            dtype=model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            local_files_only=True,
            use_safetensors=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The weights in {model.folder} cannot be loaded ({reason}); copy the model again."
        ) from None
    unfit = [f"lack {name}" for name in sorted(report["missing_keys"])]
    unfit += [f"have {name}, which is not part of it" for name in sorted(report["unexpected_keys"])]
    unfit += [
        f"have {name} as {list(found)} in place of {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    if unfit:
        raise ConfigError(
            f"The weights in {model.folder} do not fit its config: they {unfit[0]}; copy the model again."
        )
    return source


def _checked(model: Resolved, name: str, parameter: Tensor) -> Tensor:
    tensor = parameter.to(model.device, copy=True)  # the parameter itself is a mapped file, which may change
    if not tensor.isfinite().all():
        raise ConfigError(
            f"The weights in {model.folder} are damaged: {name} holds values that are not finite in "
            f"{str(model.dtype).removeprefix('torch.')}; copy the model again, or choose another --dtype."
        )
    return tensor


def _random(generator: torch.Generator, name: str, parameter: Tensor) -> Tensor:
    """Norms are 1 and all else is normal, made in the final dtype on the generator's device."""
    tensor = torch.empty_like(parameter, device=generator.device)
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, _DUMMY_DEVIATION, generator=generator)


class _Tensors:
    """The parameters of transformers' model, each handed out once, so that memory holds no weight twice.

    Args:
        source: the model; parameters that are tied appear once, under their first name.
        place: makes of a parameter the tensor to keep.
    """

    def __init__(self, source: Any, place: Place) -> None:
        self._parameters: dict[str, Tensor] = dict(source.named_parameters())
        self._place = place

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def take(self, name: str) -> Tensor:
        return self._place(name, self._parameters.pop(name).detach())

    def linear(self, *names: str) -> Linear:
        """One projection whose outputs are those of all, in order."""
        weights = [self.take(f"{name}.weight") for name in names]
        biases = [self.take(f"{name}.bias") for name in names if f"{name}.bias" in self]
        return Linear(_join(weights), _join(biases) if biases else None)

    def layer(self, prefix: str, query_heads: int, kv_heads: int) -> Layer:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qk_norm = None
        if f"{attention}q_norm.weight" in self:
            query = self.take(f"{attention}q_norm.weight").expand(query_heads, -1)
            key = self.take(f"{attention}k_norm.weight").expand(2 * kv_heads, -1)
            qk_norm = torch.cat((query, key))
        return Layer(
            attention_norm=self.take(f"{prefix}input_layernorm.weight"),
            qkv=_in_turn(
                self.linear(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
                query_heads,
                kv_heads,
            ),
            qk_norm=qk_norm,
            output=self.linear(f"{attention}o_proj"),
            mlp_norm=self.take(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.linear(f"{mlp}gate_proj", f"{mlp}up_proj"),
            down=self.linear(f"{mlp}down_proj"),
        )


def _in_turn(qkv: Linear, query_heads: int, kv_heads: int) -> Linear:
    """From all queries, all keys, all values to all queries, then each head's key and value in turn."""
    order = torch.arange(query_heads + 2 * kv_heads)
    order[query_heads:] = order[query_heads:].view(2, kv_heads).t().flatten()

    def sorted_heads(tensor: Tensor) -> Tensor:
        return tensor.view(len(order), -1, *tensor.shape[1:])[order.to(tensor.device)].flatten(0, 1)

    return Linear(sorted_heads(qkv.weight), None if qkv.bias is None else sorted_heads(qkv.bias))


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
