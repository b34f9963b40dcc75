"""Questions about the README of PyTorch, and whether an answer to one is right."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# The first question, with its answer from the document, shows how to answer.
PROMPT = """{document}

Questions about the text above.

Question: Where can installation instructions for previous PyTorch versions be found?
Answer: Installation instructions for previous PyTorch versions may be found on our website.

Question: {question}
Answer:"""

# Words that may stand at the start of a sentence without being part of a name.
_SMALL = frozenset(("a", "an", "at", "by", "in", "it", "on", "the", "there", "they", "this", "to", "you"))
# Words without a capital or a digit that change what is said as much as a name or a figure does.
_TELLING = frozenset(
    ("no", "not", "never", "none", "without", "zero", "one", "two", "three", "four", "five", "six", "seven",
     "eight", "nine", "ten", "dozen", "hundred", "thousand", "million")
)  # fmt: skip
_IN_VALUES = frozenset("0123456789./@_=")  # inside a word, as in 12.1 and pytorch.org
_QUOTES = "\"'`*()[]{}<>“”"
_ENDS = (".", ",", ";", ":", "!", "?")


@dataclass(frozen=True)
class Question:
    """A question about the document.

    Attributes:
        text: what is asked.
        passage: all words of the document that belong to the answer.
        fact: words of the passage that a right answer contains.
    """

    text: str
    passage: str
    fact: str

    def accepts(self, answer: str) -> bool:
        """Whether an answer is right: it contains the fact, and what it names stands in the passage.

        Each name and each value of the answer must stand, whole and in this order of words, in the passage
        or in the question. A name that the document has elsewhere is as wrong as one that it does not have.
        Words that name nothing are not looked at: "supports CUDA 12.1" and "is for CUDA 12.1" are both right.
        """
        known = self.passage, self.text
        return _stands_in(self.fact, answer) and all(
            any(_stands_in(name, text) for text in known) for name in named(answer)
        )


ASKED = 2  # of the questions; each costs a CPU as much time as reading the document twice

# The default model, which is small, answers these rightly with full attention. The README differs between
# versions of PyTorch; a question whose passage is missing gives way to the next.
QUESTIONS = (
    Question(
        "Which CUDA version does the Dockerfile support?",
        "The Dockerfile is supplied to build images with CUDA 12.1 support and cuDNN v9.",
        "CUDA 12.1",
    ),
    Question(
        "Who is Hugh?",
        "This project is unrelated to hughperkins/pytorch with the same name. Hugh is a valuable contributor "
        "to the Torch community and has helped with many things Torch and PyTorch.",
        "valuable contributor to the Torch community",
    ),
    Question(
        "What is the newsletter?",
        "Newsletter: No-noise, a one-way email newsletter with important announcements about PyTorch.",
        "one-way email newsletter with important announcements about PyTorch",
    ),
)


def answered_by(document: str) -> list[Question]:
    """The questions to ask: the first whose passages stand in a document."""
    return [question for question in QUESTIONS if question.passage in document][:ASKED]


def named(answer: str) -> Iterator[str]:
    """What an answer names, piece by piece.

    These are runs of words with a capital or a digit, as "Edward Yang" and "CUDA 12.1" are, which a comma or
    the end of a sentence ends; addresses; and single words that deny or count.
    """
    run: list[str] = []
    for piece in answer.split():
        word = piece.strip(_QUOTES + "".join(_ENDS))
        telling = word.casefold() in _TELLING
        names = not telling and any(character.isupper() or character in _IN_VALUES for character in word)
        if names and (run or word.casefold() not in _SMALL):
            run.append(word)
        if run and (not names or piece.rstrip(_QUOTES).endswith(_ENDS)):
            yield " ".join(run)
            run = []
        if telling:
            yield word
    if run:
        yield " ".join(run)


def _stands_in(words: str, text: str) -> bool:
    """Whether words stand in a text, none of them cut off. Capitals and line breaks are not looked at."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return re.search(rf"(?<![\w.])(?:{pattern})(?![\w]|\.\w)", text, re.IGNORECASE) is not None
