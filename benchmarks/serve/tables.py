"""The tables of cases: what is asked of which server, and what vLLM needed for the same."""

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.gpu.synthetic import LLAMA_8B, Model

NEW_ROWS = 0.09
"""What share of the rows that a head selects is fetched where that is replayed. Real models fetched
9 to 20 % from contexts of 6K on (docs/measurements.md)."""


DENSE = "--prefill-attention dense"
"""What vLLM does, with which these cases are compared."""

PROMPTS_FIRST = "--max-num-batched-tokens 1000000"
"""Where throughput alone counts, streams wait until all prompts are computed."""


class Load(NamedTuple):
    """So many requests, with so many tokens in the prompt and in the answer of each."""

    requests: int
    prompt: int
    output: int


@dataclass(frozen=True)
class Server:
    """A server and the cases that it serves.

    Attributes:
        options: those of ``launch.py``, but for the model's and the device's.
        model: a shape that is served with random weights; None where the options name a model, or mean the
            default one.
    """

    cases: tuple[str, ...]
    options: str
    model: Model | None = None

    @property
    def note(self) -> str:
        """What stands below its figures."""
        cases = ", ".join(f"serve/{case}" for case in self.cases)
        if self.model is None:
            return f"{cases}: launch.py {self.options}"
        return (
            f"{cases}: launch.py --model {self.model.name} --load-format dummy {self.options}. SYNTHETIC: "
            f"random weights; in every step each head fetches new rows, {NEW_ROWS:.0%} of --select-k and "
            "drawn anew, where a sequence has more rows than the head keeps."
        )


@dataclass(frozen=True)
class Table:
    """Sizes of all cases.

    Attributes:
        warm: what is asked of a server before anything is measured.
        ttft: time to first token, one request after another, by the case's name behind ``ttft/``.
        short, long: throughput; all requests are sent at once.
        many, beside: the same of the first ones, while the others decode, more tokens than they come to.
        tokens: the same, with what the processes between worker and reader cost.
        streams: requests that decode while another one's prompt arrives, more tokens than they come to.
        quiet: tokens that each of them generates before.
        arriving: name of the prompt in ``ttft``.
        servers: which serve all the cases.
        reference: what the first figure of a case is compared with.
    """

    warm: Load
    ttft: dict[str, Load]
    short: Load
    long: Load
    many: Load
    beside: Load
    tokens: Load
    streams: Load
    quiet: int
    arriving: str
    servers: tuple[Server, ...]
    reference: dict[str, float]

    @property
    def cases(self) -> list[str]:
        """Names of all cases, in the order in which they are measured."""
        return [case for server in self.servers for case in server.cases]


GPU = Table(
    warm=Load(1, 512, 8),
    ttft={
        "512": Load(15, 512, 1),
        "32k": Load(3, 32768, 1),
        "128k": Load(3, 131072, 1),
        "128k/sparse": Load(3, 131072, 1),
    },
    short=Load(256, 512, 256),
    long=Load(24, 32768, 256),
    many=Load(512, 256, 128),
    beside=Load(4, 131072, 2048),
    tokens=Load(64, 512, 2048),
    streams=Load(8, 8192, 4096),
    quiet=300,
    arriving="128k",
    servers=(
        Server(
            ("ttft/512", "ttft/32k", "ttft/128k", "gaps"),
            f"--dtype bfloat16 --max-model-len 135168 --max-num-seqs 12 --kv-size 36GiB {DENSE}",
            LLAMA_8B,
        ),
        Server(
            ("ttft/128k/sparse",),
            "--dtype bfloat16 --max-model-len 135168 --max-num-seqs 1 --kv-size 18GiB",
            LLAMA_8B,
        ),
        Server(
            ("long",),
            "--dtype bfloat16 --max-model-len 33280 --max-num-seqs 24 "
            f"--kv-size 98GiB {DENSE} {PROMPTS_FIRST}",
            LLAMA_8B,
        ),
        Server(
            ("short",),
            "--dtype bfloat16 --max-model-len 768 --max-num-seqs 256 --select-k 128 --resident 704 "
            f"--kv-size 36GiB {PROMPTS_FIRST}",
            LLAMA_8B,
        ),
        Server(
            ("mixed",),
            "--dtype bfloat16 --max-model-len 135168 --max-num-seqs 516 --kv-size 104GiB",
            LLAMA_8B,
        ),
        Server(("tokens",), "--dtype bfloat16 --max-model-len 2560 --max-num-seqs 64 --kv-size 8GiB"),
    ),
    reference={
        "ttft/512": 0.015,
        "ttft/32k": 1.195,
        "ttft/128k": 10.2,
        "ttft/128k/sparse": 10.2,
        "short": 8993.0,
        "long": 34.7,
    },
)
"""The references are those of vLLM 0.23.0 on one H100 80 GB, 2026-11-26 (docs/measurements.md): bfloat16, and
for ``long`` the KV cache in fp8."""

REFERENCE_NOTE = (
    "The references of serve/ttft, serve/short and serve/long are not of this run: vLLM 0.23.0 with the same "
    "shape on one H100 80 GB, 2026-11-26, in bfloat16; for serve/long with its KV cache in fp8 (in bfloat16 "
    "it took 40.6 s), from the first token to the last one."
)

CPU = Table(
    warm=Load(1, 64, 4),
    ttft={"128": Load(5, 128, 1), "1k": Load(3, 1024, 1)},
    short=Load(8, 64, 8),
    long=Load(2, 1024, 16),
    many=Load(6, 32, 8),
    beside=Load(2, 512, 1024),
    tokens=Load(4, 32, 64),
    streams=Load(2, 128, 1024),
    quiet=16,
    arriving="1k",
    servers=(
        Server(
            ("ttft/128", "ttft/1k", "short", "long", "mixed", "gaps", "tokens"),
            "--max-model-len 2048 --max-num-seqs 8 --kv-size 1GiB",
        ),
    ),
    reference={},
)
"""Small, with the default model and its own weights."""
