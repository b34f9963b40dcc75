"""``python -m benchmarks.serve.worker CONFIG PARENT``: a worker that replays what a real model would fetch.

Random weights make random queries, which select other rows in every step. Everything but the rows to fetch is
that of ``python -m clo.gpu_worker``; only for a GPU.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.synthetic import ReplayLayer, replay, typical_sources
from benchmarks.serve.tables import NEW_ROWS
from clo.gpu_worker.__main__ import main
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.model.decoder import Decoder
from clo.runtime.config import CacheConfig
from clo.runtime.machine.process import run_process
from clo.runtime.wire.messages import Sampling


class ReplayEngine(Engine):
    """An engine whose layers replay, for any sequences; its arguments are those of ``Engine``."""

    def __init__(
        self,
        decoder: Decoder,
        arena: Tensor,
        config: CacheConfig,
        slots: int,
        max_tokens: int,
        codes: Tensor | None = None,
        spare: int | None = None,
    ) -> None:
        layers = decoder.shape.layers
        sources = typical_sources(layers)
        super().__init__(decoder, arena, config, slots, max_tokens, sources, ReplayLayer, codes, spare)
        self._last_used = replay(self, round(NEW_ROWS * config.sizes(max_tokens, layers)[0].select_k))

    @torch.inference_mode()
    def activate(self, slot: int, length: int, sampling: Sampling, seed: int) -> None:
        """See ``Engine.activate``."""
        super().activate(slot, length, sampling, seed)
        self._last_used[:, slot].fill_(-1)


if __name__ == "__main__":
    run_process(partial(main, ReplayEngine))
