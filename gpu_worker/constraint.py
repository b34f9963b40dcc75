"""Grammars that answers follow: which tokens may come next, computed by threads beside the steps.

llguidance does the work, without Python's lock, in tens of microseconds for most tokens.
"""

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clo.runtime.model.generation import read_generation

_THREADS = 4
_REMEMBERED = 64  # grammars, compiled

_logger = logging.getLogger(__name__)

Publish = Callable[[np.ndarray, int], None]
"""Takes a mask [ceil(vocab / 32)] int32 and the number of tokens after which it holds."""


class Constraint:
    """The grammar of one sequence. What it says may be asked for once it is ``done``.

    Args:
        pool: does the work.
        compiled: returns a matcher of the grammar's beginning; called in the pool.
        answer: tokens that have come already.
        words: of a mask.

    Attributes:
        mask: [words] int32, a bit for each token that may come next, low bits first.
        complete: whether the text is complete, so that nothing but its end may follow.
        error: why the grammar cannot be followed, or empty.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, compiled: Callable[[], Any], answer: Sequence[int], words: int
    ) -> None:
        self._pool, self._words = pool, words
        self.mask = np.zeros(words, np.int32)
        self.complete, self.error = False, ""
        self._matcher: Any = None
        self._work: Future[None] = pool.submit(self._begin, compiled, answer)

    @property
    def done(self) -> bool:
        """Whether the mask belongs to the latest token."""
        return self._work.done()

    def wait(self) -> None:
        """Until it is ``done``."""
        self._work.result()

    def advance(self, token: int, length: int, publish: Publish) -> None:
        """A token has come, with which the sequence has ``length`` tokens. What may follow goes to
        ``publish``, in a thread; nothing does where the text is complete or an error came up."""
        self._work = self._pool.submit(self._advance, token, length, publish)

    def _begin(self, compiled: Callable[[], Any], answer: Sequence[int]) -> None:
        try:
            self._matcher = compiled()
            for token in answer:
                self._matcher.consume_token(token)
            if self._matcher.is_error():
                self.error = self._matcher.get_error()
                return
            self.complete = bool(answer) and self._matcher.is_stopped()
            if not self.complete:
                self._look()
        except Exception as error:  # of a library that computes what a client wrote
            _logger.exception("A grammar failed.")
            self.error = str(error) or type(error).__name__

    def _advance(self, token: int, length: int, publish: Publish) -> None:
        try:
            self._matcher.consume_token(token)
            self.complete = self._matcher.is_stopped()
            if not self.complete:
                self._look()
            if not self.complete and not self.error:
                publish(self.mask, length)
        except Exception as error:
            _logger.exception("A grammar failed.")
            self.error = str(error) or type(error).__name__
        if self._matcher.is_error():
            self.error = self._matcher.get_error()

    def _look(self) -> None:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self.mask = mask[: self._words]
        if self._matcher.is_error():
            self.error = self._matcher.get_error()


class Constraints:
    """Makes constraints for a model's tokenizer.

    Args:
        folder: the model's folder.
        vocab: tokens of the model.

    Attributes:
        missing: why there can be none, or empty.
    """

    def __init__(self, folder: Path, vocab: int) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "grammar")
        self._words = -(-vocab // 32)
        self._compiled: dict[str, Any] = {}  # matchers of the latest grammars' beginnings
        self._tokenizer: Any = None
        self.missing = ""
        try:
            self._tokenizer = _load(folder, vocab)
        except ImportError:
            self.missing = "the package llguidance is not installed"
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            self.missing = f"llguidance cannot use the model's tokenizer ({error})"

    def begin(self, grammar: str, answer: Sequence[int] = ()) -> Constraint:
        """Compile a grammar of llguidance, of which ``answer`` has come already.

        Raises:
            RuntimeError: constraints are ``missing``.
        """
        if self.missing:
            raise RuntimeError(self.missing)
        known = self._compiled.get(grammar)
        if known is not None:
            return Constraint(self._pool, known.deep_copy, answer, self._words)
        return Constraint(self._pool, lambda: self._compile(grammar), answer, self._words)

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        self._compiled[grammar] = matcher.deep_copy()
        for oldest in list(self._compiled)[:-_REMEMBERED]:
            self._compiled.pop(oldest, None)  # another thread may do the same
        return matcher


def _load(folder: Path, vocab: int) -> Any:
    """The model's tokenizer, as llguidance has it."""
    from llguidance import LLTokenizer

    text = _byte_level((folder / "tokenizer.json").read_text())
    ends = list(read_generation(folder).eos) or None  # else llguidance guesses
    try:
        return LLTokenizer(text, n_vocab=vocab, eos_token=ends)
    except ValueError:  # some tokenizers know more tokens than their models
        return LLTokenizer(text, eos_token=ends)


def _byte_level(text: str) -> str:
    """A tokenizer.json whose decoder, where it ends in bytes of GPT-2's kind, says only that.

    Older versions of transformers (5.17) give converted GGUF files a decoder that first does what
    SentencePiece's tokenizers need and then decodes GPT-2's bytes. llguidance takes such a tokenizer for one
    of SentencePiece's and reads every blank wrong.
    """
    tokenizer = json.loads(text)
    decoder = tokenizer.get("decoder") or {}
    levels = [part for part in decoder.get("decoders", ()) if part["type"] == "ByteLevel"]
    if not levels:
        return text
    return json.dumps({**tokenizer, "decoder": levels[0]})
