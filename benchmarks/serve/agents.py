"""A trace of agents: sessions whose every turn sends all that was said before, and a little more.

Generated, after the statistics that vLLM and Mooncake published in May 2026: 94 % of the tokens of prompts
had been sent before, 131 tokens come in for each that goes out, 33 turns make a session, and 5 s lie between
two turns. The tokens themselves are random.
"""

from dataclasses import dataclass
from itertools import pairwise
from random import Random

FIRST_TOKEN, LAST_TOKEN = 4, 300  # ids that every tokenizer knows, and none of them special in those used


@dataclass(frozen=True)
class Agents:
    """What a trace is generated from; the defaults are those statistics.

    Attributes:
        sessions: that go on at the same time.
        turns: of each session, one after another.
        first, last: tokens of the prompts of a session's first and last turn.
        shared: tokens with which all sessions begin: instructions and descriptions of tools.
        ratio: tokens of all prompts for each token of an answer.
        think_s: seconds from an answer to the next turn of its session.
        seed: of all tokens.
    """

    sessions: int = 20
    turns: int = 33
    first: int = 12 * 1024
    last: int = 80 * 1024
    shared: int = 8 * 1024
    ratio: int = 131
    think_s: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ``ValueError`` where there is no such trace."""
        if min(self.sessions, self.turns, self.ratio) < 1 or self.think_s < 0:
            raise ValueError("a trace has at least one session, one turn and a ratio of one")
        if not 0 <= self.shared < self.first <= self.last:
            raise ValueError(
                "the shared tokens are fewer than the first prompt's, and the last one is longest"
            )
        if any(grown <= self.answer for grown in self._growth()):
            raise ValueError("a turn adds no more tokens than the answer before it has; raise --trace-last")

    @property
    def answer(self) -> int:
        """Tokens of each answer."""
        return max(1, round((self.first + self.last) / 2 / self.ratio))

    @property
    def prompts(self) -> list[int]:
        """Tokens of the prompt of each turn, which grow evenly."""
        steps = max(1, self.turns - 1)
        return [self.first + (self.last - self.first) * turn // steps for turn in range(self.turns)]

    def _growth(self) -> list[int]:
        return [later - earlier for earlier, later in pairwise(self.prompts)]

    def opening(self, session: int) -> list[int]:
        """The prompt of a session's first turn."""
        return self.tokens("shared", self.shared) + self.tokens(f"{session} 0", self.first - self.shared)

    def added(self, session: int, turn: int) -> list[int]:
        """What a later turn puts behind the answer before it, such as the output of a tool."""
        return self.tokens(f"{session} {turn}", self._growth()[turn - 1] - self.answer)

    def tokens(self, name: str, count: int) -> list[int]:
        """So many random tokens, always the same ones under a name."""
        return Random(f"{self.seed} {name}").choices(range(FIRST_TOKEN, LAST_TOKEN), k=count)
