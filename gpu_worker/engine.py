"""The decode step: from the last tokens of all slots to the next ones."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clo.gpu_worker.cache.kv_cache import Batch, KVCache
from clo.gpu_worker.cache.query_prediction import QuerySource, measure_query_sources
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.outputs import Mailbox
from clo.gpu_worker.prefill import Prefill
from clo.gpu_worker.side_stream import DeviceEvent, SideStream
from clo.kernels.sample import sample
from clo.kernels.update_resident import FetchList
from clo.runtime.config import CacheConfig
from clo.runtime.wire.messages import NO_STATS, CacheStats, Logprob, Sampling

_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # batch sizes of the captured graphs


class StepHandle(NamedTuple):
    """A step on its way: its tokens come by mailbox."""

    number: int
    rows: list[int]  # of the entry and of the logits, one for each slot that was asked for
    logits: Tensor  # [rows, vocab] float32; overwritten by the next step


class SlotRelease:
    """A slot on its way out: once ``mark`` is reached the device no longer touches it."""

    def __init__(self, cache: KVCache, slot: int, device: torch.device) -> None:
        self._cache = cache
        self._counters = torch.empty(4, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._counters.copy_(cache.counters(slot), non_blocking=True)
        cache.reset_counters(slot)
        self.mark = DeviceEvent(device)

    def stats(self, tokens: int, steps: int) -> CacheStats:
        """What the cache did for the sequence, ``tokens`` long, in ``steps`` decode steps."""
        return self._cache.stats(self._counters.tolist(), tokens, steps) if steps else NO_STATS


class Engine:
    """Model, cache and the state of every slot: length, blocks, current token, sampling parameters.

    Nothing here waits for the device. On a GPU a decode step is one CUDA graph, from embedding to sampled
    token, captured for a few batch sizes; a step takes the smallest that holds its highest slot.

    Args:
        decoder: the model.
        arena: [blocks, layers, kv_heads, block_tokens, 2, head_dim], readable by the model's device.
        config: the knobs of the cache.
        slots: sequences at a time.
        max_tokens: longest sequence.
        sources: what each layer selects with where it prefetches; measured if None.
    """

    def __init__(
        self,
        decoder: Decoder,
        arena: Tensor,
        config: CacheConfig,
        slots: int,
        max_tokens: int,
        sources: tuple[QuerySource, ...] | None = None,
    ) -> None:
        self.decoder = decoder
        self._device = device = decoder.device
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self._pool: Any = None  # memory of all graphs
        # one for all captures, as graphs that share a pool need
        self._capturing = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.depth = 2 if device.type == "cuda" else 1
        """Steps that should be on their way at a time, so that the device does not wait for the host."""
        self.cache = KVCache(decoder.shape, arena, config, slots, max_tokens, decoder.scale, device)
        self._ahead = SideStream(device), SideStream(device)  # of even, of odd layers
        self._accepts = config.prefetch == "predicted"
        if config.prefetch == "off" or config.attention != "clo":
            sources = (QuerySource.OWN,) * decoder.shape.layers
        self._sources = measure_query_sources(decoder) if sources is None else sources

        max_blocks = -(-max_tokens // decoder.shape.block_tokens)
        self._block_table = torch.zeros(slots, max_blocks, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._temperature = torch.zeros(slots, device=device)
        self._top_p = torch.ones(slots, device=device)
        self._top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self._seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self._reading = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mailbox = Mailbox(slots, device)
        self._posted = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the graphs, with a progress bar; on the CPU there is nothing to do."""
        if self._device.type != "cuda":
            return
        slots = len(self._lengths)
        sizes = [size for size in _BUCKETS if size < slots] + [slots]
        # disable=None: shown only where stderr is a terminal
        for size in tqdm(sizes[::-1], desc="Capturing graphs", disable=None):  # largest first, for one pool
            self._capture(size)
        torch.cuda.synchronize()
        self._mailbox.reset()

    def _capture(self, size: int) -> None:
        stream = self._capturing
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(size)  # compiles what is not yet compiled
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            self._logits[size] = self._step(size)
        self._graphs[size] = graph
        self._pool = graph.pool()

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: list[int], blocks: list[int]) -> Prefill:
        """Begin the prefill of a sequence in a free slot."""
        row = torch.zeros(
            self._block_table.shape[1], dtype=torch.int64, pin_memory=self._device.type == "cuda"
        )
        row[: len(blocks)] = torch.tensor(blocks)
        self._block_table[slot].copy_(row, non_blocking=True)
        return Prefill(self.decoder, self.cache, slot, tokens, self._block_table[slot])

    @torch.inference_mode()
    def activate(self, slot: int, length: int, sampling: Sampling, seed: int) -> None:
        """The sequence of a slot, ``length`` tokens long, decodes from now on."""
        self.cache.join_prompt()
        # an assignment of a number would wait for the device
        self._lengths[slot].fill_(length)
        self._temperature[slot].fill_(sampling.temperature)
        self._top_p[slot].fill_(sampling.top_p)
        self._top_k[slot].fill_(sampling.top_k)
        self._seed[slot].fill_(seed)

    @torch.inference_mode()
    def retire(self, slot: int) -> SlotRelease:
        """The sequence of a slot ends after the steps on their way."""
        self._lengths[slot].zero_()
        return SlotRelease(self.cache, slot, self._device)

    @torch.inference_mode()
    def feed(self, slot: int, token: int) -> None:
        """Replace the token that the next step reads (teacher forcing)."""
        self._tokens[slot].fill_(token)

    @torch.inference_mode()
    def mirror(self, other: "Engine", slot: int) -> None:
        """Slot 0 takes over blocks, length and token of another engine's slot; the arena must be the same."""
        for mine, its in (
            (self._block_table, other._block_table), (self._lengths, other._lengths), (self._tokens, other._tokens)
        ):  # fmt: skip
            mine[0] = its[slot]

    @torch.inference_mode()
    def start(self, slot: int, logits: Tensor) -> StepHandle:
        """Draw the first token of an activated slot from the logits [1, vocab] of its prefill."""
        self._tokens[slot : slot + 1] = drawn = self._sample(logits, slice(slot, slot + 1))
        self._mailbox.post(drawn)
        self._posted += 1
        return StepHandle(self._posted, [0], logits)

    @torch.inference_mode()
    def step(self, slots: list[int], longest: int) -> StepHandle:
        """Launch one decode step.

        Args:
            slots: those in use; no other slot may be active.
            longest: tokens of the longest sequence, the new one included.
        """
        needed = max(slots) + 1
        if self._graphs:
            size = min(size for size in self._graphs if size >= needed)
            self._graphs[size].replay()
            logits = self._logits[size]
        else:
            logits = self._step(needed, longest)
        self._posted += 1
        return StepHandle(self._posted, slots, logits)

    def read(self, posted: StepHandle) -> list[int] | None:
        """The tokens of a step, in the order of ``posted.rows``, or None while they are on their way.

        Raises:
            DeviceStuck: they have been waited for too long.
        """
        tokens = self._mailbox.read(posted.number, max(posted.rows) + 1)
        return None if tokens is None else [tokens[row] for row in posted.rows]

    def mark(self) -> DeviceEvent:
        """The end of the work so far."""
        return DeviceEvent(self._device)

    @torch.inference_mode()
    def logprob(self, logits: Tensor, mark: DeviceEvent, token: int, top: int) -> Logprob:
        """Log-probabilities at one position, before temperature: of ``token`` and of the ``top`` most likely.

        Args:
            logits: [vocab] float32, complete at ``mark``. Waits for that, not for what was launched later.
        """
        with torch.cuda.stream(self._reading):  # nothing to do on the CPU
            mark.wait()
            logprobs = logits.log_softmax(-1)
            values, tokens = logprobs.topk(top)
            pairs = list(zip(tokens.tolist(), values.tolist(), strict=True))
            return Logprob(token, float(logprobs[token]), pairs)

    @torch.inference_mode()
    def forward(self, slots: int, longest: int | None = None) -> Tensor:
        """The model's part of one decode step of slots 0 .. slots-1 with their current tokens.

        Args:
            slots: one more than the highest slot in use.
            longest: tokens of the longest sequence, the new one included; None for any.

        Returns:
            logits [slots, vocab] float32; rows of slots not in use are undefined.
        """
        decoder, cache = self.decoder, self.cache
        lengths = self._lengths[:slots]
        lengths += lengths > 0
        pages = None if longest is None else -(-longest // decoder.shape.block_tokens)
        batch = Batch(lengths, self._block_table[:slots, :pages])
        hidden = decoder.embed(self._tokens[:slots])
        normed = decoder.input_norm(0, hidden)
        rope = decoder.rope((lengths - 1).clamp_min(0))

        def prefetch(layer: int, hidden: Tensor) -> FetchList:
            with self._ahead[layer % 2].fork(hidden):
                predicted = decoder.query(layer, decoder.input_norm(layer, hidden), rope)
                return cache.prefetch(layer, predicted, batch)

        coming: FetchList | None = None
        for layer, source in enumerate(self._sources):
            following = (*self._sources, QuerySource.OWN)[layer + 1]
            next_coming = prefetch(layer + 1, hidden) if following is QuerySource.INPUT else None
            query, kv = decoder.qkv(layer, normed, rope)
            if source is not QuerySource.OWN:
                self._ahead[layer % 2].join()
            select = source is QuerySource.OWN or not self._accepts
            attended = cache.attend(layer, query, kv, batch, coming, select=select)
            hidden, normed = decoder.add_attention(layer, hidden, attended)
            coming = prefetch(layer + 1, hidden) if following is QuerySource.MIDDLE else next_coming
            hidden, normed = decoder.add_mlp(layer, hidden, normed)
        cache.end_step()
        return decoder.logits(normed)

    def _step(self, slots: int, longest: int | None = None) -> Tensor:
        logits = self.forward(slots, longest)
        drawn = self._sample(logits, slice(slots))
        self._tokens[:slots] = drawn.where(
            self._lengths[:slots] > 0, 0
        )  # elsewhere it may be no token at all
        self._mailbox.post(drawn)
        return logits

    def _sample(self, logits: Tensor, slots: slice) -> Tensor:
        return sample(
            logits, self._temperature[slots], self._top_p[slots], self._top_k[slots], self._seed[slots],
            self._lengths[slots],
        )  # fmt: skip
