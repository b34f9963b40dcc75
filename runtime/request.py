"""One request in the router: its state, from its arrival until its client has heard the last of it."""

from asyncio import Semaphore
from enum import Enum

from clo.runtime.tokenizer import Detokenizer
from clo.runtime.wire.messages import Reason, Run

LIKELY_TOKENS = 4096  # more are not counted as work that an answer still is


class State(Enum):
    """Where a request is. It moves on one way only, see ``NEXT``."""

    ADMITTING = "is being tokenised, or waits until the workers are ready and have few of its client's"
    ASSIGNED = "a worker has it: it waits there, prefills or decodes"
    LOST = "its worker has ended; it goes on as soon as there is another"
    STOPPING = "its worker has been told to end it; tokens that still come are dropped"
    CLOSED = "its client has been sent the last message, or is gone; its worker may not be done yet"


NEXT = {
    State.ADMITTING: {State.ASSIGNED, State.CLOSED},
    State.ASSIGNED: {State.LOST, State.STOPPING, State.CLOSED},
    State.LOST: {State.ASSIGNED, State.CLOSED},
    State.STOPPING: {State.CLOSED},
    State.CLOSED: set(),
}
"""The states that may follow a state."""


class Request:
    """A request from its ``Generate`` until its worker is done with it.

    Args:
        client: name of the client's connection.
        name: the client's own name for the request.
        size: bytes of the message that opened it.
        now: time in the event loop's seconds.

    Attributes:
        state: see ``State``; ``move`` changes it.
        arrived: when it came.
        heard: when the client was last sent something for it.
        stepped: when its latest token came.
        reason: why it ends, if the worker cannot know: "stop" (a stop string) or "cancelled".
        prefilled: tokens prefilled so far; None while it waits for its prefill.
        run: what its worker was told; None before it has one.
        answer: the tokens that have come.
        losses: how many workers have ended while they had it.
        scored: tokens of its prompt whose log-probabilities have come.
        sequence: its number on the worker; -1 before it has one.
        worker: name of the worker's connection.
        admitted: nothing waits any more to give it to a worker.
        permits: of its client, while a worker has it.
        text: turns its tokens into text; None before it is admitted.
        prompt: its tokens, where their log-probabilities are wanted.
        stop_token_ids: tokens that end it and give no text.
    """

    def __init__(self, client: bytes, name: str, size: int, now: float) -> None:
        self.client, self.name, self.size = client, name, size
        self.arrived = self.heard = self.stepped = now
        self.state = State.ADMITTING
        self.admitted = False
        self.permits: Semaphore | None = None
        self.reason: Reason | None = None
        self.prompt_tokens = self.max_tokens = 0
        self.prefilled: int | None = None
        self.run: Run | None = None
        self.answer: list[int] = []
        self.losses = self.scored = 0
        self.sequence = -1
        self.worker = b""
        self.text: Detokenizer | None = None
        self.prompt: list[int] = []
        self.stop_token_ids: frozenset[int] = frozenset()

    @property
    def generated(self) -> int:
        return len(self.answer)

    @property
    def complete(self) -> Reason | None:
        """Why its answer is complete, as far as that shows in the tokens, else None."""
        if self.run is None:
            return None
        sampling = self.run.sampling
        if self.generated >= sampling.max_tokens and (self.generated or self.scored >= self.prompt_tokens):
            return "length"
        eos = [] if sampling.ignore_eos else self.run.eos
        ended = self.answer and self.run.forced is None and self.answer[-1] in (*eos, *self.stop_token_ids)
        return "stop" if ended else None

    @property
    def open(self) -> bool:
        """Whether its client waits for more."""
        return self.state is not State.CLOSED

    @property
    def outstanding(self) -> int:
        """Tokens that its worker still has to compute, as far as anybody knows: few answers come to what they
        are allowed, and one that nobody has limited is allowed the whole context."""
        answer = min(self.max_tokens - self.generated, LIKELY_TOKENS)
        return self.prompt_tokens - (self.prefilled or 0) + answer

    def move(self, state: State) -> None:
        """Raises ``RuntimeError`` where ``state`` may not follow the present one."""
        if state not in NEXT[self.state]:
            raise RuntimeError(f"Request {self.name} cannot go from {self.state.name} to {state.name}.")
        self.state = state
