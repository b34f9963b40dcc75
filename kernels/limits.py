"""What the GPU kernels can do, in numbers that are known before a model is loaded. Imports no torch.

On a GPU they take head dims that are multiples of 16 up to 256, in bfloat16, float16 and float32; any number
of query heads for a KV head as long as ``group * head_dim`` is at most 12,288; and blocks of a multiple of 64
tokens. The context is limited by the shared memory of ``update_resident``: it takes an eighth of a byte for
each token of the longest sequence, besides what it takes for the rows that a head selects and keeps. The
tests compare every kernel with its reference at the shapes of ``tests/kernel_calls.py``.

The references on the CPU need a head dim divisible by 4, because the index packs four codes into a byte.
"""

HEAD_DIM_STEP = 16
"""Entries that a kernel takes together: scoring reads codes of 16 entries at a time."""

HEAD_DIM_MOST = 256
"""Four threads rotate an entry of a query, and a block has 1,024."""

GROUP_ENTRIES_MOST = 48 * 1024 // 4
"""Entries of the query heads of one KV head: their float32 sums must fit into static shared memory."""

BLOCK_TOKENS_STEP = 64
"""Tokens that a warp scores at a time, all of one page of the index."""

REGISTERED_BYTES = 2**30
"""CPU memory is registered with CUDA in pieces of this size; no copy may go over the end of one."""

RUN = 16
"""Neighbouring tokens whose values' codes lie together, and which are in the tail or not as one."""

CHUNK = 8
"""Entries of a value whose codes share a word."""

CODES_PER_BYTE = 4
"""2-bit codes of the index in a byte."""

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that a block may have, by compute capability: A100; H100 and H200; B200."""

UPDATE_STATIC_BYTES = 128
"""Shared memory that ``update_resident.cu`` declares itself."""


def quantize_parts(group: int, head_dim: int) -> int:
    """Parts in which ``quantize_query`` sums a rotated entry: as many as shared memory holds, up to 4."""
    return next(parts for parts in (4, 2, 1) if parts * group * head_dim <= GROUP_ENTRIES_MOST)


def parts_of_heads(heads: int, blocks: int) -> int:
    """In how many parts the attention of each head is computed so that they fill about so many blocks of
    threads: a power of two up to 16, since each number is a kernel of its own."""
    return max(parts for parts in (1, 2, 4, 8, 16) if parts == 1 or parts * heads <= blocks)


def update_shared_bytes(k: int, capacity: int, tokens: int) -> int:
    """Dynamic shared memory of ``update_resident`` where heads select ``k`` rows among ``tokens`` for sets of
    ``capacity`` rows."""
    return 16 * max(2 * k, -(-tokens // 128)) + _update_fixed_bytes(k, capacity)


def longest_context(k: int, capacity: int, shared_bytes: int) -> int:
    """Most tokens among which ``update_resident`` selects with so much shared memory for a block; 0 where not
    even ``k`` and ``capacity`` fit."""
    units = (shared_bytes - UPDATE_STATIC_BYTES - _update_fixed_bytes(k, capacity)) // 16
    return 128 * units if units >= 2 * k else 0


def _update_fixed_bytes(k: int, capacity: int) -> int:
    counts, selected, ages = 9 * 256 * 4, 9 * (-(-k // 16) * 16), 4 * capacity
    return counts + selected + ages


def check_limits(
    head_dim: int,
    group: int,
    k: int,
    resident: int,
    max_tokens: int,
    block_tokens: int,
    *,
    tail: int = 0,
    cuda: bool = True,
    shared_bytes: int = max(SHARED_BYTES.values()),
) -> None:
    """Refuse what the kernels, or on the CPU their references, cannot do.

    A process that does not know the GPU leaves ``shared_bytes`` at what the largest GPUs have, so that it
    refuses only what none can do; one that does know passes ``clo.kernels.launch.block_shared_bytes()``.

    Args:
        head_dim: entries of a key.
        group: query heads that share a KV head.
        k: rows that a head selects.
        resident: rows that a head keeps; the capacity of its set.
        max_tokens: longest sequence.
        block_tokens: tokens of a block of the arena, and of a page of the index.
        tail: tokens of a head's tail.
        cuda: whether the kernels will run, and not their references.
        shared_bytes: shared memory that a block may have.

    Raises:
        ValueError: with one sentence that says what cannot be done, and what can.
    """
    if head_dim < 1 or head_dim % CODES_PER_BYTE:
        raise ValueError(
            f"head_dim is {head_dim}, and the index needs a positive multiple of {CODES_PER_BYTE}."
        )
    if tail and head_dim % CHUNK:
        raise ValueError(
            f"head_dim is {head_dim}, and a tail needs a multiple of {CHUNK}; leave it out with --tail 0."
        )
    if not 1 <= k <= resident:
        raise ValueError(
            f"A head selects {k} rows and keeps {resident}; it must select at least one and keep all of them."
        )
    if not cuda:
        return
    if head_dim % HEAD_DIM_STEP or head_dim > HEAD_DIM_MOST:
        raise ValueError(
            f"head_dim is {head_dim}, and the GPU kernels need a multiple of {HEAD_DIM_STEP} of at most "
            f"{HEAD_DIM_MOST}."
        )
    if group * head_dim > GROUP_ENTRIES_MOST:
        raise ValueError(
            f"{group} query heads share a KV head, and at head_dim {head_dim} the GPU kernels take at most "
            f"{GROUP_ENTRIES_MOST // head_dim}."
        )
    if block_tokens < 1 or block_tokens % BLOCK_TOKENS_STEP:
        raise ValueError(
            f"A block has {block_tokens} tokens, and the GPU kernels need a positive multiple of "
            f"{BLOCK_TOKENS_STEP}."
        )
    longest = longest_context(k, resident, shared_bytes) // block_tokens * block_tokens
    if not longest:
        raise ValueError(
            f"Selecting {k} rows and keeping {resident} takes more than the {shared_bytes // 1024} KiB of "
            "shared memory that the GPU has for a block; select or keep fewer rows."
        )
    if max_tokens > longest:
        raise ValueError(
            f"Selecting {k} rows and keeping {resident} leaves shared memory for a context of {longest} "
            f"tokens on the GPU, not of {max_tokens}; select or keep fewer rows, or shorten the context."
        )
