"""Configuration: frozen, validated when made, and passed to the processes as JSON.

A field made by ``option`` is also an option of the command line: ``max_model_len`` is ``--max-model-len``.
``launch.py`` reads everything that it needs to know from here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clo.runtime.profile import Profile
from clo.runtime.units import parse_size
from clo.runtime.wire.errors import ConfigError

Attention = Literal["clo", "topk", "full"]
Prefetch = Literal["off", "verified", "predicted"]
PrefillAttention = Literal["auto", "dense", "sparse"]
PrefixAttention = Literal["exact", "sparse"]
LoadFormat = Literal["auto", "dummy"]
Device = Literal["auto", "cuda", "cpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
PrefixCaching = Literal["on", "off"]
Recovery = Literal["on", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]
ToolCallParser = Literal["auto", "hermes", "llama3_json", "none"]
ReasoningParser = Literal["auto", "think", "none"]

DEFAULT_MODEL = "smollm2-135m-instruct"

AUTO_SEQS = {"cuda": 64, "cpu": 8}  # by device: the most that --max-num-seqs auto takes

# for sequences of up to _SHORT tokens, and for longer ones
_SHORT = 8192
_SELECTED = 64, 112  # rows
_TAIL = 1024, 4096  # tokens
_RESIDENT = 8  # resident rows for each that is selected
_MOST_TAIL = 65536  # the partial sums of more parts would take longer than attention


class Option(NamedTuple):
    """How a field is given on the command line."""

    help: str
    metavar: str | None
    parse: Callable[[str], Any] | None  # None for a field whose type lists its values
    none: str | None  # the word for None
    default_text: str | None  # how the default is written, where that is not the value itself


def option(
    default: Any,
    help: str,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    *,
    none: str | None = None,
    default_text: str | None = None,
) -> Any:
    """A field that is an option; see ``Option``."""
    return field(default=default, metadata={"option": Option(help, metavar, parse, none, default_text)})


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _profile(text: str) -> Profile:
    return Profile.load(Path(text))


class Sizes(NamedTuple):
    """Rows of one KV head. ``topk`` keeps only what it selects."""

    select_k: int
    resident: int


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held. With ``max_model_len`` None the model's own limit holds."""

    model: str = option(
        DEFAULT_MODEL, "a folder in the Hugging Face layout, or the name of the built-in default", "NAME", str
    )
    load_format: LoadFormat = option(
        "auto", "auto reads the weights; dummy takes random ones of the same shape, to measure speed"
    )
    device: Device = option("auto", "auto takes the GPUs where there are any")
    dtype: DType = option("auto", "type of weights and KV cache; auto takes the model's own")
    max_model_len: int | None = option(
        None,
        "longest prompt plus output of one request; auto takes the model's own limit",
        "TOKENS",
        int,
        none="auto",
    )
    seed: int = option(0, "seed for random weights and for requests without one", "N", int)

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"--max-model-len is {self.max_model_len}; it must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}; it must be from 0 to 2**63 - 1.")


@dataclass(frozen=True)
class Architecture:
    """What the configuration of a model says that its processes have to know, checked, under the names that
    transformers has for it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    layer_types: tuple[str, ...] | None
    sliding_window: int | None


@dataclass(frozen=True)
class ResolvedModel:
    """A model that CLO can serve: where it is and how to hold it.

    Attributes:
        name: the name that was asked for.
        path: path of its folder.
        architecture: of the whole model.
        dtype: type of weights and KV cache, a name such as "bfloat16".
        device: "cuda" or "cpu".
        gpu_nodes: NUMA node of each GPU, in the order in which PyTorch numbers them; None where the machine
            does not say.
    """

    name: str
    path: str
    architecture: Architecture
    max_model_len: int
    dtype: str
    device: str
    load_format: LoadFormat
    seed: int
    gpu_nodes: tuple[int | None, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(self.path)

    @property
    def vocab_size(self) -> int:
        return self.architecture.vocab_size


@dataclass(frozen=True)
class CacheConfig:
    """The knobs of the cache and what surrounds them.

    A head reuses its rows while the cosine between its query and the query of its last selection is at least
    ``gate``. Otherwise it selects ``select_k`` rows; those that are not resident replace the ones selected
    longest ago among its ``resident`` rows. All resident rows are attended to, with the first ``sinks``
    tokens and the latest ``recent``; of the others, the ``tail`` of those that weigh most, from codes. The
    head-wise cache of the paper (arXiv 2511.14510) has ``resident`` equal to ``select_k`` and no tail. Where
    one of ``select_k``, ``resident`` and ``tail`` is None, ``sizes`` or ``tail_tokens`` chooses it.

    ``prefetch`` selects and fetches for a layer with a query predicted from what the layer before has by
    then, so that a transfer hides behind a whole layer; ``verified`` selects again with the real query,
    ``predicted`` does not. Layers whose query cannot be predicted do without it
    (``clo.gpu_worker.cache.query_prediction``). ``prefill_attention`` and ``prefix_attention`` are about
    prompts alone (``clo.kernels.sparse_prompt``, ``LayerCache.fetch_best``).

    ``profile`` takes the place of ``select_k``, ``resident`` and ``gate``. ``drift_check`` is the
    number of decode steps of a sequence from one comparison with full attention to the next.
    """

    attention: Attention = option(
        "clo",
        "clo keeps rows over many steps; topk fetches its whole selection in every step; full attends to all "
        "rows, exact and slow, to compare with",
    )
    select_k: int | None = option(
        None,
        "rows that a KV head selects at a time: more is closer to full attention and moves more; auto takes "
        "64, and 112 where --max-model-len exceeds 8192",
        "ROWS",
        int,
        none="auto",
    )
    resident: int | None = option(
        None,
        "rows that a KV head keeps on the worker and attends to, at least --select-k: more is closer to full "
        "attention, fetches less and takes more memory for each request; auto takes 8 times --select-k",
        "ROWS",
        int,
        none="auto",
    )
    tail: int | None = option(
        None,
        "tokens that a KV head attends to beside its rows, less exactly, from codes of 2 bits on the worker: "
        "more is closer to full attention; 0 drops what is not resident; auto takes 1024, and 4096 where "
        "--max-model-len exceeds 8192",
        "TOKENS",
        int,
        none="auto",
    )
    gate: float | None = option(
        None,
        "a head keeps its rows while its query is at least this close to the query that selected them: lower "
        "selects less often and is less exact, 0 never selects; off selects in every step",
        "COSINE",
        float,
        none="off",
    )
    prefetch: Prefetch = option(
        "predicted",
        "fetch for a layer while the one before computes, with a predicted query, in all layers where that "
        "predicts well: verified selects again with the real one, predicted does not, which is fastest",
    )
    prefill_attention: PrefillAttention = option(
        "auto",
        "what the tokens of a prompt attend to: dense is all tokens before them; sparse leaves out blocks of "
        "little weight that lie 16K tokens back or more, which halves the time of 128K tokens and loses a "
        "little; auto is sparse on GPUs from Hopper on, with the package nvidia-cudnn-frontend",
    )
    prefix_attention: PrefixAttention = option(
        "exact",
        "how a prompt attends to a beginning that is in the KV store already: exact reads all its rows; "
        "sparse reads their codes of 2 bits and the rows that matter most, an eighth of the bytes and a "
        "little less exact, and blocks take about an eighth more memory",
    )
    sinks: int = 4
    recent: int = 64
    profile: Profile | None = option(
        None,
        "what each layer selects and keeps, and a gate for each KV head, as benchmarks.calibrate finds them "
        "for a model; in place of --select-k, --resident and --gate",
        "FILE",
        _profile,
        none="off",
    )
    drift_check: int | None = option(
        None,
        "compare a step of each request with full attention once in so many, and report it with the "
        "statistics; the other requests wait meanwhile",
        "STEPS",
        int,
        none="off",
    )

    def __post_init__(self) -> None:
        k, resident = self.select_k, self.resident
        if k is not None and k < 1:
            raise ConfigError(f"--select-k is {k}; it must be at least 1.")
        if resident is not None and (resident < 1 or (self.attention == "clo" and resident < (k or 1))):
            raise ConfigError(
                f"--resident {resident} is below --select-k {k or 1}; "
                "the rows selected in one step must fit into the resident set."
            )
        if self.tail is not None and not 0 <= self.tail <= _MOST_TAIL:
            raise ConfigError(f"--tail is {self.tail}; it must be from 0 to {_MOST_TAIL}.")
        if self.tail and self.attention != "clo":
            raise ConfigError(f"--tail is for --attention clo, and --attention is {self.attention}.")
        if self.prefix_attention == "sparse" and (self.attention != "clo" or self.tail == 0):
            given = "--tail is 0" if self.attention == "clo" else f"--attention is {self.attention}"
            raise ConfigError(
                f"--prefix-attention sparse needs the codes of keys and values, and {given}; it is for "
                "--attention clo with a tail."
            )
        if self.gate is not None and not 0.0 <= self.gate <= 1.0:
            raise ConfigError(f"--gate is {self.gate}; it is a cosine from 0 to 1, or 'off'.")
        if self.drift_check is not None and self.drift_check < 1:
            raise ConfigError(f"--drift-check is {self.drift_check}; it must be at least 1, or 'off'.")
        profile = self.profile
        if profile is None:
            return
        for name, value in (("--select-k", k), ("--resident", resident), ("--gate", self.gate)):
            if value is not None:
                raise ConfigError(f"{name} and --profile exclude each other: a profile holds its own.")
        if self.attention != "clo":
            raise ConfigError(f"--profile is for --attention clo, and --attention is {self.attention}.")

    def sizes(self, max_tokens: int, layers: int) -> list[Sizes]:
        """The rows that a head of each layer selects and keeps; ``max_tokens`` is the longest sequence."""
        if self.profile is not None:
            return [Sizes(layer.select_k, layer.resident) for layer in self.profile.layers]
        k = self.select_k
        if k is None:
            k = min(_SELECTED[max_tokens > _SHORT], self.resident or max_tokens)
        return [Sizes(k, k if self.attention == "topk" else self.resident or _RESIDENT * k)] * layers

    def tail_tokens(self, max_tokens: int) -> int:
        """Tokens of a head's tail, at most; ``max_tokens`` is the longest sequence. There is none where all
        rows of every sequence are resident."""
        layers = 1 if self.profile is None else len(self.profile.layers)
        fewest = min(sizes.resident for sizes in self.sizes(max_tokens, layers))
        if self.attention != "clo" or max_tokens <= self.sinks + self.recent + fewest:
            return 0
        return min(_TAIL[max_tokens > _SHORT] if self.tail is None else self.tail, max_tokens)


@dataclass(frozen=True)
class EngineConfig:
    """How much one worker may take on."""

    max_num_seqs: int | None = option(
        None,
        "requests that one worker decodes together: more is a higher throughput and takes more memory on the "
        f"worker; auto takes as many as fit there, up to {AUTO_SEQS['cuda']} on a GPU and {AUTO_SEQS['cpu']} "
        "on the CPU",
        "N",
        int,
        none="auto",
    )
    gpu_memory_utilization: float = option(
        0.9, "share of each GPU's memory that may be used, weights included", "SHARE", float
    )
    max_num_batched_tokens: int | None = option(
        None,
        "tokens of prompts that are computed between two decode steps: more brings prompts forward and makes "
        "streams wait; auto measures how many leave streams half their pace beside one prompt, and takes "
        "more where several wait",
        "TOKENS",
        int,
        none="auto",
    )

    def __post_init__(self) -> None:
        if self.max_num_seqs is not None and self.max_num_seqs < 1:
            raise ConfigError(f"--max-num-seqs is {self.max_num_seqs}; it must be at least 1, or 'auto'.")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise ConfigError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}; "
                "it must be at least 1, or 'auto'."
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization}; "
                "it must be above 0 and at most 1."
            )


@dataclass(frozen=True)
class GatewayConfig:
    """How the server speaks HTTP, with OpenAI's API. ``http`` is the port; with None it does not."""

    http: int | None = option(
        None,
        "port for HTTP with OpenAI's API, beside --port; 0 takes a free one, which the ready line names; "
        "needs the packages of the extra http",
        "PORT",
        int,
        none="off",
    )
    served_model_name: tuple[str, ...] | None = option(
        None,
        "names by which HTTP clients may ask for the model: a or a,b; answers have the first; auto takes "
        "--model",
        "NAMES",
        _names,
        none="auto",
    )
    tool_call_parser: ToolCallParser = option(
        "auto",
        "how the model writes calls of tools: hermes in <tool_call> tags, as Qwen does; llama3_json as one "
        "object, as Llama 3 does; auto looks at the chat template; none refuses requests with tools",
    )
    reasoning_parser: ReasoningParser = option(
        "auto",
        "how the model marks what it thinks before an answer: think in <think> tags, and it comes apart from "
        "the answer; auto looks at the chat template; none leaves it in the answer",
    )
    ssl_certfile: str | None = option(
        None, "certificate, and those above it, as PEM: HTTP is encrypted", "FILE", str, none="off"
    )
    ssl_keyfile: str | None = option(
        None,
        "the key of --ssl-certfile as PEM; in-certfile takes the one that stands there",
        "FILE",
        str,
        none="in-certfile",
    )
    allowed_origins: tuple[str, ...] | None = option(
        None,
        "origins whose pages may use the server from a browser: http://localhost:3000 or several with "
        "commas; * for all",
        "ORIGINS",
        _names,
        none="off",
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "collector that gets a span of OpenTelemetry for each request for tokens, by OTLP over HTTP, such as "
        "http://127.0.0.1:4318/v1/traces; needs the packages of the extra otel",
        "URL",
        str,
        none="off",
    )

    def __post_init__(self) -> None:
        if self.http is None:
            for name in _GATEWAY_ONLY:
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(f"--{name.replace('_', '-')} is about HTTP; give --http PORT, too.")
            return
        if not 0 <= self.http <= 65535:
            raise ConfigError(f"--http is {self.http}; it must be from 0 to 65535, or 'off'.")
        if self.served_model_name is not None and not all(self.served_model_name):
            raise ConfigError("--served-model-name has an empty name; write a or a,b.")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile goes with --ssl-certfile; give both.")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and re.fullmatch(r"https?://[^/\s]+/\S*", endpoint) is None:
            raise ConfigError(
                f"--otlp-traces-endpoint '{endpoint}' is no URL with a path; write for example "
                "http://127.0.0.1:4318/v1/traces."
            )


_GATEWAY_ONLY = [item.name for item in fields(GatewayConfig) if item.name != "http"]


@dataclass(frozen=True)
class ServerConfig:
    """Everything that ``launch.py`` was asked for."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    workers: int = option(1, "workers; each holds the whole model, on a GPU of its own", "N", int)
    tensor_parallel_size: int = option(
        1,
        "GPUs that one worker divides the model among, a process for each: the workers of a server take "
        "--workers times as many",
        "N",
        int,
    )
    kvstore: tuple[str, ...] = option(
        ("numa0",),
        "KV stores, one for each NUMA node named: numa0 or numa0,numa1; a worker uses the store on its GPU's "
        "node, or else they take turns; of a worker on GPUs of several nodes each KV head lies on its GPU's",
        "NODES",
        _names,
        default_text="numa0",
    )
    kv_size: int | None = option(
        None,
        "CPU memory of ONE KV store, in total over all layers and workers that use it: 512MiB, 8GiB; bounds "
        "the tokens that can be served at once; auto takes four fifths of what is free on its NUMA node and "
        "in the container, but no more than all requests together can use",
        "SIZE",
        parse_size,
        none="auto",
    )
    prefix_caching: PrefixCaching = option(
        "on",
        "on keeps the KV of prompts in the store until the space is needed, and a prompt that begins like "
        "one of them is computed from where they differ",
    )
    kv_disk: str | None = option(
        None,
        "folder in which copies of the blocks of prompts outlive the memory of the KV store, and the server; "
        "what they say can be told from them, unless --kv-disk-key is given",
        "DIR",
        str,
        none="off",
    )
    kv_disk_size: int | None = option(
        None, "disk that ONE KV store may use for --kv-disk: 512MiB, 1TiB", "SIZE", parse_size, none="off"
    )
    kv_disk_key: str | None = option(
        None,
        "file with a key, 32 random bytes or 64 hexadecimal digits, that nobody else can read: what is on "
        "disk is encrypted with it (AES-256-GCM)",
        "FILE",
        str,
        none="off",
    )
    recovery: Recovery = option(
        "on",
        "on starts processes again that have died, and requests go on from the tokens that have come; off "
        "stops the server",
    )
    host: str = option(
        "127.0.0.1", "address for clients; anyone who reaches it may use the server", "ADDRESS", str
    )
    api_key: str | None = option(
        None,
        "clients need this key; CLO_API_KEY in the environment sets it too, and shows it to no other user of "
        "the machine, as a command line does",
        "KEY",
        str,
        none="off",
    )
    port: int = option(5555, "0 takes a free one; the ready line names it", "PORT", int)
    kv_events_port: int | None = option(
        None,
        "port of --host at which the stores' blocks of prompts are published in vLLM's form, for routers "
        "that send a prompt to where its beginning is; anyone who reaches it can read the tokens of prompts",
        "PORT",
        int,
        none="off",
    )
    kv_events_topic: str = option("", "topic of what is published there", "TEXT", str)
    log_level: LogLevel = option("warning", "what all processes log, on stderr")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; it must be at least 1.")
        if self.tensor_parallel_size < 1:
            raise ConfigError(
                f"--tensor-parallel-size is {self.tensor_parallel_size}; it must be at least 1."
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be from 0 to 65535.")
        if self.kv_events_port is not None and not 0 <= self.kv_events_port <= 65535:
            raise ConfigError(f"--kv-events-port is {self.kv_events_port}; it must be from 0 to 65535.")
        if self.kv_events_port is not None and self.prefix_caching == "off":
            raise ConfigError("--kv-events-port is for --prefix-caching on: there is nothing to publish.")
        if self.cache.prefix_attention == "sparse" and self.prefix_caching == "off":
            raise ConfigError(
                "--prefix-attention sparse is for --prefix-caching on: there is no prefix to attend to."
            )
        if (self.kv_disk is None) != (self.kv_disk_size is None):
            raise ConfigError("--kv-disk and --kv-disk-size go together; give both.")
        if self.kv_disk_key is not None and self.kv_disk is None:
            raise ConfigError("--kv-disk-key is for --kv-disk: there is nothing to encrypt.")
        if self.kv_disk is not None and self.prefix_caching == "off":
            raise ConfigError("--kv-disk is for --prefix-caching on: there is nothing to keep.")
        if self.api_key is not None and not 1 <= len(self.api_key.encode()) <= 255:
            raise ConfigError(f"--api-key has {len(self.api_key.encode())} bytes; it must have 1 to 255.")
        for name in self.kvstore:
            if re.fullmatch(r"numa\d+", name) is None:
                raise ConfigError(f"--kvstore '{name}' is not of the form numa0 or numa0,numa1.")
        if len(set(self.kvstore)) < len(self.kvstore):
            raise ConfigError(f"--kvstore names a node twice: {','.join(self.kvstore)}.")


@dataclass(frozen=True)
class BlockConfig:
    """What a block of the KV cache holds: the model's shape as a store has to know it."""

    layers: int
    kv_heads: int
    tokens: int
    bytes: int  # with all layers and heads


@dataclass(frozen=True)
class StartedWorker:
    """A process that the launcher has started. Blocks belong to a group: the ranks of one worker, which serve
    the same sequences together. The store numbers the ranks of all workers, one worker after another."""

    pid: int
    group: int


@dataclass(frozen=True)
class DiskConfig:
    """Where KV stores keep copies of blocks, each in a folder of its own name, and how many bytes each may
    take. ``model`` stands for all that decides about rows but for the tokens. ``key`` is a file with the key
    that they are encrypted with, None where they are not. Where the folder cannot be used, a store ends for
    which it is ``needed``, and another one serves without."""

    folder: str
    bytes: int
    model: str
    needed: bool = True
    key: str | None = None


@dataclass(frozen=True)
class StoreConfig:
    """One KV store: its name (``numa0``), NUMA node, arena size in bytes, its own address and the router's,
    its blocks, the workers, by number, that may attach, and its disk, if it has one. ``head_nodes`` has the
    NUMA node of each KV head where not all of them lie on ``node``."""

    name: str
    node: int
    arena_bytes: int
    endpoint: str
    router: str
    block: BlockConfig
    workers: dict[int, StartedWorker]
    disk: DiskConfig | None = None
    prefix_caching: PrefixCaching = "on"
    kv_events: bool = False
    log_level: LogLevel = "warning"
    head_nodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class GatewayProcessConfig:
    """The HTTP gateway: ``descriptor`` is a socket that listens, ``server`` the address of the router's
    client port, ``router`` the one where children connect."""

    gateway: GatewayConfig
    model: ResolvedModel
    descriptor: int
    server: str
    router: str
    log_level: LogLevel = "warning"


@dataclass(frozen=True)
class GroupConfig:
    """Which of ``ranks`` processes of a worker this one is. ``rendezvous`` is the descriptor of an anonymous
    file where they find one another, ``commands`` those of sockets, to each of the others at the first rank
    and else from that one. ``turn`` is that of a pipe with one byte: who reads it may explain an error."""

    rank: int
    ranks: int
    rendezvous: int
    commands: tuple[int, ...]
    turn: int


@dataclass(frozen=True)
class WorkerConfig:
    """One worker, or a rank of one. ``router`` is an address; ``stores`` has the addresses of the stores by
    NUMA node."""

    worker: int
    router: str
    stores: dict[int, str]
    model: ResolvedModel
    cache: CacheConfig = field(default_factory=CacheConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log_level: LogLevel = "warning"
    group: GroupConfig | None = None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.ranks

    @property
    def process(self) -> int:
        """Number of this process among those of all workers, and of its GPU."""
        return self.worker * self.ranks + self.rank
