"""Which KV store a worker uses, and on which NUMA nodes the KV heads in a store lie."""

import logging
from collections.abc import Sequence

from clo.runtime.config import ResolvedModel, ServerConfig
from clo.runtime.machine.numa import check_pages
from clo.runtime.model.ranks import Rank

_logger = logging.getLogger(__name__)


def store_of(worker: int, first: int | None, stores: Sequence[int]) -> int:
    """The store that a worker uses, where each is called by its NUMA node: that of its first GPU, which is on
    node ``first``, where there is one, and else they take turns."""
    return stores[worker % len(stores)] if first is None or first not in stores else first


def head_nodes(config: ServerConfig, model: ResolvedModel, stores: Sequence[int]) -> list[tuple[int, ...]]:
    """The NUMA node of each KV head in each store.

    A head lies on the node of the GPU that reads it. Where several ranks of a worker read it, that is the
    first one's; and all heads lie on the store's own node where the GPUs of each worker are on one node
    anyway, those of two workers are not on the same nodes, rank by rank, or memory cannot be bound to these.
    The latter two cost a warning.

    Args:
        stores: their own nodes.
    """
    ranks, heads = config.tensor_parallel_size, model.architecture.num_key_value_heads
    found: dict[int, set[tuple[int, ...]]] = {store: set() for store in stores}
    for worker in range(config.workers):
        near = model.gpu_nodes[worker * ranks : (worker + 1) * ranks]
        if len(near) == ranks:  # else there are no GPUs, or too few, which the worker says
            store = store_of(worker, near[0], stores)
            found[store].add(tuple(store if node is None else node for node in near))
    return [_by_rank(found[store], store, heads) or (store,) * heads for store in stores]


def _by_rank(found: set[tuple[int, ...]], store: int, heads: int) -> tuple[int, ...]:
    """The same for one store, where the ranks of its workers are on the nodes ``found``; empty where all
    heads are to lie on its own."""
    if all(len(set(near)) == 1 for near in found):
        return ()
    if problem := _problem(found):
        _logger.warning(
            "KV store numa%d lies on one NUMA node alone, rows take longer to GPUs on others: %s.",
            store, problem,
        )  # fmt: skip
        return ()
    (near,) = found
    lying = dict[int, int]()
    for rank in reversed(range(len(near))):  # of those that share a head the first one's node stays
        for head in range(heads)[Rank(rank, len(near)).kv_heads(heads)]:
            lying[head] = near[rank]
    return tuple(lying[head] for head in range(heads))


def _problem(found: set[tuple[int, ...]]) -> str | None:
    """Why heads cannot lie by rank; None where they can."""
    if len(found) > 1:
        return "the GPUs of its workers are not on the same nodes, rank by rank"
    try:
        for node in set().union(*found):
            check_pages(node)
    except OSError as error:
        return str(error)
    return None
