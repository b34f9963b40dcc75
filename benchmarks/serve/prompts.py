"""Prompts of real text as token ids, of which no two begin alike."""

from pydoc_data.topics import topics
from random import Random

from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text
from examples.document import document


def text_of(tokenizer: Tokenizer) -> list[int]:
    """Token ids of a long text that every installation carries, the Python language reference."""
    return tokenizer.encode(Text(document(*topics)), limit=10**9, continues=True)


class Prompts:
    """Prompts cut from a text, always the same ones in the same order.

    Each begins at a place of its own, so that a server which keeps beginnings of prompts cannot reuse one.

    Args:
        text: token ids; a prompt that reaches its end goes on at its beginning.
    """

    def __init__(self, text: list[int]) -> None:
        self._text = text
        self._starts = Random(0).sample(range(len(text)), len(text))

    def take(self, count: int, tokens: int) -> list[list[int]]:
        """So many prompts of so many tokens that were not taken before."""
        taken, self._starts = self._starts[:count], self._starts[count:]
        assert len(taken) == count, "the text is too short"
        text, length = self._text, len(self._text)
        return [[text[place % length] for place in range(start, start + tokens)] for start in taken]
