"""From prompts to token ids and from token ids back to text, in the router's process."""

import inspect
import re
from codecs import utf_8_decode
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import tokenizers
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from clo.runtime.model.generation import read_generation
from clo.runtime.stop import StopString
from clo.runtime.wire.errors import ConfigError, InvalidRequest, PromptTooLong, context_is
from clo.runtime.wire.messages import MAX_JSON, MAX_JSON_VALUES, Chat, Text, Tokens, ToolCall, Turn

_CONTEXT = 8  # tokens, or a few more, that are decoded again before the new ones
_WINDOW = 64  # tokens that are decoded at most
_CHARACTER_TOKENS = 4  # a character has at most 4 bytes, so at most 4 tokens
_UNKNOWN = "\ufffd"  # stands for bytes that are not UTF-8, perhaps because a character is incomplete
_MARK = "\n"  # no tokenizer joins it with a letter
LONG_CHARACTERS = 10_000  # of a prompt that takes more than a few milliseconds
_TURN_CHARACTERS = 50  # as many take as long as an empty message of a chat

# What ``apply_chat_template`` takes beside variables of the template; a template of a client's own, for one,
# could compute for ever.
_NOT_VARIABLES = set(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) - {
    "tools",
    "documents",
    "kwargs",
}

_BYTE_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


class Spelling(NamedTuple):
    """What each token stands for, where that is the same beside any other token."""

    whole: dict[int, str]  # tokens that are whole characters
    parts: dict[int, bytes]  # tokens that begin or end within a character
    drops_space: bool  # whether a space at the beginning of a text is left out


def takes_long(prompt: Text | Chat | Tokens) -> bool:
    """Whether to tokenise a prompt takes so long that an event loop should have it done by a thread."""
    match prompt:
        case Text():
            characters = len(prompt.text)
        case Chat():
            # What a template makes of variables and tool calls may be long though the messages are short.
            characters = len(prompt.turns) * _TURN_CHARACTERS
            if characters >= LONG_CHARACTERS or prompt.chat_template_kwargs:
                return True
            if any(turn.tool_calls for turn in prompt.turns):
                return True
            characters += sum(map(_characters_of, prompt.turns))
        case Tokens():
            characters = 0
    return characters >= LONG_CHARACTERS


class Tokenizer:
    """The tokenizer of a model folder. Threads may share it.

    Args:
        folder: the model's folder, in the Hugging Face layout.
        vocab_size: size of the model's vocabulary; larger token ids are refused.

    Attributes:
        eos: ids that end a text, by the tokenizer and by the model.
        spoken: ids that give text: all that the tokenizer knows but special ones and those that end a text.
        spelling: of all spoken ids; None where what they stand for depends on those beside them.
        chat_template: the text of the model's chat template, or of all of them; "" without one.

    Raises:
        ConfigError: the folder holds no tokenizer that can be loaded, or what it says about the end of a text
            is damaged.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        ends = set(read_generation(folder).eos)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self._encode("")  # sets the tokenizer's options once; threads must not do that side by side
            vocabulary: dict[str, int] = self._tokenizer.get_vocab()
            self._longest = max(map(len, vocabulary))
            added = self._tokenizer.added_tokens_decoder
            # Some tokenizers mark the beginning of a text as the beginning of a word.
            self._marks = self._encode(_MARK + "a") != self._encode(_MARK) + self._encode("a")
        except Exception as error:  # the library raises many kinds, and Exception itself for a broken file
            reason = "it has no tokenizer.json"
            if (folder / "tokenizer.json").exists():
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
            raise ConfigError(
                f"The tokenizer in {folder} cannot be loaded ({reason}); copy the model again."
            ) from error
        template = self._tokenizer.chat_template or ""
        self.chat_template: str = "\n".join(template.values()) if isinstance(template, dict) else template
        self._vocab_size = vocab_size
        self.eos = sorted(ends | {self._tokenizer.eos_token_id} - {None})
        special = {token for token, entry in added.items() if entry.special}
        self.spoken = set(vocabulary.values()) - special - set(self.eos)
        fast = isinstance(self._tokenizer, PreTrainedTokenizerFast)
        plain = fast and type(self._tokenizer)._decode is PreTrainedTokenizerFast._decode
        self.spelling = _spelling_of(self._tokenizer.backend_tokenizer, self.spoken) if plain else None

    def encode(
        self, prompt: Text | Chat | Tokens, limit: int, *, continues: bool = False, special: bool = True
    ) -> list[int]:
        """Token ids of a prompt, at least one.

        Args:
            limit: tokens of the longest prompt; a text that is certainly longer is not tokenised at all.
            continues: whether a plain text goes on after another one. It gets no special tokens then.
            special: whether a plain text gets the special tokens that the tokenizer adds.

        Raises:
            InvalidRequest: the prompt is empty, an id is not in the vocabulary, or the chat template is
                missing, refuses the messages or cannot take its variables.
            PromptTooLong: the text cannot have as few as ``limit`` tokens.
        """
        if isinstance(prompt, Tokens):
            tokens = prompt.ids
            if len(tokens) > limit:
                raise PromptTooLong(
                    f"The prompt has {len(tokens)} tokens, and {context_is(limit)}; shorten it."
                )
        else:
            text = prompt.text if isinstance(prompt, Text) else self._render(prompt)
            if len(text) > limit * self._longest:
                raise PromptTooLong(
                    f"The text of {len(text)} characters cannot fit: {context_is(limit)}. Shorten it."
                )
            if continues:
                tokens = self._encode_continuation(text)
            else:
                tokens = self._encode(text, add_special_tokens=special and isinstance(prompt, Text))
        if not tokens:
            raise InvalidRequest("The prompt is empty; give at least one token.")
        if max(tokens) >= self._vocab_size:  # a tokenizer may know more tokens than the model
            raise InvalidRequest(
                f"Token id {max(tokens)} is not in the vocabulary; ids go up to {self._vocab_size - 1}."
            )
        return tokens

    def decode(self, tokens: list[int], *, special: bool = False) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD.

        Args:
            special: whether special tokens are spelled out; they give no text otherwise.
        """
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def spell(self, token: int) -> bytes:
        """What one token stands for by itself, special ones included; it may begin or end within a
        character."""
        if self.spelling is not None and token in self.spoken:
            whole = self.spelling.whole.get(token)
            return self.spelling.parts[token] if whole is None else whole.encode()
        mark = self._encode(_MARK)  # at the beginning of a text some tokenizers drop a space
        return self.decode([*mark, token], special=True)[len(self.decode(mark)) :].encode()

    def ending(self, tokens: list[int]) -> list[int]:
        """A few tokens at the end of a prompt, such that the text of an answer is what it adds to theirs: at
        the beginning of a text some tokenizers drop a space. Empty where the prompt ends within a character,
        or in no text at all."""
        spoken = [token for token in tokens[-_WINDOW:] if token in self.spoken]
        for count in range(min(_CONTEXT, len(spoken)), 0, -1):
            if _UNKNOWN not in self.decode(spoken[-count:]):
                return spoken[-count:]
        return []

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return ids

    def _encode_continuation(self, text: str) -> list[int]:
        """Without the mark of a beginning, which a text that goes on after another one does not have."""
        if self._marks:
            mark, whole = self._encode(_MARK), self._encode(_MARK + text)
            if whole[: len(mark)] == mark:
                return whole[len(mark) :]
        return self._encode(text)

    def _render(self, chat: Chat) -> str:
        if self._tokenizer.chat_template is None:
            raise InvalidRequest("The model has no chat template; send a text or token ids.")
        if not chat.turns:
            raise InvalidRequest("The chat is empty; give at least one message.")
        calls = [call for turn in chat.turns for call in turn.tool_calls or ()]
        texts = [chat.chat_template_kwargs, *(call.function.arguments for call in calls)]
        size = sum(map(len, texts))
        values = sum(text.count(mark) for text in texts for mark in "[{,")  # at least as many as there are
        if size > MAX_JSON or values > MAX_JSON_VALUES:
            raise InvalidRequest(
                f"chat_template_kwargs and arguments of tool calls have {size} characters and up to {values} "
                f"values in all; at most {MAX_JSON} and {MAX_JSON_VALUES} are taken."
            )
        variables = _object(chat.chat_template_kwargs, "chat_template_kwargs")
        for name in variables:
            if name in _NOT_VARIABLES:
                raise InvalidRequest(f"chat_template_kwargs cannot set '{name}'; leave it out.")
        turns = [_template_turn(turn) for turn in chat.turns]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **variables
            )
        except Exception as error:  # a template computes with what it is given, which can fail in any way
            reason = " ".join(f"{error or type(error).__name__}".split())[:300].rstrip(".")
            raise InvalidRequest(f"The model's chat template refuses the messages: {reason}.") from None
        return str(text)


def _characters_of(turn: Turn) -> int:
    """All that a template may write of a chat message but its tool calls."""
    texts = (turn.role, turn.text, turn.name, turn.tool_call_id, turn.reasoning_content)
    return sum(len(text) for text in texts if text)


def _template_turn(turn: Turn) -> dict[str, Any]:
    """A chat message as templates expect it."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.name is not None:
        message["name"] = turn.name
    if turn.tool_call_id is not None:
        message["tool_call_id"] = turn.tool_call_id
    if turn.reasoning_content is not None:
        message["reasoning_content"] = turn.reasoning_content
    if turn.tool_calls:
        message["tool_calls"] = [_template_call(call) for call in turn.tool_calls]
    return message


def _template_call(call: ToolCall) -> dict[str, Any]:
    """Templates write the arguments as JSON themselves, so they get an object, as in vLLM."""
    arguments = _object(call.function.arguments, "A tool call's arguments")
    function = {"name": call.function.name, "arguments": arguments}
    named = {} if call.id is None else {"id": call.id}
    return named | {"type": call.type, "function": function}


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{what} must be an object in JSON ({error}).") from None


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
        prompt: the tokens before the sequence, which give no text here.
        stop: strings that end the text, each at least one character. The text ends before the first one
            that is complete.
        min_tokens: first tokens in whose text no stop string ends.

    Attributes:
        stopped: a stop string was found; there is no more text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: list[str], min_tokens: int = 0) -> None:
        spelling = tokenizer.spelling
        self._pieces: _Spelled | _Window
        if spelling is None:
            self._pieces = _Window(tokenizer, tokenizer.ending(prompt))
        else:
            begins = not any(token in tokenizer.spoken for token in prompt)
            self._pieces = _Spelled(spelling, begins=begins)
        self._stops = [StopString(text) for text in stop]
        self._held = ""  # may be the beginning of a stop string
        self._unstopped = min_tokens  # tokens to come in whose text no stop string ends
        self.stopped = False

    def push(self, token: int) -> str:
        """New text, often empty."""
        if self.stopped:
            return ""
        new = self._pieces.push(token)
        if not self._stops:
            return new
        text = self._until_stop(new)
        self._unstopped -= 1
        return text

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
            complete = [stop for stop in self._stops if stop.push(character)]
            if complete and self._unstopped <= 0:
                self.stopped = True
                self._held = ""
                return text[: end - max(stop.length for stop in complete)]
            for stop in complete:
                stop.overlook()
        certain = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


class _Spelled:
    """Text by putting together what tokens stand for."""

    def __init__(self, spelling: Spelling, *, begins: bool) -> None:
        """``begins``: no text comes before this one."""
        self._whole, self._parts, drops_space = spelling
        self._drops_space = drops_space and begins
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
    """Text by decoding the latest tokens again with each new one.

    Args:
        before: spoken tokens before these; at their end a character ends.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before)  # the latest ones
        self._cut = 0  # place in the window where a character ends; the window may begin there later
        self._given = len(tokenizer.decode(before))  # characters of the window's text that were passed on
        self._pending = 0  # tokens since all of the window's text was passed on

    def push(self, token: int) -> str:
        if token not in self._tokenizer.spoken:
            return ""
        self._tokens.append(token)
        self._pending += 1
        text = self._tokenizer.decode(self._tokens)
        stable = len(text)
        if text.endswith(_UNKNOWN):  # perhaps an incomplete character
            # Pending for longer than any character: the bytes are not UTF-8, and only the last can change.
            stable = len(text.rstrip(_UNKNOWN)) if self._pending < _CHARACTER_TOKENS else len(text) - 1
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
