"""Items that ask for what stands anywhere in a long context, on token ids; a seed always gives the same item.

Four kinds: ``text`` only goes on with the document; ``needle`` asks for numbers that sentences scattered over
the text give to things; ``chain`` for the values of variables that are set to each other; ``quote`` for
passages of the text by their first words. ``benchmarks.long_model`` makes models that know this wording.

The documents come with every installation, in whatever version it has: the Python language reference
(``pydoc_data``, PSF licence) and the documentation inside of PyTorch and NumPy (both BSD).
"""

from collections.abc import Callable
from pydoc_data.topics import topics
from random import Random
from types import ModuleType
from typing import Literal, NamedTuple

import numpy
import torch

Task = tuple[list[str], list[tuple[str, str]]]  # sentences for the text; questions with their answers
Encode = Callable[[str], list[int]]  # text to token ids, without special tokens
Kind = Literal["text", "needle", "quote", "chain"]
KINDS: tuple[Kind, ...] = ("text", "needle", "quote", "chain")

_CONTINUED = 256  # tokens by which ``text`` goes on
_NEEDLES, _NEEDLES_ASKED = 60, 30
_VARIABLES, _VARIABLES_ASKED = 30, 20
_TOKENS_PER_FACT = 100  # of a prompt, at least
_QUOTES, _QUOTED = 16, (60, 160)  # passages, and tokens of each
_GIVEN = 16  # tokens of a passage that its question gives
_SHORTEST_DOC = 200  # characters; below are mere references to another entry

_QUALITIES = (
    "amber bitter brisk calm clever distant dusty eager early faint fuzzy gentle hollow icy jolly keen "
    "lively mellow narrow ornate pale quiet rapid silver tender upbeat vivid wooden young zesty"
)
_THINGS = (
    "anchor basket bridge candle castle desert dragon engine falcon feather garden glacier hammer island "
    "jacket kettle ladder mirror needle orchard pencil quarry ribbon saddle tunnel umbrella valley window "
    "yogurt zipper"
)


class Item(NamedTuple):
    """A prompt and how it should go on, as token ids."""

    prompt: list[int]
    answer: list[int]  # questions and their answers
    scored: list[bool]  # which tokens of ``answer`` answer a question


def documents(encode: Encode) -> list[list[int]]:
    """Five documents of more than 80,000 tokens each, none of which holds text of another."""
    seen: set[str] = set()
    texts = [
        "\n\n".join(dict.fromkeys(topics.values())),
        _entries(seen, torch),
        _entries(seen, torch.nn, torch.nn.functional),
        _entries(seen, numpy),
        _entries(seen, numpy.linalg, numpy.random, numpy.fft, numpy.polynomial),
    ]
    return [encode(text) for text in texts]


def _entries(seen: set[str], *modules: ModuleType) -> str:
    """The documentation of what modules hold, by name, without what is in ``seen``, which grows by it."""
    entries = []
    for module in modules:
        for name, member in sorted(vars(module).items()):
            text = member.__doc__
            if name.startswith("_") or not isinstance(text, str) or len(text) < _SHORTEST_DOC or text in seen:
                continue
            seen.add(text)
            entries.append(text)
    return "\n\n".join(entries)


def make_item(kind: Kind, document: list[int], length: int, seed: int, encode: Encode) -> Item:
    """An item over a part of a document.

    Args:
        document: token ids, at least ``length`` + 257.
        length: tokens of the prompt, 500 or more.
        seed: chooses the part, the facts and the questions.
    """
    random = Random(seed)
    start = random.randrange(len(document) - length - _CONTINUED)
    text = document[start : start + length + _CONTINUED]
    if kind == "text":
        return Item(text[:length], text[length:], [False] * _CONTINUED)
    most = length // _TOKENS_PER_FACT
    facts: list[str] = []
    replies: list[tuple[str, str]] = []
    if kind == "needle":
        heading = encode("\n\nQuestions about the text above.\n")
        facts, replies = _needles(random, min(_NEEDLES, most))
    elif kind == "chain":
        heading = encode("\n\nValues of the variables above.\n")
        facts, replies = _chain(random, min(_VARIABLES, most))
    else:
        heading = encode("\n\nQuotes from the text above.\n")
    inserted = [encode(fact) for fact in facts]
    text = text[: length - len(heading) - sum(map(len, inserted))]
    if kind == "quote":
        pairs = _quotes(random, text, encode)
    else:
        pairs = [(encode(question), encode(reply)) for question, reply in replies]
    answer = [token for question, reply in pairs for token in question + reply]
    scored = [mark for question, reply in pairs for mark in [False] * len(question) + [True] * len(reply)]
    return Item(_scattered(random, text, inserted) + heading, answer, scored)


def _needles(random: Random, count: int) -> Task:
    names = _names(random, " ", count)
    codes = {name: _number(random) for name in names}
    facts = [f" The secret code of the {name} is {code}." for name, code in codes.items()]
    asked = random.sample(names, min(count, _NEEDLES_ASKED))
    return facts, [(f"The secret code of the {name} is", f" {codes[name]}.\n") for name in asked]


def _chain(random: Random, count: int) -> Task:
    """A fifth of the variables are numbers, each other one is an earlier one."""
    names = _names(random, "_", count)
    values: dict[str, str] = {}
    facts = []
    for name in names:
        if len(values) < max(2, count // 5):
            values[name] = _number(random)
            facts.append(f" VAR {name} = {values[name]}.")
        else:
            source = random.choice(list(values))
            values[name] = values[source]
            facts.append(f" VAR {name} = VAR {source}.")
    asked = random.sample(names, min(count, _VARIABLES_ASKED))
    return facts, [(f"VAR {name} =", f" {values[name]}.\n") for name in asked]


def _quotes(random: Random, text: list[int], encode: Encode) -> list[tuple[list[int], list[int]]]:
    pairs = []
    for _ in range(_QUOTES):
        size = random.randrange(*_QUOTED)
        start = random.randrange(len(text) - size)
        passage = text[start : start + size]
        pairs.append((encode("Quote: ") + passage[:_GIVEN], passage[_GIVEN:] + encode("\n")))
    return pairs


def _names(random: Random, joint: str, count: int) -> list[str]:
    pairs = [quality + joint + thing for quality in _QUALITIES.split() for thing in _THINGS.split()]
    return random.sample(pairs, count)


def _number(random: Random) -> str:
    return str(random.randrange(10**6, 10**7))


def _scattered(random: Random, text: list[int], inserted: list[list[int]]) -> list[int]:
    """``text`` with the pieces inserted between its tokens, in their order."""
    mixed, begin = [], 0
    for end, piece in zip(sorted(random.sample(range(1, len(text)), len(inserted))), inserted, strict=True):
        mixed += text[begin:end] + piece
        begin = end
    return mixed + text[begin:]
