"""What each layer and KV head of one model needs, as a file."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from clo.runtime.wire.errors import ConfigError


class ProfiledModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape by which a profile knows its model."""

    layers: int
    kv_heads: int
    head_dim: int


class ProfiledLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows that a KV head of a layer selects and keeps, and the gate of each head: a cosine; a head with one
    above 1 selects in every step."""

    select_k: Annotated[int, Meta(ge=1)]
    resident: Annotated[int, Meta(ge=1)]
    thresholds: tuple[Annotated[float, Meta(ge=0.0, le=2.0)], ...]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each layer and KV head of a model needs, as ``benchmarks.calibrate`` writes it."""

    model: ProfiledModel
    layers: tuple[ProfiledLayer, ...]

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Raises ``ConfigError`` if the file cannot be read or is not a profile."""
        try:
            profile = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"--profile {path} cannot be read: {error.strerror}.") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--profile {path} is not a profile: {error}.") from None
        model = profile.model
        if [len(layer.thresholds) for layer in profile.layers] != [model.kv_heads] * model.layers:
            raise ConfigError(
                f"--profile {path} does not hold {model.kv_heads} thresholds for each of the {model.layers} "
                "layers of its model; make it again with benchmarks.calibrate."
            )
        for number, layer in enumerate(profile.layers):
            if layer.resident < layer.select_k:
                raise ConfigError(
                    f"--profile {path} keeps {layer.resident} rows of {layer.select_k} that it selects in "
                    f"layer {number}; the rows selected in one step must fit into the resident set."
                )
        return profile

    def part(self, heads: slice) -> "Profile":
        """The profile of a model that has only some of the KV heads."""
        layers = tuple(
            msgspec.structs.replace(layer, thresholds=layer.thresholds[heads]) for layer in self.layers
        )
        model = msgspec.structs.replace(self.model, kv_heads=len(range(self.model.kv_heads)[heads]))
        return Profile(model, layers)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raises ``ConfigError`` if the profile belongs to a model of another shape."""
        own, other = self.model, ProfiledModel(layers, kv_heads, head_dim)
        if own != other:
            raise ConfigError(
                f"--profile is of a model of {own.layers} layers, {own.kv_heads} KV heads and head_dim "
                f"{own.head_dim}, and this one has {layers}, {kv_heads} and {head_dim}; make one for it with "
                "benchmarks.calibrate."
            )
