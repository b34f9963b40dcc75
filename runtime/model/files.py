"""From ``ModelConfig`` to a folder with a model that CLO can serve."""

from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of the HTTP library below it
    HTTPError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from clo.runtime.config import DEFAULT_MODEL, ModelConfig, ResolvedModel
from clo.runtime.machine.gpu import choose_device
from clo.runtime.model.default_model import default_model
from clo.runtime.model.model_config import architecture, context_length, quiet_transformers, read_config
from clo.runtime.model.weight_files import weight_files
from clo.runtime.wire.errors import ConfigError

_HUB_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer*"]
_HUB_SKIPPED = ["*/*", "consolidated*"]  # other formats of the same weights
_HUB_SECONDS = 5.0


class _Adapter(msgspec.Struct):
    """What an adapter says of itself."""

    peft_type: str = "LoRA"
    base_model_name_or_path: str | None = None


def resolve(model: ModelConfig) -> ResolvedModel:
    """Find the model and check all that can be checked without reading its weights.

    Raises:
        ConfigError: no such model, weights cut short, a model that CLO would compute wrongly, or no GPU that
            CLO can use.
    """
    quiet_transformers()
    found = choose_device(model.device)
    folder = _find(model)
    _refuse_adapter(folder)
    config = read_config(folder)
    if model.load_format != "dummy":
        _check_files(folder)
    return ResolvedModel(
        name=model.model,
        path=str(folder),
        architecture=architecture(config),
        max_model_len=context_length(config, model.max_model_len),
        dtype=_dtype(model.dtype, found.device, config),
        device=found.device,
        load_format=model.load_format,
        seed=model.seed,
        gpu_nodes=found.nodes,
    )


def _dtype(asked: str, device: str, config: Any) -> str:
    """On the CPU auto is float32, which is exact there and no slower."""
    if asked != "auto":
        return asked
    own = getattr(config, "dtype", None)
    if device == "cuda" and own is not None:
        return str(own).removeprefix("torch.")
    return "float32"


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
            f"--model {name} is not a folder, and the Hugging Face hub did not deliver it ({reason}); "
            "give a local folder, or try again with a network."
        ) from None


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds an adapter in the format of the package peft.

    Also beside a whole model: transformers would load that with its adapter where peft is installed, and
    without it elsewhere.

    Raises:
        ConfigError: it does.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        return
    try:
        adapter = msgspec.json.decode(path.read_bytes(), type=_Adapter)
    except (msgspec.MsgspecError, OSError, RecursionError, UnicodeDecodeError):
        adapter = _Adapter()
    kind = "LoRA" if adapter.peft_type.upper() == "LORA" else adapter.peft_type
    base = adapter.base_model_name_or_path or "its model"
    raise ConfigError(
        f"{folder} holds an adapter ({kind}), and CLO serves neither LoRA nor other adapters: merge it into "
        f"{base} with merge_and_unload of the package peft, and give the folder that you save then."
    )


def _check_files(folder: Path) -> None:
    """Refuse weight files that are missing, or whose headers or lengths show that they are damaged."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np"):
                pass
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing; CLO takes weights as safetensors only.") from None
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} is damaged ({error}); copy the model again.") from None
