"""Configuration: frozen, validated when made, and passed to the processes as JSON."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from clo.runtime.wire.errors import ConfigError

Attention = Literal["clo", "topk", "full"]
Prefetch = Literal["off", "verified", "predicted"]
LoadFormat = Literal["auto", "dummy"]
Device = Literal["auto", "cuda", "cpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
LogLevel = Literal["debug", "info", "warning", "error"]

DEFAULT_MODEL = "smollm2-135m-instruct"

_SELECTED = 128, 256  # rows, for sequences up to _SHORT tokens and for longer ones: benchmarks.quality
_SHORT = 8192
_KEPT = 8  # resident rows for each that is selected

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``512M`` or ``1073741824``; units are powers of 1024.

    Raises:
        ConfigError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"'{text}' is not a size; write for example 512MiB or 8GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size: float) -> str:
    """A size in the largest binary unit that keeps it above 1: ``8.0 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


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
        """Raises ``ConfigError`` where the file cannot be read or is no profile."""
        try:
            profile = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"--profile {path} cannot be read: {error.strerror}.") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--profile {path} is no profile: {error}.") from None
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

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raises ``ConfigError`` where the profile is of a model of another shape."""
        own, other = self.model, ProfiledModel(layers, kv_heads, head_dim)
        if own != other:
            raise ConfigError(
                f"--profile is of a model of {own.layers} layers, {own.kv_heads} KV heads and head_dim "
                f"{own.head_dim}, and this one has {layers}, {kv_heads} and {head_dim}; make one for it with "
                "benchmarks.calibrate."
            )


class Sizes(NamedTuple):
    """Rows of one KV head. ``topk`` keeps just what it selects."""

    select_k: int
    resident: int


@dataclass(frozen=True)
class CacheConfig:
    """The three knobs of the cache and what surrounds them.

    A head reuses its rows while the cosine between its query and the query of its last selection is at least
    ``gate``. Otherwise it selects ``select_k`` rows; those that are not resident replace the ones selected
    longest ago among its ``resident`` rows. All resident rows are attended, beside ``sinks`` first tokens and
    the ``recent`` latest. The head-wise cache of the paper (arXiv 2511.14510) is ``resident == select_k``.
    Where one of the two is None, ``sizes`` chooses it.

    ``prefetch`` selects and fetches for a layer with a query predicted from what the layer before has by
    then, so that a transfer hides behind a whole layer; ``verified`` selects again with the real query,
    ``predicted`` does not. Layers whose query cannot be predicted do without (``clo.gpu_worker.cache.query_prediction``).

    ``profile`` takes the place of ``select_k``, ``resident`` and ``gate``. ``drift_check`` compares a sequence with
    full attention in one of so many of its decode steps.
    """

    attention: Attention = "clo"
    select_k: int | None = None
    resident: int | None = None
    gate: float | None = None
    prefetch: Prefetch = "predicted"
    sinks: int = 4
    recent: int = 64
    profile: Profile | None = None
    drift_check: int | None = None

    def __post_init__(self) -> None:
        k, resident = self.select_k, self.resident
        if k is not None and k < 1:
            raise ConfigError(f"--select-k is {k}; it must be at least 1.")
        if resident is not None and (resident < 1 or (self.attention == "clo" and resident < (k or 1))):
            raise ConfigError(
                f"--resident {resident} is below --select-k {k or 1}; "
                "the rows selected in one step must fit into the resident set."
            )
        if self.gate is not None and not 0.0 <= self.gate <= 1.0:
            raise ConfigError(f"--gate is {self.gate}; it is a cosine from 0 to 1, or 'off'.")
        if self.drift_check is not None and self.drift_check < 1:
            raise ConfigError(f"--drift-check is {self.drift_check}; it must be at least 1, or 'off'.")
        profile = self.profile
        if profile is None:
            return
        for option, value in (("--select-k", k), ("--resident", resident), ("--gate", self.gate)):
            if value is not None:
                raise ConfigError(f"{option} and --profile exclude each other: a profile holds its own.")
        if self.attention != "clo":
            raise ConfigError(f"--profile is for --attention clo, and --attention is {self.attention}.")

    def sizes(self, max_tokens: int, layers: int) -> list[Sizes]:
        """The rows that a head of each layer selects and keeps; ``max_tokens`` of the longest sequence."""
        if self.profile is not None:
            return [Sizes(layer.select_k, layer.resident) for layer in self.profile.layers]
        k = self.select_k
        if k is None:
            k = min(_SELECTED[max_tokens > _SHORT], self.resident or max_tokens)
        return [Sizes(k, k if self.attention == "topk" else self.resident or _KEPT * k)] * layers


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held. ``max_model_len`` None takes the model's own."""

    model: str = DEFAULT_MODEL
    load_format: LoadFormat = "auto"
    dtype: DType = "auto"
    device: Device = "auto"
    max_model_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"--max-model-len is {self.max_model_len}; it must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}; it must be from 0 to 2**63 - 1.")


@dataclass(frozen=True)
class StoreConfig:
    """One KV store: its name (``numa0``), NUMA node, arena size in bytes and control address."""

    name: str
    node: int
    arena_bytes: int
    endpoint: str
    log_level: LogLevel = "warning"


@dataclass(frozen=True)
class WorkerConfig:
    """One worker. ``router`` and ``store`` are addresses of control channels."""

    worker: int
    node: int
    router: str
    store: str
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    max_num_seqs: int = 8
    gpu_memory_utilization: float = 0.9
    log_level: LogLevel = "warning"


@dataclass(frozen=True)
class ServerConfig:
    """Everything that ``launch.py`` was asked for."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    workers: int = 1
    stores: tuple[str, ...] = ("numa0",)
    kv_bytes: int = 4 * 2**30
    max_num_seqs: int = 8
    gpu_memory_utilization: float = 0.9
    host: str = "127.0.0.1"
    port: int = 5555
    log_level: LogLevel = "warning"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; it must be at least 1.")
        if self.max_num_seqs < 1:
            raise ConfigError(f"--max-num-seqs is {self.max_num_seqs}; it must be at least 1.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization}; "
                "it must be above 0 and at most 1."
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be from 0 to 65535.")
        for name in self.stores:
            if re.fullmatch(r"numa\d+", name) is None:
                raise ConfigError(f"--kvstore '{name}' is not of the form numa0 or numa0,numa1.")
        if len(set(self.stores)) < len(self.stores):
            raise ConfigError(f"--kvstore names a node twice: {','.join(self.stores)}.")
