"""Every family computes what transformers computes, over prefill and decode; other models are refused."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from clo.gpu_worker.in_process import divergence, make_engine, teacher_force
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.runtime.config import CacheConfig, DType, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.wire.errors import ConfigError
from tests.reference import load_transformers

PROMPT, CONTINUATION = 1018, 20  # two prefill chunks; decoding goes from the second block into the third
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-2),
    "llama-tied-llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-biases-yarn": LlamaConfig(**SIZES, rope_parameters=YARN, attention_bias=True, mlp_bias=True),
    "mistral-linear": MistralConfig(**SIZES, rope_parameters=LINEAR, sliding_window=None, head_dim=24),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "one-kv-head": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
}


def save(name: str, folder: Path) -> str:
    """A model of the named configuration, no parameter of which could be left out unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which transformers sets to 1 and 0
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def load(folder: str, dtype: DType = "auto") -> Decoder:
    return load_decoder(resolve(ModelConfig(model=folder, device="cpu", dtype=dtype)))


def random_tokens() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    tokens: list[int] = torch.randint(300, (PROMPT + CONTINUATION,), generator=generator).tolist()
    return tokens


def engine_logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    """[CONTINUATION, vocab]: the first row from prefill, the others from decoding."""
    engine = make_engine(decoder, CacheConfig(attention="full"), 1, len(tokens))
    return teacher_force(engine, tokens[:-CONTINUATION], tokens[-CONTINUATION:])


@torch.inference_mode()
def transformers_logits(model: Any, tokens: list[int]) -> Tensor:
    """The same of transformers, in one pass and without a cache."""
    logits: Tensor = model(torch.tensor([tokens])).logits[0, -CONTINUATION - 1 : -1].float()
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder, tokens = save(name, tmp_path), random_tokens()
    expected = transformers_logits(load_transformers(folder), tokens)
    logits = engine_logits(load(folder), tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize(("dtype", "nats"), [("float16", 2e-5), ("bfloat16", 1e-3)])
@pytest.mark.parametrize("name", ["llama-tied-llama3", "llama-biases-yarn", "qwen2", "qwen3-tied"])
def test_half_precision_stays_close(name: str, dtype: DType, nats: float, tmp_path: Path) -> None:
    """Positions lie above 256, where bfloat16 no longer counts."""
    folder, tokens = save(name, tmp_path), random_tokens()[-400:]
    exact = transformers_logits(load_transformers(folder), tokens)
    decoder = load(folder, dtype)
    assert decoder.shape.dtype == getattr(torch, dtype)
    assert divergence(engine_logits(decoder, tokens), exact) < nats


@pytest.mark.parametrize("name", ["llama-biases-yarn", "qwen2", "qwen3-tied"])
def test_the_predicting_query_is_the_layers_own(name: str, tmp_path: Path) -> None:
    decoder = load(save(name, tmp_path))
    hidden = decoder.input_norm(1, decoder.embed(torch.arange(7)))
    rope = decoder.rope(torch.arange(100, 107))
    for layer in range(decoder.shape.layers):
        query, _ = decoder.qkv(layer, hidden, rope)
        torch.testing.assert_close(decoder.query(layer, hidden, rope), query)


ROPE: dict[str, Any] = {"rope_theta": 10000.0}
SLIDING: dict[str, Any] = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 256}


def without_weights(folder: Path, changes: dict[str, Any], max_model_len: int | None = None) -> ModelConfig:
    """A model of a small Llama's configuration, with changes, whose weights are not asked for."""
    config = json.loads(LlamaConfig(**SIZES).to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(config | changes))
    return ModelConfig(model=str(folder), device="cpu", load_format="dummy", max_model_len=max_model_len)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "family 'gpt2'; CLO knows llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "family 'None'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"hidden_size": "wide"}, "not a valid configuration: .*hidden_size"),
        ({"num_attention_heads": 0}, "not a valid configuration"),
        ({"num_key_value_heads": 0}, "num_key_value_heads of 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers of -1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings of 0"),
        ({"num_key_value_heads": 3}, "4 query heads and 3 KV heads"),
        ({"head_dim": 18}, "head_dim of 18; the index needs a positive multiple of 4"),
        ({"head_dim": -4}, "head_dim of -4"),
        ({"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "scaling of type 'dynamic'"),
        ({"rope_parameters": {**ROPE, "rope_type": "spiral"}}, "scaling of type 'spiral'"),
        ({"rope_parameters": {**ROPE, "rope_type": "llama3"}}, "not a valid configuration"),
        ({"rope_parameters": {**YARN, "factor": None}}, "RoPE parameters that cannot be computed with"),
        ({"rope_parameters": {**YARN, "factor": "4"}}, "RoPE parameters that cannot be computed with"),
        ({"rope_parameters": {**YARN, "factor": 1e30}}, "RoPE parameters that cannot be computed with"),
        ({"rope_parameters": {**YARN, "rope_theta": 0}}, "RoPE parameters that cannot be computed with"),
        ({"rope_parameters": {**LINEAR, "rope_theta": "x"}}, "RoPE parameters that cannot be computed with"),
        ({"rope_parameters": {**LINEAR, "factor": float("inf")}}, "RoPE parameters that cannot be computed"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 0}}, "RoPE parameters that cannot be computed"),
        (
            {"rope_parameters": {**ROPE, "rope_type": "default", "rope_theta": None}},
            "cannot be computed with",
        ),
        ({"layer_types": ["full_attention"] * 2}, "not a valid configuration: .*layer_types"),
        ({"layer_types": ["linear_attention"] * 3}, "knows full_attention, sliding_attention"),
        ({"hidden_size": 10**30}, "hidden_size of 10{30}"),
        ({"torch_dtype": []}, "not a valid configuration"),
        ({"quantization_config": "int4"}, "not a valid configuration"),
        ({"partial_rotary_factor": 0.5}, "rotates only a part of each head"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"model_type": "mistral", "sliding_window": 512}, "window of 512 tokens.*--max-model-len 512"),
        (
            {**SLIDING, "max_window_layers": 2},
            "window of 256 tokens",
        ),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(without_weights(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "max_model_len", "length"),
    [
        ({}, None, 2048),
        ({}, 100, 100),
        ({"model_type": "mistral", "sliding_window": 512}, 512, 512),
        ({"model_type": "mistral", "sliding_window": None}, None, 2048),
        ({**SLIDING, "use_sliding_window": False}, None, 2048),
        (  # no layer is that far up
            {**SLIDING, "max_window_layers": SIZES["num_hidden_layers"]},
            None,
            2048,
        ),
    ],
)
def test_a_window_that_makes_no_difference_is_none(
    tmp_path: Path, changes: dict[str, Any], max_model_len: int | None, length: int
) -> None:
    assert resolve(without_weights(tmp_path, changes, max_model_len)).max_model_len == length


QWEN_CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"rope_scaling": QWEN_CARD, "rope_parameters": None, "max_position_embeddings": 640}, 2048),
        ({"rope_parameters": ROPE | QWEN_CARD, "max_position_embeddings": 2048}, 2048),
        ({"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}, 8192),  # of all its positions
        ({"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 2.5}}, 5120),
        ({"rope_parameters": LINEAR}, 4096),
        ({"rope_parameters": LLAMA3}, 2048),  # its positions are those after scaling
    ],
)
def test_the_context_follows_from_rope_scaling_as_vllm_derives_it(
    tmp_path: Path, changes: dict[str, Any], length: int
) -> None:
    """YaRN is written as on Qwen's model cards, which leave ``max_position_embeddings`` alone."""
    config = without_weights(tmp_path, changes)
    assert resolve(config).max_model_len == length
    longer = dataclasses.replace(config, max_model_len=length + 1)
    with pytest.raises(ConfigError, match=f"{length + 1} exceeds the {length} positions"):
        resolve(longer)


def test_no_value_of_a_config_file_ends_in_a_traceback(tmp_path: Path) -> None:
    """Every field with a value of every kind: a model that loads, or one sentence."""
    config = without_weights(tmp_path, {})
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    values: tuple[Any, ...] = (None, 0, -1, 1.5, "x", True, [], {}, [1], {"a": 1}, 10**30, float("nan"))
    for name in [*written, "rope_scaling", "torch_dtype", "quantization_config", "layer_types"]:
        for value in values:
            path.write_text(json.dumps(written | {name: value}))
            with contextlib.suppress(ConfigError):
                resolve(config)
