"""CLO's cache for ``model.generate`` of transformers: KV in CPU memory, an index and some rows on the GPU.

    cache = OffloadedSparseCache(model, max_tokens=32768)
    output = model.generate(**inputs, cache=cache, max_new_tokens=200)

(``past_key_values=cache`` before transformers 5.24.)

It does in one process what a server does, without CUDA graphs and without prefetching: to study the cache in
a program that has a model already, or to fit a context into a small GPU. A server is faster.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import PROMPT_QUERIES
from clo.gpu_worker.cache.prompt import LastTokens, Prompts, one_prompt
from clo.gpu_worker.pinning import pin
from clo.kernels.attend_prompt import attend_prompt
from clo.kvstore.arena import Arena
from clo.kvstore.layout import arena_tensor, by_block
from clo.runtime.config import CacheConfig
from clo.runtime.model.model_config import kv_shape
from clo.runtime.wire.messages import CacheStats

_NAME = "clo"  # of the attention, among those of transformers


class OffloadedSparseCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache for one call of ``generate``, or for several that go on with the same sequences.

    From now on the model attends through such a cache; ``model.set_attn_implementation("sdpa")`` ends that.
    Prompts attend to all tokens before them, and go to CPU memory layer by layer. Prompts of a batch may be
    padded on the left. Tokens that follow a prompt are computed one at a time, however many are given.

    Args:
        model: one of the families that CLO knows, on one device, in one dtype.
        max_tokens: longest sequence, with the prompt.
        batch_size: sequences.
        options: of ``clo.runtime.config.CacheConfig``, such as ``select_k``, ``resident`` and ``gate``.

    Raises:
        ConfigError: the model has layers that CLO does not know, or an option has a wrong value.
        ValueError: a sequence is longer than ``max_tokens``, there are more than ``batch_size``, a prompt is
            padded elsewhere, or beams are to be reordered.
    """

    def __init__(self, model: PreTrainedModel, max_tokens: int, batch_size: int = 1, **options: Any) -> None:
        self._shape = shape = kv_shape(model.config, str(model.dtype).removeprefix("torch."))
        self._max_tokens, self._slots, self._device = max_tokens, batch_size, model.device
        each = -(-max_tokens // shape.block_tokens)
        self._blocks = [list(range(slot * each, (slot + 1) * each)) for slot in range(batch_size)]
        memory = Arena.create(batch_size * each * shape.block_bytes)
        rows = arena_tensor(memory, shape, batch_size * each)
        arena = by_block(pin(rows) if model.device.type == "cuda" else rows)
        config = CacheConfig(prefetch="off", **options)
        self._cache = KVCache(
            shape, arena, config, batch_size, max_tokens, shape.head_dim**-0.5, model.device
        )
        self._block_tables, self._page_tables = (
            torch.tensor(table, device=model.device)
            for table in (self._blocks, [self._cache.pages.acquire(held) for held in self._blocks])
        )
        super().__init__(layers=[_Layer(self) for _ in range(shape.layers)])
        model.set_attn_implementation(_NAME)
        self.reset()

    @property
    def stats(self) -> list[CacheStats]:
        """What the cache did for each sequence."""
        lengths = self._lengths.tolist()
        return [
            self._cache.stats(self._cache.counters(slot).tolist(), length, self._steps)
            for slot, length in enumerate(lengths)
        ]

    def reset(self) -> None:
        """Begin with other sequences."""
        self.seen = self._steps = 0
        self._lengths = torch.zeros(self._slots, dtype=torch.int64, device=self._device)
        self._prompts: list[Prompts] = []
        for slot in range(self._slots):
            self._cache.reset_counters(slot)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("OffloadedSparseCache has one place for each sequence; generate without beams.")

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    def attend(self, layer: int, query: Tensor, rows: Tensor, padding: Tensor | None, scale: float) -> Tensor:
        """Take rows of new tokens and attend to all.

        Args:
            query: [B, N, query_heads, head_dim]; rows: [B, N, kv_heads, 2, head_dim].
            padding: [B, T] bool, whether a place holds a token; None where all do.

        Returns:
            [B, N, query_heads, head_dim].
        """
        if layer == 0:
            self._check(*query.shape[:2])
        out = torch.zeros_like(query)
        if self.seen == 0:
            self._prefill(layer, query, rows, padding, scale, out)
        else:
            self._step(layer, query, rows, padding, out)
        if layer == self._shape.layers - 1:
            self.seen += query.shape[1]
        return out

    def _check(self, batch: int, count: int) -> None:
        if self.seen + count > self._max_tokens:
            raise ValueError(f"{self.seen + count} tokens are more than the cache's {self._max_tokens}.")
        if batch != self._slots:
            raise ValueError(f"The cache was made for a batch of {self._slots}, and this is one of {batch}.")

    def _prefill(
        self, layer: int, query: Tensor, rows: Tensor, padding: Tensor | None, scale: float, out: Tensor
    ) -> None:
        count = query.shape[1]
        if layer == 0:
            lengths = [count] * self._slots if padding is None else padding.sum(1).tolist()
            if padding is not None and not all(
                bool(line[count - length :].all()) for line, length in zip(padding, lengths, strict=True)
            ):
                raise ValueError("Prompts have to be padded on the left.")
            self._lengths = torch.tensor(lengths, device=self._device)
            self._prompts = [
                one_prompt(
                    slot, length, self._blocks[slot], self._block_tables[slot], self._page_tables[slot],
                    self._shape.block_tokens,
                )
                for slot, length in enumerate(lengths)
            ]  # fmt: skip
        for slot, prompts in enumerate(self._prompts):
            first = count - int(prompts.blocks.counts.sum())
            own, own_rows = query[slot, first:], rows[slot, first:].contiguous()
            out[slot, first:], lse = attend_prompt(own, own_rows, scale)
            last = LastTokens(own[-PROMPT_QUERIES:], lse[-PROMPT_QUERIES:])
            self._cache.take_rows(layer, own_rows, prompts)
            self._cache.start_sets(layer, own_rows, prompts, lse[-1:], last)
        if layer == self._shape.layers - 1:
            self._cache.join_prompts()

    def _step(self, layer: int, query: Tensor, rows: Tensor, padding: Tensor | None, out: Tensor) -> None:
        count = query.shape[1]
        if layer == 0 and count > 1 and padding is not None and not bool(padding[:, -count:].all()):
            raise ValueError("Only the first tokens of a sequence may be padded.")
        for number in range(count):
            batch = Batch(self._lengths + number + 1, self._block_tables, self._page_tables)
            new = rows[:, number].contiguous()
            out[:, number] = self._cache.attend(
                layer, query[:, number].contiguous(), new, batch, None, select=True
            )
            self._cache.end_step()
        if layer == self._shape.layers - 1:
            self._lengths = self._lengths + count
            self._steps += count


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """A layer as transformers sees it: it hands new rows on, with the cache to take them."""

    is_sliding = False

    def __init__(self, cache: OffloadedSparseCache) -> None:
        super().__init__()
        self._whole = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key_states.clo_cache = self._whole  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._whole.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self._whole.seen

    def get_max_length(self) -> int:
        return self._whole.max_tokens


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cache: OffloadedSparseCache | None = getattr(key, "clo_cache", None)
    if cache is None:
        raise ValueError(
            "This model attends through an OffloadedSparseCache: pass one to it, or call "
            "model.set_attn_implementation('sdpa')."
        )
    if dropout:
        raise ValueError("OffloadedSparseCache is for generation; call model.eval() first.")
    rows = torch.stack((key, value), 3).transpose(1, 2)  # [B, N, kv_heads, 2, head_dim]
    layer: int = module.layer_idx  # type: ignore[assignment]
    return cache.attend(layer, query.transpose(1, 2), rows, attention_mask, scaling), None


def _padding(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
    """Which places hold tokens; more need not be masked."""
    return attention_mask


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _padding)
