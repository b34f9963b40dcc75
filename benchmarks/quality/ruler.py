"""Tasks for any model, after RULER (Hsieh et al. 2024), on token ids; a seed always gives the same item.

``lookup``   numbers of some of many keys, each in a sentence of its own in the text (multi-key NIAH)
``track``    all variables that hold a value, through chains of assignments (variable tracking)
``count``    the most frequent words of a long numbered list: needs every line (common words extraction)
``list``     all numbers of the text in their order, and their keys
``copy``     a long passage of the text from its first words on: 2,048 tokens, at most a quarter of the prompt

Wording and definitions are RULER's, but for ``list`` and ``copy``, which it lacks, and but for sizes: RULER's
own fill no context below 4K. Copying short passages is the kind ``quote`` of ``benchmarks.tasks``.
"""

from random import Random
from typing import Literal

from benchmarks.tasks import Encode, Item, Task, _names, _number, _scattered

Ruler = Literal["lookup", "track", "count", "list", "copy"]

COPIED = 2048  # tokens

_TOKENS_PER_KEY = 128  # of a prompt
_ASKED = 8  # keys
_LISTED = 24  # keys
_CHAINS, _HOPS = 2, 4
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COMMON, _RARE_TIMES = 10, 3  # words, and how often each other one stands in the list
_QUESTION_TOKENS = 40  # of ``count``, about
_GIVEN = 16  # tokens of a passage to copy


def ruler_item(kind: Ruler, document: list[int], length: int, seed: int, encode: Encode) -> Item:
    """An item over a part of a document.

    Args:
        document: token ids, more than ``length``.
        length: tokens of the prompt at most, 500 or more.
        seed: chooses the part, the facts and the questions.
    """
    random = Random(seed)
    if kind == "copy":
        return _copy(random, document, length, encode)
    if kind == "count":
        prompt, pairs = _count(random, length, encode)
    else:
        make = {"lookup": _lookup, "track": _track, "list": _list}[kind]
        facts, pairs = make(random, length)
        inserted = [encode(fact) for fact in facts]
        start = random.randrange(len(document) - length)
        text = document[start : start + length - sum(map(len, inserted)) - len(encode(pairs[0][0]))]
        prompt = _scattered(random, text, inserted)
    answer: list[int] = []
    scored: list[bool] = []
    for question, reply in pairs:
        for text, marked in ((encode(question), False), (encode(reply), True)):
            answer += text
            scored += [marked] * len(text)
    return Item(prompt, answer, scored)


def _copy(random: Random, document: list[int], length: int, encode: Encode) -> Item:
    heading, size = encode("\n\nQuotes from the text above.\nQuote: "), min(COPIED, length // 4)
    start = random.randrange(len(document) - length)
    text = document[start : start + length - len(heading)]
    start = random.randrange(len(text) - size)
    passage = text[start : start + size]
    return Item(text + heading, passage, [False] * _GIVEN + [True] * (size - _GIVEN))


def _facts(random: Random, count: int) -> tuple[dict[str, str], list[str]]:
    """Keys with their numbers, and the sentences that say so."""
    numbers = {name: _number(random) for name in _names(random, "-", count)}
    return numbers, [f" One of the special magic numbers for {key} is: {numbers[key]}." for key in numbers]


def _lookup(random: Random, length: int) -> Task:
    numbers, facts = _facts(random, max(_ASKED, length // _TOKENS_PER_KEY))
    return facts, [
        (f"\nThe special magic number for {key} mentioned in the provided text is:", f" {numbers[key]}")
        for key in random.sample(list(numbers), _ASKED)
    ]


def _list(random: Random, length: int) -> Task:
    numbers, facts = _facts(random, min(_LISTED, length // _TOKENS_PER_KEY))
    heading = "\n\nAll special magic numbers of the text above, in their order:\n"
    lines = [f" {key} is: {number}." for key, number in numbers.items()]
    return facts, [("\n" if number else heading, line) for number, line in enumerate(lines)]


def _track(random: Random, _: int) -> Task:
    """Chains of assignments, mixed with each other; each chain is asked for by its value."""
    facts_of, pairs = [], []
    for _ in range(_CHAINS):
        names = ["".join(random.sample(_LETTERS, 5)) for _ in range(_HOPS + 1)]
        value = str(random.randrange(10_000, 100_000))
        sources = [value, *(f"VAR {name}" for name in names[:-1])]
        facts_of.append([f" VAR {name} = {source}." for name, source in zip(names, sources, strict=True)])
        question = (
            f"\nFind all variables that are assigned the value {value} in the text above. Answer: According "
            f"to the chain of variable assignment in the text above, {len(names)} variables are assigned the "
            f"value {value}, they are:"
        )
        pairs.append((question, f" {' '.join(names)}"))
    order = [facts for facts in facts_of for _ in facts]
    random.shuffle(order)
    return [facts.pop(0) for facts in order], pairs


def _count(random: Random, length: int, encode: Encode) -> tuple[list[int], list[tuple[str, str]]]:
    """Half of the lines are the common words; the answer has them in the order of their first line."""
    heading = encode(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
        "ones that appear most often.\n"
    )
    words = _names(random, "", 900)
    sample = encode("".join(f"{1000 + number}. {word}\n" for number, word in enumerate(words)))
    lines = (length - len(heading) - _QUESTION_TOKENS) * len(words) // len(sample)
    rare = words[_COMMON : _COMMON + lines // 2 // _RARE_TIMES]
    listed = words[:_COMMON] * (lines // 2 // _COMMON) + rare * _RARE_TIMES
    random.shuffle(listed)
    text = "".join(f"{number}. {word}\n" for number, word in enumerate(listed, 1))
    first = sorted(words[:_COMMON], key=listed.index)
    question = (
        "Question: What are the 10 most common words in the above list?\n"
        "Answer: The top 10 words that appear most often in the list are:"
    )
    pairs = [(f"\n{number}.", f" {word}") for number, word in enumerate(first, 1)]
    return heading + encode(text + question), pairs
