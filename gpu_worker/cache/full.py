"""A layer that attends to the whole KV in the arena, to compare everything else with."""

from torch import Tensor

from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.prompt import ExactRows, LastTokens, Prompts
from clo.gpu_worker.side_stream import SideStream
from clo.kernels.attend import AttentionState, attend_all
from clo.kernels.load import load_blocks
from clo.kernels.store import store_new
from clo.kernels.update_resident import FetchList


class FullLayer:
    """Full attention over the arena, exact and slow.

    Args:
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        storing: the stream on which rows of a prompt go to the arena.
        scale: factor of the scores.

    Attributes:
        stores: whether rows of prompts go to the arena.
    """

    def __init__(self, arena: Tensor, storing: SideStream, scale: float) -> None:
        self._arena, self._storing, self._scale = arena, storing, scale
        self.stores = True

    def take_rows(self, rows: Tensor, prompts: Prompts) -> None:
        """See ``LayerCache.take_rows``; nothing is indexed."""
        if self.stores:
            with self._storing.fork(rows):
                prompts.store(rows, self._arena)

    def load_rows(self, rows: Tensor, prompts: Prompts) -> None:
        """See ``LayerCache.load_rows``."""
        load_blocks(rows, prompts.blocks.blocks, self._arena)

    def index_rows(self, rows: Tensor, prompts: Prompts) -> None:
        """Nothing to do: there is no index."""

    def start_sets(
        self,
        rows: Tensor,
        prompts: Prompts,
        lse: Tensor,
        last: LastTokens | None = None,
        exact: ExactRows | None = None,
    ) -> None:
        """Nothing to do: there are no resident rows."""

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        batch: Batch,
        fetch_list: FetchList | None,
        begun: AttentionState | None = None,
        *,
        select: bool,
    ) -> Tensor:
        """See ``LayerCache.attend``; nothing is selected or fetched."""
        store_new(kv, batch.lengths, batch.blocks, self._arena)
        return attend_all(query, self._arena, batch.blocks, batch.lengths, self._scale)
