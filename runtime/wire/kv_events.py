"""What routers of others are told of blocks, in the form of vLLM's KV events (vllm/distributed/kv_events.py).

Each event is an array that begins with its name. ``medium`` is the tier by vLLM's word for the memory that an
engine serves from; routers count blocks of any other tier for less.
"""

import msgspec

MEDIUM = "GPU"


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks that prompts can now begin with, each behind the one before; the first follows on
    ``parent_block_hash``, or on nothing."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int  # tokens
    lora_id: None = None
    medium: str = MEDIUM
    lora_name: None = None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    block_hashes: list[int]
    medium: str = MEDIUM


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    ts: float  # seconds since 1970
    events: list[KVEvent]
    data_parallel_rank: int  # which of the server's stores it was
