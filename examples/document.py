"""A real document that every Python installation carries: chapters of the Python language reference."""

from pydoc_data.topics import topics


def document(*names: str) -> str:
    """Text of the named chapters, such as ``compound`` (12,300 tokens of SmolLM2) or ``specialnames``."""
    return "\n".join(topics[name] for name in names)
