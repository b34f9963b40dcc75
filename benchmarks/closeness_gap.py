"""Why the KL of ``benchmarks.gpu.real`` is above that of ``benchmarks.quality``, one factor at a time.

    python -m benchmarks.closeness_gap --device cuda --items 2    # the items that gpu-real.json judges
    python -m benchmarks.closeness_gap --device cuda --items 16   # all of those that it decodes

The items are those of ``real/smollm2``: prompts of 6,000 tokens, 256 tokens of each answer forced by decode
steps. The default model runs in float32 and in bfloat16, and KL(a || b) compares two runs over the same
tokens: ``full`` is the engine's own pass with full attention, ``transformers`` that of transformers,
``steps`` full attention by decode steps and ``default`` the default cache. The 95 % intervals are those of
``benchmarks.quality``: a bootstrap over blocks of 16 successive tokens.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.quality.forcing import FULL, Numbers, Reference
from benchmarks.quality.metrics import blocks, divergences, estimate
from benchmarks.result import Result, write
from benchmarks.tasks import KINDS, Item, Kind, documents, make_item
from clo.gpu_worker.cache.query_prediction import measure_query_sources
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, DType, ModelConfig, ResolvedModel
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

PROMPT, FORCED = 6000, 256  # tokens
DTYPES: tuple[DType, DType] = ("float32", "bfloat16")
PAIRS = (
    ("float32 full", "float32 default"),
    ("bfloat16 full", "bfloat16 default"),
    ("bfloat16 transformers", "bfloat16 default"),  # what gpu-real.json holds
    ("float32 full", "bfloat16 default"),
    ("bfloat16 full", "bfloat16 steps"),
    ("bfloat16 transformers", "bfloat16 full"),  # the reference there
    ("bfloat16 transformers", "bfloat16 steps"),
    ("float32 full", "bfloat16 transformers"),
    ("float32 full", "bfloat16 steps"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.closeness_gap", description=__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--kinds", default=",".join(KINDS), help="of items (%(default)s)")
    parser.add_argument("--items", type=int, default=2, help="of each kind (%(default)s)")
    parser.add_argument("--name", default="closeness-gap", help="of the file in benchmarks/results")
    options = parser.parse_args()
    float32, bfloat16 = (resolve(ModelConfig(dtype=dtype, device=options.device)) for dtype in DTYPES)
    if float32.device == "cpu":
        F.linear = _linear_by_float32  # type: ignore[assignment]
    sources = [measure_query_sources(load_decoder(resolved)) for resolved in (float32, bfloat16)]
    differing = sum(one is not other for one, other in zip(*sources, strict=True))
    results = [Result("gap", "layers whose source depends on the dtype", differing, "layers")]
    for kind in options.kinds.split(","):
        items = items_of(float32, kind, options.items)
        said = {
            **by_engine(float32, items, {"default": CacheConfig()}),
            **by_engine(bfloat16, items, {"default": CacheConfig(), "steps": FULL}),
            "bfloat16 transformers": by_transformers(bfloat16, items),
        }
        for one, other in PAIRS:
            results += results_of(f"gap/{kind}/{one} || {other}", divergences(said[one], said[other]))
    write(options.name, results)


def items_of(resolved: ResolvedModel, kind: Kind, count: int) -> list[Item]:
    """The first items of a kind among those of ``benchmarks.gpu.real``: kinds and documents in turn."""
    tokenizer = Tokenizer(resolved.folder, resolved.vocab_size)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**9, continues=True)

    texts = documents(encode)
    numbers = range(KINDS.index(kind), count * len(KINDS), len(KINDS))
    return [make_item(kind, texts[number % len(texts)], PROMPT, number, encode) for number in numbers]


@torch.inference_mode()
def by_engine(
    resolved: ResolvedModel, items: list[Item], settings: dict[str, CacheConfig]
) -> dict[str, Tensor]:
    """Logits [items, FORCED - 1, vocab] of full attention and of decode steps with each setting."""
    reference, dtype = Reference(load_decoder(resolved), items, FORCED), resolved.dtype
    said = {f"{dtype} full": reference.logits[:, 1:]}
    for name, config in settings.items():
        steps = [logits.clone() for logits in reference.decode(reference.engine(config))]
        said[f"{dtype} {name}"] = torch.stack(steps, dim=1)
        print(f"{dtype} {name}", file=sys.stderr, flush=True)
    return said


@torch.inference_mode()
def by_transformers(resolved: ResolvedModel, items: list[Item]) -> Tensor:
    """The same by one pass of transformers over each prompt and its answer."""
    network = AutoModelForCausalLM.from_pretrained(resolved.folder, dtype=resolved.dtype)
    network.to(resolved.device).eval()
    rows = []
    for item in items:
        tokens = torch.tensor([item.prompt + item.answer[: FORCED - 1]], device=resolved.device)
        rows.append(network(tokens, use_cache=False, logits_to_keep=FORCED - 1).logits[0].float())
    return torch.stack(rows)


def results_of(case: str, kl: Numbers) -> list[Result]:
    """The mean with its interval, and the mean of each item."""
    mean = estimate(blocks(kl))
    ends = {"KL": mean.value, "KL, 95% low": mean.low, "KL, 95% high": mean.high}
    single = {f"KL of item {number}": float(row.mean()) for number, row in enumerate(kl)}
    return [Result(case, metric, value, "nats") for metric, value in {**ends, **single}.items()]


def _linear_by_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float32, rounded to the operands' type, as bfloat16 units do it: on a CPU without such
    units torch's own takes five times as long."""
    product = torch.matmul(x.float(), weight.float().T)
    return (product if bias is None else product + bias.float()).to(x.dtype)


if __name__ == "__main__":
    main()
