"""What decides about the rows of a prompt besides its tokens, as one short text."""

import hashlib
import os
from pathlib import Path

from clo.runtime.config import PrefillAttention, PrefixAttention, ResolvedModel
from clo.runtime.wire.errors import ConfigError

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each file of weights; to read all of it may take minutes


def fingerprint(
    model: ResolvedModel,
    prefill_attention: PrefillAttention,
    prefix_attention: PrefixAttention,
    version: str,
) -> str:
    """Hexadecimal digits that are the same for two servers only where the same prompt has the same rows.

    Of the weights it takes each file's name, size and time of change, and samples. So a model that was
    copied or saved anew counts as another one, even if all its bytes are equal.

    Args:
        model: where it is, and how it is held.
        prefill_attention, prefix_attention: as asked for.
        version: CLO's own.

    Raises:
        ConfigError: a file cannot be read.
    """
    how: tuple[object, ...] = (
        version, model.dtype, model.device, model.load_format, model.seed, prefill_attention
    )  # fmt: skip
    if prefix_attention != "exact":  # what exact servers have written before stays theirs
        how = (*how, prefix_attention)
    digest = hashlib.blake2b(repr(how).encode(), digest_size=16)
    try:
        digest.update((model.folder / "config.json").read_bytes())
        if model.load_format != "dummy":
            for file in sorted(model.folder.glob("*.safetensors")):
                digest.update(_sample(file))
    except OSError as error:
        raise ConfigError(f"The model in {model.folder} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def _sample(file: Path) -> bytes:
    with file.open("rb") as data:
        found = os.fstat(data.fileno())
        digest = hashlib.blake2b(repr((file.name, found.st_size, found.st_mtime_ns)).encode())
        for place in range(_SAMPLES):
            data.seek(place * found.st_size // _SAMPLES)
            digest.update(data.read(_SAMPLE_BYTES))
    return digest.digest()
