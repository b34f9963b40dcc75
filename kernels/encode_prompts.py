"""Encode prompts: 2-bit codes of all keys of a batch of prompts, page by page."""

from collections.abc import Iterator

from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import PROMPT_BLOCKS, PromptBlocks
from clo.kernels.encode import CENTRES, CODES, PACKED, ROTATION, SCALES, STEP, CodePages, encode
from clo.kernels.launch import ELEMENTS, launch

_THREADS = 256
_KEYS = 4  # of a thread, which rotates 16 entries of each
_SLICE = 16  # rows of the rotation in shared memory, while the next ones are on their way
_BLOCKS = 1024  # from so many on a page is not cut: each piece needs the mean of the whole page

_SIGNATURE = Signature(
    "encode_prompts",
    (
        Argument("keys", ELEMENT, "N kv_heads head_dim", dense=1, chunks=True),
        *PROMPT_BLOCKS, CODES, SCALES, CENTRES, ROTATION._replace(chunks=True),
    ),
    (HEAD_DIM, PACKED, Rule("P >= 1", "a launch needs a part, if only one that is not in use")),
)  # fmt: skip


def encode_prompts(keys: Tensor, prompt_blocks: PromptBlocks, pages: CodePages, rotation: Tensor) -> None:
    """Index the keys of a batch of whole prompts, in place.

    The mean of a part's keys becomes the centre of its page, and its keys' codes and scales those of the
    page's first tokens; see ``encode``. The page's other tokens keep what they have.

    Args:
        keys: [N, kv_heads, head_dim]; keys of tokens that are in no part are not read.
        prompt_blocks: which tokens go to which page.
        pages: this layer of the index.
        rotation: [head_dim, head_dim] float32.
    """
    _SIGNATURE.check(keys, *prompt_blocks, *pages, rotation)
    starts, counts, _, numbers = prompt_blocks
    if not keys.is_cpu:
        _, kv_heads, dim = keys.shape
        lanes = 1 << (dim // 16 - 1).bit_length()  # of a key: a power of 2, so that they can sum in turns
        tokens = _THREADS // lanes * _KEYS
        pieces = min(max(1, _BLOCKS // (len(starts) * kv_heads)), -(-pages.block_tokens // tokens))
        chunk = 16 // keys.itemsize
        launch(
            "encode_prompts.cu", "encode_prompts", (kv_heads, pieces, len(starts)), _THREADS,
            [keys, keys.stride(0) // chunk, keys.stride(1) // chunk, starts, counts, numbers, *pages,
             rotation, STEP],
            shared=4 * (tokens * (dim + 4) + 2 * _SLICE * dim),
            ELEMENT=ELEMENTS[keys.dtype], DIM=dim, BLOCK_TOKENS=pages.block_tokens,
            THREADS=_THREADS, LANES=lanes, KEYS=_KEYS, SLICE=_SLICE,
        )  # fmt: skip
        return
    for first, end in _runs(starts.tolist(), counts.tolist()):
        start, count = int(starts[first]), int(counts[first])
        run_keys = keys[start : start + (end - first) * count]
        run = run_keys.unflatten(0, (end - first, count)).float()  # [parts, count, kv_heads, head_dim]
        means, run_pages = run.mean(1), numbers[first:end]
        codes, scales = encode(run, means.unsqueeze(1), rotation)
        pages.centres[run_pages] = means
        pages.codes[run_pages, :, :count] = codes.transpose(1, 2)
        pages.scales[run_pages, :, :count] = scales.transpose(1, 2)


def _runs(starts: list[int], counts: list[int]) -> Iterator[tuple[int, int]]:
    """Parts in use that follow each other with as many tokens, as ``[first, end)``: to take them one by one
    costs more than their work where threads have to wait for a core."""
    first = 0
    for part in range(1, len(starts) + 1):
        goes_on = (
            part < len(starts)
            and counts[part] == counts[first]
            and starts[part] == starts[part - 1] + counts[first]
        )
        if not goes_on:
            if counts[first] > 0:
                yield first, part
            first = part
