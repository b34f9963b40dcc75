"""How much of the prompts is computed between two decode steps, and ahead of the device."""

from collections import deque
from statistics import median
from typing import Protocol

_SHARE = 1.0  # time for each prompt that waits after each step, in decode steps
_AHEAD_SECONDS = 0.03  # of prefill on its way, at most: what comes meanwhile waits for so long
_AHEAD_UNITS = 2, 8  # at least, so that the device does not wait for the host; at most
_SAMPLES = 15  # measurements, of which the median counts


class Timer(Protocol):
    """Work that was measured."""

    @property
    def seconds(self) -> float | None:
        """What it took; None while it goes on."""


class Pacing:
    """Learns what the device does in a second, and says how much prefill it should be given.

    Work is counted in floating-point operations, since a unit late in a long prompt takes many times as long
    as one at its start.

    Args:
        tokens: tokens between two decode steps, counted as at the start of a prompt; None for so many that
            streams keep half their pace beside one prompt: a step comes after twice its time, and after more
            where several wait, so that a burst of prompts is taken in before the streams go on.
        token_flops: floating-point operations of a token at the start of a prompt.
    """

    def __init__(self, tokens: int | None, token_flops: float) -> None:
        self._fixed = None if tokens is None else tokens * token_flops
        self._steps: deque[float] = deque(maxlen=_SAMPLES)  # seconds
        self._rates: deque[float] = deque(maxlen=_SAMPLES)  # FLOP/s
        self._units: deque[tuple[Timer, float]] = deque()  # on their way, and their work
        self._measured: deque[Timer] = deque()  # steps on their way

    def launched(self, timer: Timer, flops: float) -> None:
        """A unit of prefill is on its way; ``timer`` has stopped behind it."""
        self._units.append((timer, flops))

    def launched_step(self, timer: Timer) -> None:
        """The same of a decode step."""
        self._measured.append(timer)

    def look(self) -> None:
        """Take in what has ended."""
        while self._units and (seconds := self._units[0][0].seconds) is not None:
            _, flops = self._units.popleft()
            self._rates.append(flops / max(seconds, 1e-9))
        while self._measured and (seconds := self._measured[0].seconds) is not None:
            self._measured.popleft()
            self._steps.append(seconds)

    def between_steps(self, prompts: int) -> float:
        """Work to do before the next decode step while so many prompts wait; 0, which stands for as little as
        possible, while nothing is known."""
        if self._fixed is not None:
            return self._fixed
        if not self._steps or not self._rates:
            return 0.0
        return prompts * _SHARE * median(self._steps) * median(self._rates)

    @property
    def more(self) -> bool:
        """Whether another unit may be launched: the host stays near the device."""
        least, most = _AHEAD_UNITS
        if len(self._units) < least:
            return True
        ahead = sum(flops for _, flops in self._units)
        return len(self._units) < most and bool(self._rates) and ahead < _AHEAD_SECONDS * median(self._rates)
