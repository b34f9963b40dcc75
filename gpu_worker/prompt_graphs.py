"""Prefill of short prompts, several at a time: one CUDA graph from their tokens to their first logits.

A short prompt is bound by the host that launches its kernels, one layer after the other, rather than by its
arithmetic. On the CPU, and in 32-bit dtypes, there are no graphs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.prompt import Prompts
from clo.gpu_worker.graphs import capturing
from clo.gpu_worker.model.decoder import Decoder
from clo.kernels.attend_prompt import attend_prompts
from clo.kernels.blocks import PromptBlocks
from clo.kernels.fill_resident import PromptSequences
from clo.runtime.model.kv_shape import KVShape

SIZES = (256, 512, 1024, 2048)  # tokens of a graph
_MOST_PROMPTS = 32  # of a graph


def prompt_graph_bytes(shape: KVShape) -> int:
    """About the GPU memory of the graphs' activations."""
    return SIZES[-1] * (20 * shape.width_bytes + 4 * shape.hidden_bytes + shape.token_bytes)


class ShortPrompt(NamedTuple):
    """A prompt for a graph: its slot, its tokens, and the blocks and pages that take its rows."""

    slot: int
    tokens: list[int]
    blocks: list[int]
    pages: list[int]


class _Inputs:
    """The inputs of a graph: views of one buffer, which one copy fills."""

    def __init__(self, size: int, prompts: int, parts: int, device: torch.device) -> None:
        self.size, self.prompts, self.parts = size, prompts, parts
        self._widths = [size, size, prompts + 1, *[prompts] * 4, *[parts] * 4]
        self._buffer = torch.zeros(sum(self._widths), dtype=torch.int64, device=device)
        (
            self.tokens, self.positions, self.bounds, self.last, starts, lengths, slots,
            first, counts, blocks, pages,
        ) = self._buffer.split(self._widths)  # fmt: skip
        lengths.fill_(1)  # of no prompt, while the graph is captured
        self.where = Prompts(
            PromptSequences(starts, lengths, slots), PromptBlocks(first, counts, blocks, pages), None
        )

    def fill(self, prompts: list[ShortPrompt], block_tokens: int) -> None:
        """Describe the next batch."""
        tokens: list[int] = []
        positions: list[int] = []
        bounds = [0]
        sequences: list[tuple[int, int, int, int]] = []  # last token, start, length, slot
        parts: list[tuple[int, int, int, int]] = []  # start, count, block, page
        for slot, ids, blocks, pages in prompts:
            start, length = len(tokens), len(ids)
            tokens += ids
            positions += range(length)
            bounds.append(len(tokens))
            sequences.append((bounds[-1] - 1, start, length, slot))
            for offset, block, page in zip(range(0, length, block_tokens), blocks, pages, strict=False):
                parts.append((start + offset, min(block_tokens, length - offset), block, page))
        sequences += [sequences[-1]] * (self.prompts - len(sequences))  # what is done twice does no harm
        parts += [(0, 0, 0, 0)] * (self.parts - len(parts))
        bounds += [len(tokens)] * (self.prompts + 1 - len(bounds))
        padding = [0] * (self.size - len(tokens))
        columns = (*zip(*sequences, strict=True), *zip(*parts, strict=True))
        values = [*tokens, *padding, *positions, *padding, *bounds]
        for column in columns:
            values += column
        self._buffer.copy_(torch.tensor(values, pin_memory=True), non_blocking=True)


class PromptGraphs:
    """Graphs of a few sizes, in one pool of memory.

    Args:
        decoder: the model.
        cache: takes the rows.
        slots: sequences at a time.

    Attributes:
        longest: tokens of the longest prompt that a graph takes; 0 where there are no graphs.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, slots: int) -> None:
        self._decoder, self._cache = decoder, cache
        self._prompts = min(slots, _MOST_PROMPTS)
        self._graphs: dict[int, tuple[_Inputs, torch.cuda.CUDAGraph, Tensor]] = {}
        self.longest = 0

    def capture(self) -> None:
        """Capture the graphs, before there is any sequence."""
        shape, device = self._decoder.shape, self._decoder.device
        if device.type != "cuda" or shape.dtype == torch.float32:
            return
        stream, pool = torch.cuda.Stream(device), None
        for size in tqdm(SIZES[::-1], desc="Capturing prefill", disable=None):
            inputs = _Inputs(size, self._prompts, size // shape.block_tokens + self._prompts, device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._forward(inputs)  # compiles what is not yet compiled
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool, stream):
                logits = self._forward(inputs)
            self._graphs[size] = inputs, graph, logits
            pool = graph.pool()
        torch.cuda.synchronize()
        self.longest = min(SIZES[-1], self._cache.fitting_tokens or SIZES[-1])

    def size(self, tokens: int) -> int | None:
        """Tokens of the smallest graph that takes so many, or None."""
        return min((size for size in self._graphs if size >= tokens), default=None)

    @property
    def most(self) -> int:
        """Prompts of a batch at most."""
        return self._prompts

    def run(self, prompts: list[ShortPrompt]) -> Tensor:
        """Prefill prompts of at most ``longest`` tokens each, which together fit into a graph.

        Returns:
            logits [len(prompts), vocab] float32 of their first tokens, overwritten by the next run.
        """
        size = self.size(sum(len(prompt.tokens) for prompt in prompts))
        if size is None or len(prompts) > self._prompts:
            raise ValueError(f"No graph takes these {len(prompts)} prompts together.")
        inputs, graph, logits = self._graphs[size]
        inputs.fill(prompts, self._decoder.shape.block_tokens)
        graph.replay()
        return logits[: len(prompts)]

    def _forward(self, inputs: _Inputs) -> Tensor:
        decoder, cache, last = self._decoder, self._cache, inputs.last
        bounds = inputs.bounds.int()
        hidden = decoder.embed(inputs.tokens)
        rope = decoder.rope(inputs.positions)
        normed = decoder.input_norm(0, hidden)
        layers = decoder.shape.layers
        for layer in range(layers):
            query, rows = decoder.qkv(layer, normed, rope)
            rows = rows.contiguous()
            attended, lse = attend_prompts(query, rows, bounds, decoder.scale)
            cache.take_rows(layer, rows, inputs.where)
            cache.start_sets(layer, rows, inputs.where, lse[last])
            if layer == layers - 1:  # no other token's output is used
                hidden, attended = hidden[last], attended[last]
            hidden, normed = decoder.add_attention(layer, hidden, attended)
            hidden, normed = decoder.add_mlp(layer, hidden, normed)
        cache.join_prompts()
        return decoder.logits(normed)
