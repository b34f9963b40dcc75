"""What a model thinks before it answers, apart from the answer.

Families that think, such as Qwen3 and the distillations of DeepSeek-R1, write ``<think>`` before it, or their
chat template does, and ``</think>`` behind it.
"""

from typing import NamedTuple

BEGIN, END = "<think>", "</think>"


class Parted(NamedTuple):
    """New text of both kinds."""

    reasoning: str
    content: str


def partial_end(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of ``marker``."""
    for count in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:count]):
            return count
    return 0


class ReasoningParser:
    """Parts the text of one answer, piece by piece. Line breaks around what is thought are dropped, as chat
    templates drop them when they get a conversation back.

    Args:
        begun: whether the prompt ends with ``<think>``, and the answer begins within it.
    """

    def __init__(self, begun: bool) -> None:
        self._thinks = begun
        self._decided = begun  # whether the answer is known to begin with what is thought, or without
        self._ended = False  # whether what was thought is over, and the answer has not begun
        self._fresh = begun  # nothing thought has been given yet
        self._held = ""

    def push(self, text: str) -> Parted:
        text = self._held + text
        self._held = ""
        if not self._decided:
            start = text.lstrip()
            if len(start) < len(BEGIN) and BEGIN.startswith(start):
                self._held = text
                return Parted("", "")
            self._decided = True
            if start.startswith(BEGIN):
                self._thinks = self._fresh = True
                text = start[len(BEGIN) :]
        if not self._thinks:
            return Parted("", self._answer(text))
        thought, found, content = text.partition(END)
        if not found:
            return Parted(self._thought(text), "")
        self._held = ""
        self._thinks, self._ended = False, True
        thought = thought.lstrip("\n") if self._fresh else thought
        return Parted(thought.rstrip("\n"), self._answer(content))

    def flush(self) -> Parted:
        """The rest, at the end of the answer."""
        rest, self._held = self._held, ""
        return Parted(rest.rstrip("\n"), "") if self._thinks else Parted("", rest)

    def _thought(self, text: str) -> str:
        """The part of a text that is certainly thought; the rest is held back."""
        if self._fresh:
            text = text.lstrip("\n")
        certain = len(text) - partial_end(text, END)
        certain = len(text[:certain].rstrip("\n"))
        self._held = text[certain:]
        self._fresh = self._fresh and not certain
        return text[:certain]

    def _answer(self, text: str) -> str:
        """A text without the line breaks between what was thought and the answer."""
        if self._ended:
            text = text.lstrip("\n")
            self._ended = not text
        return text
