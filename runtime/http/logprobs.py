"""Log-probabilities in the two shapes of OpenAI's API."""

import math
from codecs import getincrementaldecoder
from collections.abc import Sequence

from clo.runtime.http.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from clo.runtime.http.gateway import Gateway
from clo.runtime.wire.messages import Logprob

_LEAST = -9999.0  # JSON has no minus infinity; vLLM writes this


class Speller:
    """Writes tokens.

    Args:
        as_ids: write them as ``token_id:5``, which tells those apart that look the same.
    """

    def __init__(self, gateway: Gateway, as_ids: bool) -> None:
        self._spell, self._as_ids = gateway.spell, as_ids

    def text(self, token: int) -> str:
        """What is no whole character is written as its bytes, as OpenAI does."""
        if self._as_ids:
            return f"token_id:{token}"
        try:
            return self._spell(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._spell(token))

    def chat(self, logprobs: list[Logprob] | None) -> ChatLogprobs | None:
        if logprobs is None:
            return None
        return ChatLogprobs(
            [
                TokenLogprob(
                    self.text(entry.token),
                    _finite(entry.logprob),
                    list(self._spell(entry.token)),
                    [
                        TopLogprob(self.text(token), _finite(logprob), list(self._spell(token)))
                        for token, logprob in entry.top
                    ],
                )
                for entry in logprobs
            ]
        )

    def completion(
        self, tokens: Sequence[int], logprobs: Sequence[Logprob | None], wanted: int, offsets: "Offsets"
    ) -> CompletionLogprobs:
        """Of a text's tokens, in the shape of ``/v1/completions``.

        Args:
            logprobs: for each token, None for one that has none: the first of a prompt.
            wanted: most likely tokens beside each; the token itself is always among them.
            offsets: where the tokens begin.
        """
        return CompletionLogprobs(
            tokens=[self.text(token) for token in tokens],
            token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in logprobs],
            top_logprobs=[self._top(entry) if entry is not None and wanted else None for entry in logprobs],
            text_offset=[offsets.next(token) for token in tokens],
        )

    def _top(self, entry: Logprob) -> dict[str, float]:
        """Two tokens may be written the same; the likelier one counts."""
        both = [*entry.top, (entry.token, entry.logprob)]
        top: dict[str, float] = {}
        for token, logprob in both:
            top.setdefault(self.text(token), _finite(logprob))
        return top


class Offsets:
    """Where the tokens of a text begin, in characters. Special tokens give no text."""

    def __init__(self, gateway: Gateway) -> None:
        self._spell, self._spoken = gateway.spell, gateway.tokenizer.spoken
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, token: int) -> int:
        """Of the next token."""
        begin = self._characters
        if token in self._spoken:
            self._characters += len(self._decoder.decode(self._spell(token)))
        return begin


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
