"""Which files have the weights of a model."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from clo.runtime.wire.errors import ConfigError


class _Index(msgspec.Struct):
    """Which file holds which weight."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


def weight_files(folder: Path) -> list[Path]:
    """The files that have a model's weights. Raises ``ConfigError`` where the index that names them is
    damaged."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists() or not index.exists():
        return [single]
    try:
        found = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()
    except (msgspec.DecodeError, OSError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{index} is damaged ({error}); copy the model again.") from None
    return [folder / name for name in sorted(set(found))]
