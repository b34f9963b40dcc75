"""The engine: the state of every slot, and the steps that are launched on the device."""

import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import PROMPT_QUERIES, LayerCache
from clo.gpu_worker.cache.query_prediction import QuerySource, measure_query_sources
from clo.gpu_worker.decode import DecodeStep
from clo.gpu_worker.graphs import DecodeGraphs, graph_sizes, without_collection
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.outputs import Mailbox, SlotRelease, StepHandle
from clo.gpu_worker.prefill import CHUNK_TOKENS, DENSE, SPARSE, Prefill, load_kernels
from clo.gpu_worker.prompt_graphs import PromptGraphs, ShortPrompt
from clo.gpu_worker.sampler import Sampler
from clo.gpu_worker.side_stream import DeviceEvent, DeviceTimer
from clo.gpu_worker.suffix_graphs import SuffixGraphs, SuffixPrefill
from clo.kernels.sparse_prompt import attend_prompt_sparse
from clo.kernels.weigh_blocks import BLOCK
from clo.runtime.config import CacheConfig
from clo.runtime.wire.messages import (
    Activate,
    Advance,
    BeginPrefill,
    Command,
    Extend,
    Feed,
    LeavePrompt,
    Logprob,
    PrefillShort,
    Retire,
    Sampling,
    Start,
    TakeStep,
)


class Engine:
    """Model, cache and the state of every slot: length, blocks, current token, sampling parameters.

    Nothing here waits for the device. On a GPU a decode step is one CUDA graph, from embedding to sampled
    token, captured for a few batch sizes; a step takes the smallest that holds its highest slot.

    Where the decoder is a rank's, so is the engine, and those of all ranks have to do the same in the same
    order. What the first one is asked for after its start it says in ``tell``, so that the others follow;
    ``adjust`` and ``constrain`` are for the first one alone, which draws the tokens.

    Args:
        decoder: the model.
        arena: [blocks, layers, kv_heads, block_tokens, 2, head_dim], readable by the model's device.
        config: the knobs of the cache.
        slots: sequences at a time.
        max_tokens: longest sequence.
        sources: the query that each layer selects with where it prefetches; measured if None.
        layer_type: class of the cache's layers.
        codes: [blocks, layers, kv_heads, code_bytes] uint8, see ``KVCache``.
        spare: bytes of the device's memory for graphs that only make prompts faster; None for any number.

    Attributes:
        depth: steps that should be on their way at a time, so that the device does not wait for the host.
        prompt_graphs: the prefill of short prompts.
        suffix_graphs: the prefill of a few tokens behind others whose rows are in the arena.
        sampler: how every slot draws.
        tell: is told what this engine is about to do that others have to follow; nobody listens at first.
        pages_checksum: of all pages that slots have got so far, where there is a group.
    """

    def __init__(
        self,
        decoder: Decoder,
        arena: Tensor,
        config: CacheConfig,
        slots: int,
        max_tokens: int,
        sources: tuple[QuerySource, ...] | None = None,
        layer_type: type[LayerCache] = LayerCache,
        codes: Tensor | None = None,
        spare: int | None = None,
    ) -> None:
        self.decoder = decoder
        self.slots = slots
        self._device = device = decoder.device
        self.depth = 2 if device.type == "cuda" else 1
        self._attention = SPARSE if config.prefill_attention == "sparse" else DENSE
        self.cache = KVCache(
            decoder.shape, arena, config, slots, max_tokens, decoder.scale, device, layer_type, codes,
            ranks=1 if decoder.group is None else decoder.group.rank.count,
        )  # fmt: skip
        if config.prefetch == "off" or config.attention != "clo":
            sources = (QuerySource.OWN,) * decoder.shape.layers
        elif sources is None:
            sources = measure_query_sources(decoder)
        self._decode = DecodeStep(decoder, self.cache, sources, verified=config.prefetch != "predicted")
        self._graphs = DecodeGraphs(self._step, device)
        self.prompt_graphs = PromptGraphs(decoder, self.cache, slots)
        self.suffix_graphs = SuffixGraphs(decoder, self.cache, max_tokens, spare)

        self.max_blocks = -(-max_tokens // decoder.shape.block_tokens)
        self._blocks = torch.zeros(slots, self.max_blocks, dtype=torch.int64, device=device)
        self._pages = torch.zeros_like(self._blocks)
        self._held: dict[int, tuple[list[int], list[int]]] = {}  # blocks of a slot, and their pages
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._all_slots = torch.arange(slots, device=device)
        self.sampler = Sampler(slots, decoder.vocab, device, decoder.group)
        self.tell: Callable[[Command], object] = _tell_nobody
        self.pages_checksum = 0
        self._reading = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mailbox = Mailbox(slots, device)
        self._posted = 0

    @torch.inference_mode()
    def capture(self, sizes: Iterable[int] | None = None) -> None:
        """Capture the graphs, before there is any sequence; on the CPU there is nothing to do.

        Args:
            sizes: batch sizes; those that serve all slots if None.
        """
        if self._device.type == "cuda":
            with without_collection():
                self._graphs.capture(graph_sizes(self.slots) if sizes is None else sizes)
                self.prompt_graphs.capture()
                self.suffix_graphs.capture()
        self._mailbox.reset()
        self._posted = 0

    def warm_up(self) -> None:
        """Compile and load what prompts need on a GPU, before there is any sequence: it would take the first
        one ten seconds. Nothing is written to the arena, which others may be using."""
        if self._device.type == "cpu":
            return
        block_tokens = self.decoder.shape.block_tokens
        longest = min(self.max_blocks, self.cache.pages.pages) * block_tokens
        ranked = (self.cache.fitting_tokens or 0) + 2 * PROMPT_QUERIES  # more than a set holds
        warmed = [(ranked, 0), (ranked, block_tokens)]
        prefix = self.cache.least_prefix
        if prefix is not None:
            of_codes = -(-prefix // block_tokens) * block_tokens
            warmed.append((of_codes + PROMPT_QUERIES, of_codes))
        with self.cache.storing_nothing():
            for tokens, cached in warmed:
                total = min(tokens, longest)
                if cached and total - cached < PROMPT_QUERIES:
                    continue
                blocks = list(range(-(-total // block_tokens)))
                prefill = self.prefill(0, [0] * total, blocks, cached=cached)
                while prefill.advance() is None:
                    pass
                self.cache.join_prompts()
                self.retire(0)
        load_kernels(self.decoder, longest)
        if self._attention is SPARSE:
            self._warm_up_sparse()
        torch.cuda.synchronize(self._device)

    def _warm_up_sparse(self) -> None:
        """The same for the attention of long prompts; short and long chunks have kernels of their own."""
        shape, scale = self.decoder.shape, self.decoder.scale
        for count in (BLOCK, CHUNK_TOKENS["cuda"]):
            query = torch.zeros(
                count, shape.query_heads, shape.head_dim, dtype=shape.dtype, device=self._device
            )
            rows = query.new_zeros(count + 4 * BLOCK, shape.kv_heads, 2, shape.head_dim)
            attend_prompt_sparse(query, rows, scale, dense_tokens=0, own_tokens=0)

    @torch.inference_mode()
    def captured(self, size: int) -> DecodeGraphs:
        """A graph of the step as it is now, apart from those that ``step`` replays; only for a GPU.

        Benchmarks compare several of one engine. What they post to the mailbox must not be read, so that
        ``capture`` has to follow before sequences are served.
        """
        graphs = DecodeGraphs(self._step, self._device)
        graphs.capture([size])
        return graphs

    @property
    def late_rows(self) -> int | None:
        """Rows fetched for ended sequences by layers that select only with their own query; None where they
        are not told apart, or with full attention."""
        rows, layers = self.cache.head_rows, self._decode.late_layers
        if rows is None or layers is None:
            return None
        return sum(sum(rows.fetched[layer]) for layer in layers)

    # ------------------------------------------------------------------------------ life of a slot

    @torch.inference_mode()
    def place(self, slot: int, blocks: list[int]) -> None:
        """Give a free slot the blocks of its next sequence, and pages of the index for them."""
        self._give_back_pages(slot)
        pages = self.cache.pages.acquire(blocks)
        self._sum_up(slot, pages)
        self._held[slot] = blocks, pages
        for table, row in ((self._blocks, blocks), (self._pages, pages)):
            # pinned, or else the copy would wait for the device
            padded = torch.zeros(self.max_blocks, dtype=torch.int64, pin_memory=self._device.type == "cuda")
            padded[: len(row)] = torch.tensor(row)
            table[slot].copy_(padded, non_blocking=True)

    @torch.inference_mode()
    def extend(self, slot: int, blocks: list[int]) -> None:
        """Give a slot further blocks of its sequence; the steps on their way do not reach them."""
        self.tell(Extend(slot, blocks))
        held, pages = self._held[slot]
        new = self.cache.pages.acquire(blocks)
        self._sum_up(slot, new)
        places = slice(len(held), len(held) + len(blocks))
        for table, row in ((self._blocks, blocks), (self._pages, new)):
            added = torch.tensor(row, pin_memory=self._device.type == "cuda")
            table[slot, places].copy_(added, non_blocking=True)
        self._held[slot] = held + blocks, pages + new

    def _sum_up(self, slot: int, pages: list[int]) -> None:
        if self.decoder.group is not None:
            self.pages_checksum = zlib.crc32(array("q", [slot, *pages]), self.pages_checksum)

    def tables(self, slot: int) -> tuple[Tensor, Tensor]:
        """Block table and page table of a slot, each [max_blocks] int64."""
        return self._blocks[slot], self._pages[slot]

    @torch.inference_mode()
    def prefill(
        self,
        slot: int,
        tokens: list[int],
        blocks: list[int],
        last: int = 1,
        score: int | None = None,
        cached: int = 0,
    ) -> Prefill | SuffixPrefill:
        """Begin the prefill of a sequence in a free slot; ``last``, ``score`` and ``cached`` as for
        ``Prefill``."""
        graphs = last == 1 and score is None and self.suffix_graphs.takes(len(tokens), cached)
        self.tell(BeginPrefill(slot, tokens, blocks, last, score, cached, graphs))
        return self.begin_prefill(slot, tokens, blocks, last, score, cached, graphs=graphs)

    @torch.inference_mode()
    def begin_prefill(
        self,
        slot: int,
        tokens: list[int],
        blocks: list[int],
        last: int,
        score: int | None,
        cached: int,
        *,
        graphs: bool,
    ) -> Prefill | SuffixPrefill:
        """The same, by the graphs of suffixes or not."""
        self.place(slot, blocks)
        if graphs:
            return self.suffix_graphs.begin(slot, tokens, *self._held[slot], cached)
        tables, attention = self.tables(slot), self._attention
        return Prefill(
            self.decoder, self.cache, slot, tokens, blocks, *tables, last, attention, score, cached
        )

    def advance(self, slot: int, prefill: Prefill | SuffixPrefill, tokens: int) -> Tensor | None:
        """A unit of the prefill of a slot, see ``Prefill.advance``."""
        self.tell(Advance(slot, tokens))
        return prefill.advance(tokens)

    def leave_prompt(self) -> None:
        """See ``KVCache.leave_prompt``."""
        self.tell(LeavePrompt())
        self.cache.leave_prompt()

    @torch.inference_mode()
    def prefill_short(self, slots: list[int], tokens: list[list[int]], blocks: list[list[int]]) -> Tensor:
        """Prefill sequences in free slots together; see ``PromptGraphs.run``."""
        self.tell(PrefillShort(slots, tokens, blocks))
        prompts = []
        for slot, ids, held in zip(slots, tokens, blocks, strict=True):
            self.place(slot, held)
            prompts.append(ShortPrompt(slot, ids, *self._held[slot]))
        return self.prompt_graphs.run(prompts)

    @torch.inference_mode()
    def activate(self, slot: int, length: int, sampling: Sampling, seed: int) -> None:
        """The sequence of a slot, ``length`` tokens long, decodes from now on."""
        self.tell(Activate(slot, length))
        self.cache.join_prompts()
        self._lengths[slot].fill_(length)
        self.sampler.set(slot, sampling, seed)

    @torch.inference_mode()
    def adjust(
        self, slot: int, sampling: Sampling, prompt: list[int], ends: list[int], answer: Sequence[int] = ()
    ) -> None:
        """Adjust the logits of an activated slot before each draw; see ``Sampler.adjust``."""
        self.sampler.adjust(slot, sampling, prompt, ends, answer)

    def constrain(self, slot: int, mask: np.ndarray, length: int) -> None:
        """Say which tokens may follow in a slot whose sampling has a grammar; any thread may call this.

        Args:
            mask: [ceil(vocab / 32)] int32, a bit for each token, low bits first.
            length: tokens of the sequence, the latest one included. The mask of a shorter one is no longer
                needed.
        """
        self.sampler.constrain(slot, mask, length)

    @torch.inference_mode()
    def retire(self, slot: int) -> SlotRelease:
        """The sequence of a slot ends after the steps on their way."""
        self.tell(Retire(slot))
        self._lengths[slot].zero_()
        self._give_back_pages(slot)
        return SlotRelease(self.cache, slot, self._device, self.decoder.group)

    def _give_back_pages(self, slot: int) -> None:
        # The device does the work on a page in the order of the calls, so its next owner may have it at once.
        blocks, _ = self._held.pop(slot, ([], []))
        self.cache.pages.release(blocks)

    @torch.inference_mode()
    def feed(self, slots: int | slice, tokens: int | Tensor) -> None:
        """Replace the tokens that the next step reads (teacher forcing).

        Args:
            tokens: one for a slot, or [N] int64 on the device for a slice of slots.
        """
        if isinstance(tokens, Tensor):
            self._tokens[slots] = tokens
            return
        assert isinstance(slots, int), "a slice takes a tensor"
        self.tell(Feed(slots, tokens))
        self._tokens[slots].fill_(tokens)

    @torch.inference_mode()
    def suspend(self, slots: Tensor) -> None:
        """Leave slots out of all steps to come; their sequences keep their places. slots: [slots] bool."""
        self._lengths.masked_fill_(slots, 0)

    @torch.inference_mode()
    def mirror(self, other: "Engine", slot: int) -> None:
        """Slot 0 takes over blocks, length and token of another engine's slot; the arena must be the same."""
        for mine, its in (
            (self._blocks, other._blocks),
            (self._lengths, other._lengths),
            (self._tokens, other._tokens),
        ):
            mine[0] = its[slot]

    # --------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def start(self, slots: list[int], logits: Tensor) -> StepHandle:
        """Draw the first tokens of activated slots from the logits [len(slots), vocab] of their prefill. Once
        they are there, all ranks have the rows of these prompts in the arena."""
        self.tell(Start(slots))
        places = torch.tensor(slots, pin_memory=self._device.type == "cuda")
        places = places.to(self._device, non_blocking=True)
        if self.decoder.group is not None:
            self.decoder.group.sum(torch.zeros(1, device=self._device))  # each has joined its prompts before
        drawn = self.sampler.draw(logits, places, self._lengths, self._tokens)
        self._mailbox.post(drawn)
        self._posted += 1
        return StepHandle(self._posted, list(range(len(slots))), logits)

    @torch.inference_mode()
    def step(self, slots: list[int], longest: int) -> StepHandle:
        """Launch one decode step.

        Args:
            slots: those in use; no other slot may be active.
            longest: tokens of the longest sequence, the new one included.
        """
        self.tell(TakeStep(slots, longest))
        needed = max(slots) + 1
        logits = self._graphs.replay(needed) if self._graphs.usable else self._step(needed, longest)
        self._posted += 1
        return StepHandle(self._posted, slots, logits)

    @torch.inference_mode()
    def forward(self, slots: int, longest: int | None = None) -> Tensor:
        """The model's part of one decode step of slots 0 .. slots-1 with their current tokens.

        Args:
            slots: one more than the highest slot in use.
            longest: tokens of the longest sequence, the new one included; None for any.

        Returns:
            logits [slots, vocab] float32; rows of slots not in use are undefined.
        """
        lengths = self._lengths[:slots]
        lengths += lengths > 0
        used = None if longest is None else -(-longest // self.decoder.shape.block_tokens)
        batch = Batch(lengths, self._blocks[:slots, :used], self._pages[:slots, :used])
        return self._decode(self._tokens[:slots], batch)

    def _step(self, slots: int, longest: int | None = None) -> Tensor:
        logits = self.forward(slots, longest)
        self._mailbox.post(self.sampler.draw(logits, self._all_slots[:slots], self._lengths, self._tokens))
        return logits

    # ------------------------------------------------------------------------------------- results

    def read(self, handle: StepHandle) -> list[int] | None:
        """The tokens of a step, in the order of ``handle.rows``, or None while they are on their way.

        Raises:
            DeviceStuck: they have been waited for too long.
        """
        tokens = self._mailbox.read(handle.number, max(handle.rows) + 1)
        return None if tokens is None else [tokens[row] for row in handle.rows]

    def event(self) -> DeviceEvent:
        """The end of the work so far."""
        return DeviceEvent(self._device)

    def timer(self) -> DeviceTimer:
        """Measures the work from here on."""
        return DeviceTimer(self._device)

    @torch.inference_mode()
    def logprob(self, logits: Tensor, event: DeviceEvent, token: int, top: int) -> Logprob:
        """Log-probabilities of ``token`` and the ``top`` most likely ones at a position, before temperature.

        Args:
            logits: [vocab] float32, complete at ``event``. Waits for that, not for what was launched later.
            top: of a smaller vocabulary, all.
        """
        with torch.cuda.stream(self._reading):  # nothing to do on the CPU
            event.wait()
            logprobs = logits.log_softmax(-1)
            values, tokens = logprobs.topk(min(top, len(logprobs)))
            pairs = list(zip(tokens.tolist(), values.tolist(), strict=True))
            return Logprob(token, float(logprobs[token]), pairs)

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` unless the pages of the index are held by the slots in use alone."""
        self.cache.pages.check_integrity()


def _tell_nobody(command: Command) -> None:
    """A process that is alone has nobody who follows."""
