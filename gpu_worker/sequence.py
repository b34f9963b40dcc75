"""One request on a worker: its state, and what belongs to it in that state."""

from enum import Enum

from clo.gpu_worker.constraint import Constraint
from clo.gpu_worker.outputs import SlotRelease
from clo.gpu_worker.prefill import Prefill
from clo.gpu_worker.prompt_scores import PromptScores
from clo.gpu_worker.suffix_graphs import SuffixPrefill
from clo.runtime.wire.messages import Reason, Run


class State(Enum):
    """Where a sequence is. It moves on one way only, see ``NEXT``."""

    COMPILING = "its grammar is being compiled"
    WAITING = "waits for a slot of the batch"
    ALLOCATING = "has a slot and waits for blocks"
    PREFILLING = "has blocks; its prompt is being computed, or waits for its turn"
    DECODING = "takes part in every step"
    DRAINING = "takes part in no further step; the last one's token is on its way"
    RELEASING = "has ended or is preempted; the device may still touch its slot and blocks"
    GONE = "holds nothing"


NEXT = {
    State.COMPILING: {State.WAITING, State.GONE},
    State.WAITING: {State.ALLOCATING, State.GONE},
    State.ALLOCATING: {State.PREFILLING, State.RELEASING, State.GONE},
    State.PREFILLING: {State.DECODING, State.RELEASING},
    State.DECODING: {State.DRAINING, State.RELEASING},
    State.DRAINING: {State.RELEASING},
    State.RELEASING: {State.GONE},
    State.GONE: set(),
}
"""The states that may follow a state."""


class Sequence:
    """A request on the worker.

    Args:
        run: the request.
        constraint: its grammar, where it has one.

    Attributes:
        state: see ``State``; ``move`` changes it.
        prompt: tokens of its prompt.
        tokens: the prompt and all tokens generated so far.
        ends: tokens that end it.
        slot: its slot of the batch, -1 before it has one.
        blocks: its blocks of the arena, empty before they are granted.
        number: how many had come before it; one that was preempted keeps its own.
        asked: blocks that were asked for so far.
        growing: whether further blocks have been asked for and not come yet.
        starving: whether there are none for it as long as nobody gives some back.
        preempted: it is on its way out, and begins again where its tokens end.
        prefill: the work on its prompt, None before its turn and afterwards.
        launched: tokens of the answer that have arrived or are on their way.
        steps: decode steps launched for it.
        cached: tokens of the prompt whose rows were there already.
        committed: tokens that the store knows of.
        reported: when its progress was last reported, in seconds of ``time.monotonic``.
        reason: why it ended, None before.
        failure: what went wrong with it, where something did.
        scores: log-probabilities of its prompt, where they are wanted.
        release: the slot on its way out, from ``State.DRAINING`` or ``State.RELEASING`` on.
    """

    def __init__(self, run: Run, number: int, constraint: Constraint | None = None) -> None:
        self.run, self.number, self.constraint = run, number, constraint
        self.state = State.WAITING if constraint is None else State.COMPILING
        self.prompt = len(run.tokens) - run.answered
        self.tokens = list(run.tokens)
        self.ends = (
            run.sampling.stop_token_ids
            if run.sampling.ignore_eos
            else [*run.eos, *run.sampling.stop_token_ids]
        )
        self.slot = -1
        self.blocks: list[int] = []
        self.asked = 0
        self.growing = self.starving = self.preempted = False
        self.prefill: Prefill | SuffixPrefill | None = None
        self.launched = run.answered
        self.steps = self.cached = self.committed = 0
        self.reported = 0.0
        self.reason: Reason | None = None
        self.failure = ""
        self.scores: PromptScores | None = None
        self.release: SlotRelease | None = None

    @property
    def id(self) -> int:
        return self.run.sequence

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def longest(self) -> int:
        """The most tokens that it may have in the end."""
        return self.prompt + self.run.sampling.max_tokens

    def move(self, state: State) -> None:
        """Raises ``RuntimeError`` where ``state`` may not follow the present one."""
        if state not in NEXT[self.state]:
            raise RuntimeError(f"Sequence {self.id} cannot go from {self.state.name} to {state.name}.")
        self.state = state
