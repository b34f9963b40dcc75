"""When the tokens of requests came, and the figures that this gives."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import numpy as np


@dataclass
class Trace:
    """One request: when it was sent, and when its tokens came.

    All moments are seconds of ``time.perf_counter``.

    Attributes:
        sent: just before the request was built and sent.
        arrivals: each moment at which tokens came, and how many tokens of this request had come by then.
    """

    sent: float = field(default_factory=time.perf_counter)
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    async def follow(self, stream: AsyncIterator[int]) -> None:
        """Read a stream of numbers of tokens to its end."""
        tokens = 0
        async for count in stream:
            if count:
                tokens += count
                self.arrivals.append((time.perf_counter(), tokens))

    @property
    def tokens(self) -> int:
        """Tokens that have come."""
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def first(self) -> float:
        """When the first token came."""
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        """When the latest token came."""
        return self.arrivals[-1][0]

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.first - self.sent

    def by(self, moment: float) -> int:
        """Tokens that had come by a moment."""
        return max((tokens for at, tokens in self.arrivals if at <= moment), default=0)


def gaps(traces: Sequence[Trace], begin: float = -inf, end: float = inf) -> list[float]:
    """Seconds for which each stream stood still between two arrivals, where this touches a stretch of time.

    Tokens that come together count as one arrival: a reader sees nothing until they are there.
    """
    return [
        later - earlier
        for trace in traces
        for (earlier, _), (later, _) in pairwise(trace.arrivals)
        if later > begin and earlier < end
    ]


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated linearly; ``values`` holds at least one."""
    return float(np.percentile(values, percent))


def seconds(traces: Sequence[Trace]) -> float:
    """From the first request to the last token."""
    return max(trace.last for trace in traces) - min(trace.sent for trace in traces)


def rate_from_first(traces: Sequence[Trace]) -> float:
    """Tokens per second between the first token of all and the last one."""
    begin, end = min(trace.first for trace in traces), max(trace.last for trace in traces)
    return sum(trace.tokens for trace in traces) / (end - begin)


def rate_of_all(traces: Sequence[Trace]) -> float | None:
    """Tokens per second while every request decodes: from the moment at which the last of them has its first
    token to the moment at which the first of them ends. None where they are never all decoding."""
    begin, end = max(trace.first for trace in traces), min(trace.last for trace in traces)
    if end <= begin:
        return None
    return sum(trace.by(end) - trace.by(begin) for trace in traces) / (end - begin)
