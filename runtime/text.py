"""Text to tokens and tokens to text, in the router's process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from runtime.errors import ConfigError, InvalidRequest
from runtime.messages import Chat, Text, Tokens

_UNFINISHED = "\ufffd"  # what a tokenizer shows for the first bytes of a character


class TextCodec:
    """A model's tokenizer.

    Args:
        folder: of the model, in Hugging Face format.
        vocab: token ids that the model knows.

    Raises:
        ConfigError: the folder holds no tokenizer that can be loaded.
    """

    def __init__(self, folder: Path, vocab: int) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"The tokenizer in {folder} cannot be loaded: {reason}") from None
        self._vocab = vocab
        self.eos = self._eos(folder)

    def _eos(self, folder: Path) -> list[int]:
        """Tokens that end a text: the tokenizer's own and those of generation_config.json."""
        found = {self._tokenizer.eos_token_id}
        path = folder / "generation_config.json"
        if path.is_file():
            named = json.loads(path.read_text()).get("eos_token_id")
            found |= set(named) if isinstance(named, list) else {named}
        return sorted(found - {None})

    def encode(self, prompt: Text | Chat | Tokens) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InvalidRequest: it is empty, holds unknown token ids, or the model has no chat template.
        """
        match prompt:
            case Text():
                ids = self._tokenizer(prompt.text)["input_ids"]
            case Chat():
                ids = self._tokenizer(self._render(prompt), add_special_tokens=False)["input_ids"]
            case Tokens():
                ids = self._known(prompt.ids)
        return self._filled(ids, "prompt")

    def encode_continuation(self, continuation: Text | Tokens) -> list[int]:
        """Token ids of what follows a prompt; no special tokens are added.

        Raises:
            InvalidRequest: it is empty or holds unknown token ids.
        """
        if isinstance(continuation, Tokens):
            ids = self._known(continuation.ids)
        else:
            ids = self._tokenizer(continuation.text, add_special_tokens=False)["input_ids"]
        return self._filled(ids, "continuation")

    def _render(self, chat: Chat) -> str:
        if not chat.turns:
            raise InvalidRequest("The prompt is empty; send at least one message.")
        turns = [{"role": turn.role, "content": turn.content} for turn in chat.turns]
        try:
            text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are code of the model and raise what they like
            raise InvalidRequest(f"The model's chat template does not take these messages: {error}") from None
        return text

    def _known(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self._vocab:
            raise InvalidRequest(f"Token id {max(ids)} is not in the vocabulary of {self._vocab}.")
        return ids

    def _filled(self, ids: list[int], what: str) -> list[int]:
        if not ids:
            raise InvalidRequest(f"The {what} is empty; send at least one token.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Detokenizer:
    """Text of one growing sequence of tokens, given out as soon as it is certain.

    Held back are incomplete characters and whatever may be the beginning of a stop string.

    Args:
        codec: of the model.
        stop: strings before which the text ends.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self._codec, self._stop = codec, stop
        self._tokens: list[int] = []  # from the last point at which the text was certain, and a few before it
        self._before = 0  # of these, tokens whose text has been taken
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """New text after one more token; sets ``stopped`` when a stop string has come."""
        self._tokens.append(token)
        known = self._codec.decode(self._tokens[: self._before])
        text = self._codec.decode(self._tokens)
        if text.endswith(_UNFINISHED):
            return ""
        # The tokens of the last piece stay: some tokenizers write a token differently at the start of a text.
        self._tokens = self._tokens[self._before :]
        self._before = len(self._tokens)
        return self._release(text[len(known) :])

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        known = self._codec.decode(self._tokens[: self._before])
        rest = self._codec.decode(self._tokens)[len(known) :]
        text, self._held = self._release(rest) + self._held, ""
        return "" if self.stopped else text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
