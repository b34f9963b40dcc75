"""transformers' own model and its greedy tokens, which tests measure against."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM


def transformers_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """``count`` greedy tokens of transformers' own generate, without stopping at EOS."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def load_transformers(folder: str) -> Any:
    """The model in float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
