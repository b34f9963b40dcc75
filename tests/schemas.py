"""JSON schemas for tests of structured output, of every kind that is served, whose instances are short."""

import random
from typing import Any

_NAMES = ("name", "age", "city", "tags", "ok", "size", "kind", "when", "über", "a b")
_WORDS = ("red", "green", "dark blue", "naïve", 'say "x"', "")
_PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(yes|no)$", "^[a-f0-9]{4}$")
_FORMATS = ("date", "ipv6", "uuid", "ipv4")  # not those of times, whose seconds may have digits without end


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose instances have at most some dozens of characters."""
    kinds = [_string, _integer, _number, _enum, _constant, _boolean, _null]
    if depth:
        kinds += [_object, _object, _array, _any_of, _reference]
    return rng.choice(kinds)(rng, depth)


def object_schema(rng: random.Random) -> dict[str, Any]:
    """The same of an object, as applications ask for."""
    return _object(rng, 2)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(1, 8)},
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "string", "pattern": rng.choice(_PATTERNS)},
            {"type": "string", "format": rng.choice(_FORMATS)},
        ]
    )


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 7, 1000])}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number", "multipleOf": 0.5, "exclusiveMinimum": 0, "maximum": rng.randint(1, 99)}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample([*_WORDS, 5, None, True, [1, "x"], {"k": -1}], 4)}


def _constant(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice([*_WORDS, 12, {"b": 1, "a": [None]}])}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "null"}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: schema(rng, depth - 1) for name in names},
        "required": names[: rng.randint(0, len(names))],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 1)
    if rng.random() < 0.3:
        places = [schema(rng, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": places, "items": False, "minItems": least}
    items = schema(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    part = schema(rng, 0)
    properties = {"first": {"$ref": "#/$defs/part"}, "second": {"$ref": "#/$defs/part"}}
    if depth < 2:  # a reference is from the root
        return part
    return {
        "$defs": {"part": part},
        "type": "object",
        "properties": properties,
        "required": ["first"],
        "additionalProperties": False,
    }
