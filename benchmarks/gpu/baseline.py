"""transformers' own decode, eager and with its own caches, of models with random weights and random KV."""

import gc
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.synthetic import Model

_ROOM = 32  # tokens short of the context at the first step; less would move all KV to larger blocks of memory


def llama_config(model: Model) -> LlamaConfig:
    """transformers' configuration of a Llama in the shape of a model."""
    return LlamaConfig(
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.query_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=2**18,
        attention_bias=model.qkv_bias,
        tie_word_embeddings=False,
    )


def random_network(model: Model, device: str = "cuda") -> Any:
    """transformers' Llama in bfloat16, in the shape of a model."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            llama_config(model), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()


class Decode:
    """Sequences of one length in the midst of decoding; a call is one greedy step of all.

    Args:
        network: of ``random_network``.
        sequences: at a time.
        context: tokens of each.
        offloading: the cache lies in CPU memory and is copied as a whole, a layer ahead.
    """

    def __init__(self, network: Any, sequences: int, context: int, *, offloading: bool = False) -> None:
        config = network.config
        self._network = network
        self._cache = DynamicCache(config=config, offloading=offloading)
        self._tokens = torch.zeros(sequences, 1, dtype=torch.int64, device=network.device)
        shape = (sequences, config.num_key_value_heads, context - _ROOM, config.head_dim)

        def random() -> Tensor:
            return torch.randn(shape, dtype=network.dtype, device=network.device)

        for layer in range(config.num_hidden_layers):
            self._cache.update(random(), random(), layer)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """The logits [sequences, 1, vocab] of the step."""
        logits: Tensor = self._network(self._tokens, past_key_values=self._cache).logits
        self._tokens = logits.argmax(-1)
        return logits


def decode_rates(model: Model, context: int, sequences: int, offloaded: int) -> tuple[float, float]:
    """Tokens per second of ``sequences`` whose KV is on the GPU, and of ``offloaded`` whose KV is not."""
    network = random_network(model)
    rate = sequences / seconds(Decode(network, sequences, context), 5)
    return rate, offloaded / seconds(Decode(network, offloaded, context, offloading=True), 2)


def release() -> None:
    """Give back the memory that nothing uses, on the GPU and pinned beside it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()
