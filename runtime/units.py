"""Sizes in bytes as people write them."""

import re

from clo.runtime.wire.errors import ConfigError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``512M`` or ``1073741824``; units are powers of 1024.

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = 0.0 if match is None else float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= size < 2**63:
        raise ConfigError(f"'{text[:40]}' is not a size; write for example 512MiB or 8GiB.")
    return int(size)


def format_size(size: float) -> str:
    """A size in the largest binary unit that keeps it above 1: ``8.0 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
