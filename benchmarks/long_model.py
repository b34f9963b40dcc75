"""A model for long contexts, from one of the Llama family: SmolLM2-135M-Instruct unless told otherwise.

    python -m benchmarks.long_model OUT --minutes 7        # trains, on a GPU
    python -m benchmarks.long_model OUT --adapter FOLDER   # merges what was trained before

RoPE turns slower (theta 1e6), and every projection gets a low-rank addition (LoRA, Hu et al. 2021) that is
trained, as the norms are, on documentation mixed with the tasks of ``benchmarks.tasks``; an answer weighs
four times as much as text. Half of the time goes to contexts of half the length. OUT becomes a Hugging Face
folder in bfloat16. The model is good for those tasks, over other documents too; how to chat it forgets.
"""

import argparse
import ast
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.tasks import KINDS, Encode, make_item
from clo.runtime.config import DEFAULT_MODEL, ModelConfig
from clo.runtime.model.files import resolve

THETA = 1e6
RANK = 64
SHARES = (0.35, 0.35, 0.2, 0.1)  # of KINDS
ANSWER_WEIGHT = 4.0
RATE, WARM_UP = 1e-3, 20
CHUNK = 4096  # tokens whose logits are held at a time
PROJECTIONS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "g": "mlp.gate_proj", "u": "mlp.up_proj", "d": "mlp.down_proj",
}  # fmt: skip


class LowRank(nn.Module):
    """A weight [out, in] becomes ``weight + b @ a``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(RANK, inputs, device=weight.device) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(outputs, RANK, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def documentation() -> str:
    """All docstrings of the standard library (PSF licence) and of transformers (Apache-2.0)."""
    found: dict[str, None] = {}
    for root in (Path(os.__file__).parent, Path(transformers.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            if {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(root).parts):
                continue
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    found[ast.get_docstring(node) or ""] = None
    return "\n\n".join(found)


def sequences(
    document: list[int], length: int, random: Random, encode: Encode
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences without end: token ids [T] int64, T up to ``length`` + 1, and their weights [T] float32."""
    while True:
        kind = random.choices(KINDS, SHARES)[0]
        item = make_item(kind, document, length * 15 // 16, random.getrandbits(32), encode)
        weights = [1.0] * len(item.prompt) + [ANSWER_WEIGHT if scored else 0.0 for scored in item.scored]
        yield torch.tensor(item.prompt + item.answer)[: length + 1], torch.tensor(weights)[: length + 1]


def loss_of(model: Any, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the losses at all tokens [T] but the first."""
    hidden = model.model(tokens[None, :-1], use_cache=False).last_hidden_state[0]

    def chunk_loss(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")
        return (losses * weights).sum()

    parts = zip(hidden.split(CHUNK), tokens[1:].split(CHUNK), weights[1:].split(CHUNK), strict=True)
    losses = [checkpoint(chunk_loss, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum() / weights[1:].sum()


def train(model: Any, encode: Encode, positions: int, minutes: float) -> None:
    """Train low-rank additions and norms for so long, and merge them into the weights."""
    model.requires_grad_(False)
    projections = [layer.get_submodule(path) for layer in model.model.layers for path in PROJECTIONS.values()]
    for linear in projections:
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("norm.weight", ".a", ".b")))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    document, random = encode(documentation()), Random(0)
    halves = [sequences(document, length, random, encode) for length in (positions // 2, positions)]
    began, step = time.monotonic(), 0
    while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
        half = int(share >= 0.5)
        cooled = 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * cooled
        batch, total = (4, 2)[half], 0.0  # as many tokens in either half
        for _ in range(batch):
            tokens, weights = (tensor.to(model.device) for tensor in next(halves[half]))
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = loss_of(model, tokens, weights) / batch
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 1:
            print(f"step {step}, {share:.0%} of the time, loss {total:.3f}", file=sys.stderr)
    for linear in projections:
        parametrize.remove_parametrizations(linear, "weight")


@torch.no_grad()
def merge(model: Any, folder: Path) -> None:
    """Add an adapter from its safetensors files.

    For layer N they hold ``blocks.N.P.a`` and ``.b`` of each projection P, and its norms ``blocks.N.n1`` and
    ``.n2``; ``norm`` is the last norm.
    """
    adapter: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        adapter |= load_file(file)
    model.model.norm.weight.copy_(adapter["norm"])
    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.weight.copy_(adapter[f"blocks.{number}.n1"])
        layer.post_attention_layernorm.weight.copy_(adapter[f"blocks.{number}.n2"])
        for name, path in PROJECTIONS.items():
            a, b = (adapter[f"blocks.{number}.{name}.{part}"].float() for part in "ab")
            layer.get_submodule(path).weight.add_(b @ a)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_model", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder of the model to extend")
    parser.add_argument("--positions", type=int, default=32768, help="longest sequence")
    parser.add_argument("--minutes", type=float, default=7.0, help="of training")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter to merge in place of training")
    arguments = parser.parse_args()
    folder = resolve(ModelConfig(model=arguments.model)).folder
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = arguments.positions
    config.rope_parameters["rope_theta"] = THETA
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if arguments.adapter is not None:
        merge(model, arguments.adapter)
    else:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        encode = partial(tokenizer.encode, add_special_tokens=False)
        train(model, encode, arguments.positions, arguments.minutes)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
