"""Names of blocks of prompts: a block's rows depend on all tokens up to its end, and so does its name."""

import hashlib
from array import array
from itertools import pairwise

NAME_BYTES = 16


def chain(tokens: "array[int]", block_tokens: int, root: bytes = b"") -> list[bytes]:
    """Names of the whole blocks of a prompt, each made from the one before, as in vLLM's prefix caching.

    Args:
        tokens: the prompt, 4 bytes a token.
        block_tokens: tokens of a block.
        root: what else decides about the rows, such as whose they are: prompts under another root have no
            name in common.

    Returns:
        As many names of ``NAME_BYTES`` as the prompt has whole blocks. Nobody finds two prompts for a name:
        BLAKE2b is a cryptographic hash.
    """
    names, name = [], first_parent(root)
    for start, end in pairwise(range(0, len(tokens) + 1, block_tokens)):
        name = next_name(name, tokens[start:end])
        names.append(name)
    return names


def first_parent(root: bytes) -> bytes:
    """What stands for the name before that of a prompt's first block."""
    return hashlib.blake2b(root, digest_size=NAME_BYTES).digest()


def next_name(parent: bytes, tokens: "array[int]") -> bytes:
    """The name of a block of ``tokens`` after one that is called ``parent``."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=NAME_BYTES).digest()


def number(name: bytes) -> int:
    """A name as others know it, who want 64 bits."""
    return int.from_bytes(name[:8], "big")
