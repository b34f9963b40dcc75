"""From prompts to token ids and from token ids back to text, in the router's process."""

import json
import re
from codecs import utf_8_decode
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tokenizers
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from clo.runtime.stop import StopString
from clo.runtime.wire.errors import ConfigError, InvalidRequest, PromptTooLong
from clo.runtime.wire.messages import Chat, Text, Tokens

_CONTEXT = 8  # tokens, or a few more, that are decoded again before the new ones
_WINDOW = 64  # tokens that are decoded at most
_CHARACTER_TOKENS = 4  # a character has at most 4 bytes, so at most 4 tokens

_BYTE_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


class Spelling(NamedTuple):
    """What each token stands for, where that is the same beside any other token."""

    whole: dict[int, str]  # tokens that are whole characters
    parts: dict[int, bytes]  # tokens that begin or end within a character
    drops_space: bool  # whether a space at the beginning of a text is left out


class Tokenizer:
    """The tokenizer of a model folder. Threads may share it.

    Args:
        folder: the model's folder, in the Hugging Face layout.
        vocab_size: size of the model's vocabulary; larger token ids are refused.

    Attributes:
        eos: ids that end a text, by the tokenizer and by ``generation_config.json``.
        spoken: ids that give text: all that the tokenizer knows but special ones and those that end a text.
        spelling: of all spoken ids; None where what they stand for depends on those beside them.

    Raises:
        ConfigError: the folder holds no tokenizer that can be loaded, or a damaged generation_config.json.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library raises many kinds, and Exception itself for a broken file
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"The tokenizer in {folder} cannot be loaded: {reason}") from error
        self._encode("")  # sets the tokenizer's options once; threads must not do that side by side
        self._vocab_size = vocab_size
        vocabulary = self._tokenizer.get_vocab()
        self._longest = max(map(len, vocabulary))
        self.eos = _eos_of(self._tokenizer, folder)
        added = self._tokenizer.added_tokens_decoder
        special = {token for token, entry in added.items() if entry.special}
        self.spoken = set(vocabulary.values()) - special - set(self.eos)
        fast = isinstance(self._tokenizer, PreTrainedTokenizerFast)
        plain = fast and type(self._tokenizer)._decode is PreTrainedTokenizerFast._decode
        self.spelling = _spelling_of(self._tokenizer.backend_tokenizer, self.spoken) if plain else None

    def encode(self, prompt: Text | Chat | Tokens, limit: int, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, at least one.

        Args:
            limit: tokens of the longest prompt; a text that is certainly longer is not tokenised at all.
            add_special_tokens: whether a plain text gets those that the tokenizer adds.

        Raises:
            InvalidRequest: the prompt is empty, an id is not in the vocabulary, or the chat template is
                missing or refuses the messages.
            PromptTooLong: the text cannot have as few as ``limit`` tokens.
        """
        if isinstance(prompt, Tokens):
            tokens = prompt.ids
            if len(tokens) > limit:
                raise PromptTooLong(
                    f"The prompt has {len(tokens)} tokens, the model length is {limit}; shorten it."
                )
        else:
            text = prompt.text if isinstance(prompt, Text) else self._render(prompt)
            if len(text) > limit * self._longest:
                raise PromptTooLong(
                    f"The text of {len(text)} characters cannot fit into the model length of {limit} tokens; "
                    "shorten it."
                )
            tokens = self._encode(text, add_special_tokens and isinstance(prompt, Text))
        if not tokens:
            raise InvalidRequest("The prompt is empty; give at least one token.")
        if max(tokens) >= self._vocab_size:  # a tokenizer may know more tokens than the model
            raise InvalidRequest(
                f"Token id {max(tokens)} is not in the vocabulary; ids go up to {self._vocab_size - 1}."
            )
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return ids

    def _render(self, chat: Chat) -> str:
        if self._tokenizer.chat_template is None:
            raise InvalidRequest("The model has no chat template; send a text or token ids.")
        if not chat.turns:
            raise InvalidRequest("The chat is empty; give at least one message.")
        turns = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
        try:
            text: str = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"The model's chat template refuses the messages: {error}.") from None
        return text


def _eos_of(tokenizer: Any, folder: Path) -> list[int]:
    """Ids that end a text."""
    file = folder / "generation_config.json"
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.exists() else None
        found = set(ids if isinstance(ids, list) else [ids]) | {tokenizer.eos_token_id}
        return sorted(found - {None})
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error}); copy the model again.") from None


def _spelling_of(backend: tokenizers.Tokenizer, tokens: set[int]) -> Spelling | None:
    """What the tokens stand for, where they are decoded as those of GPT-2 or of Llama 2 are."""
    decoder: Any = backend.decoder
    if isinstance(decoder, decoders.ByteLevel):
        bytes_of, drops_space = _byte_level, False
    elif _consists_of(decoder, _BYTE_FALLBACK):
        bytes_of, drops_space = _byte_fallback, False
    elif _consists_of(decoder, [*_BYTE_FALLBACK, decoders.Strip(" ", 1, 0)]):
        bytes_of, drops_space = _byte_fallback, True
    else:
        return None
    spelling = Spelling({}, {}, drops_space)
    for token in tokens:
        spelled = bytes_of(backend.id_to_token(token) or "")
        try:
            spelling.whole[token] = spelled.decode()
        except UnicodeDecodeError:
            spelling.parts[token] = spelled
    return spelling


def _consists_of(decoder: Any, stages: list[Any]) -> bool:
    """Whether a decoder is one of these stages, one after the other."""
    return bool(decoder) and decoder.__getstate__() == decoders.Sequence(stages).__getstate__()


def _byte_level(name: str) -> bytes:
    """What ``decoders.ByteLevel`` makes of a token, in which a character stands for a byte."""
    return bytes(map(_BYTE_LEVEL.__getitem__, name)) if _BYTE_LEVEL.keys() >= set(name) else name.encode()


def _byte_fallback(name: str) -> bytes:
    """What ``_BYTE_FALLBACK`` makes of a token, which is one byte, such as <0x0A>, or characters."""
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()


class Detokenizer:
    """Text of one sequence, token by token, up to a stop string.

    What is returned never changes later: an incomplete character and what may be the beginning of a stop
    string are held back. All parts together are the text of all tokens. (One exception: tokenizers that fall
    back to byte tokens decode a run of them together, and where such a run is not UTF-8 or holds U+FFFD
    itself, replacement characters may differ.)

    Args:
        stop: strings that end the text, each at least one character. The text ends before the first one
            that is complete.

    Attributes:
        stopped: a stop string was found; there is no more text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        spelling = tokenizer.spelling
        self._pieces = _Window(tokenizer) if spelling is None else _Spelled(spelling)
        self._stops = [StopString(text) for text in stop]
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """New text, often empty."""
        if self.stopped:
            return ""
        new = self._pieces.push(token)
        return self._until_stop(new) if self._stops else new

    def flush(self) -> str:
        """The rest, at the end of the sequence."""
        if self.stopped:
            return ""
        rest = self._until_stop(self._pieces.flush())
        return rest + self._held  # nothing is held back behind a stop string

    def _until_stop(self, new: str) -> str:
        """The part of the text held back and ``new`` that cannot belong to a stop string."""
        text = self._held + new
        for end, character in enumerate(new, len(self._held) + 1):
            complete = [stop.length for stop in self._stops if stop.push(character)]
            if complete:
                self.stopped = True
                self._held = ""
                return text[: end - max(complete)]
        certain = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


class _Spelled:
    """Text by putting together what tokens stand for."""

    def __init__(self, spelling: Spelling) -> None:
        self._whole, self._parts, self._drops_space = spelling
        self._rest = b""  # of an incomplete character

    def push(self, token: int) -> str:
        text = self._whole.get(token)
        if text is None or self._rest:
            data = self._rest + (self._parts.get(token, b"") if text is None else text.encode())
            text, used = utf_8_decode(data, "replace")
            self._rest = data[used:]
        if self._drops_space and text:
            self._drops_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._rest.decode(errors="replace")


class _Window:
    """Text by decoding the latest tokens again with each new one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the latest ones
        self._cut = 0  # place in the window where a character ends; the window may begin there later
        self._given = 0  # characters of the window's text that were passed on
        self._pending = 0  # tokens since all of the window's text was passed on

    def push(self, token: int) -> str:
        if token not in self._tokenizer.spoken:
            return ""
        self._tokens.append(token)
        self._pending += 1
        text = self._tokenizer.decode(self._tokens)
        stable = len(text)
        if text.endswith("\ufffd"):  # perhaps an incomplete character
            # Pending for longer than any character: the bytes are not UTF-8, and only the last can change.
            stable = len(text.rstrip("\ufffd")) if self._pending < _CHARACTER_TOKENS else len(text) - 1
        else:
            self._pending = 0
        new = text[self._given : stable]
        self._given = max(self._given, stable)
        if not self._pending and len(self._tokens) - self._cut >= _CONTEXT:
            # Tokenizers that fall back to bytes need the beginning of a character to decode what follows.
            self._shorten(self._cut, 0)
            self._cut = len(self._tokens)
        elif len(self._tokens) == _WINDOW:  # no valid UTF-8 for a long time
            self._shorten(_WINDOW - _CONTEXT, len(text) - self._given)
            self._cut = 0
        return new

    def flush(self) -> str:
        return self._tokenizer.decode(self._tokens)[self._given :]

    def _shorten(self, first: int, open_characters: int) -> None:
        """Begin the window at ``first``; ``open_characters`` at the end of its text were not passed on.

        Only the beginning of the text depends on the tokens before it, so the count is from its end.
        """
        self._tokens = self._tokens[first:]
        self._given = len(self._tokenizer.decode(self._tokens)) - open_characters
