"""Two real documents that every installation carries."""

import re
from importlib.metadata import metadata
from pydoc_data.topics import topics


def document(*names: str) -> str:
    """Text of the named chapters of the Python language reference, such as ``compound`` (12,300 tokens of
    SmolLM2) or ``specialnames``."""
    return "\n".join(topics[name] for name in names)


def pytorch_readme() -> str:
    """The README of the installed PyTorch from its chapter on the source code to its end, as plain text.

    It has 3,700 tokens of SmolLM2. Links become their text; pictures and comments go.
    """
    text = metadata("torch")["Description"]
    for pattern, replacement in (
        (r"<!--.*?-->|<img[^>]*>|!\[[^\]]*\]\([^)]*\)", ""),
        (r"\[([^\]]*)\]\([^)]*\)", r"\1"),
        (r"\n{3,}", "\n\n"),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text[max(text.find("#### Get the PyTorch Source"), 0) :].strip()
