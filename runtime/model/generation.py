"""What a model folder says about generating: the tokens that end a text, and how to sample by default."""

from pathlib import Path
from typing import TypeVar

import msgspec

from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.messages import MaxTokens, MinP, RepetitionPenalty, Temperature, TokenId, TopK, TopP

Read = TypeVar("Read", bound=msgspec.Struct)


class _Ends(msgspec.Struct, frozen=True):
    """The part of config.json that is about generating."""

    eos_token_id: TokenId | list[TokenId] | None = None


class _GenerationConfig(_Ends, frozen=True):
    """generation_config.json, as far as CLO knows it. Names that it does not know mean nothing here."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    max_new_tokens: MaxTokens | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What holds for a request that does not say otherwise.

    Attributes:
        eos: ids that end a text.
        max_tokens: the most tokens of an answer; None for what there is room for.
    """

    eos: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


def read_generation(folder: Path) -> GenerationDefaults:
    """The defaults of a model folder.

    As in vLLM, ``do_sample`` is not looked at, and config.json has a say about the end of a text only where
    generation_config.json has none.

    Raises:
        ConfigError: generation_config.json, or config.json's ``eos_token_id``, is damaged.
    """
    found = _read(folder / "generation_config.json", _GenerationConfig)
    eos = found.eos_token_id
    if eos is None:
        eos = _read(folder / "config.json", _Ends).eos_token_id
    ends: list[int] = [] if eos is None else [eos] if isinstance(eos, int) else eos
    return GenerationDefaults(
        eos=tuple(ends),
        temperature=1.0 if found.temperature is None else found.temperature,
        top_p=1.0 if found.top_p is None else found.top_p,
        top_k=max(0, found.top_k or 0),
        min_p=found.min_p or 0.0,
        repetition_penalty=found.repetition_penalty or 1.0,
        max_tokens=found.max_new_tokens,
    )


def _read(file: Path, kind: type[Read]) -> Read:
    """A file of a model folder; one that is missing says nothing."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except FileNotFoundError:
        return kind()
    except (msgspec.DecodeError, OSError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged ({error}); copy the model again.") from None
