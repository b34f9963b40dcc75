"""What has passed through the router since its start, in numbers for a monitoring system."""

from bisect import bisect_left
from typing import Literal

import msgspec

from clo.runtime.request import Request
from clo.runtime.wire.messages import NO_STATS, CacheStats, Histogram, Reason, Traffic

_FIRST_TOKEN_S = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
_GAP_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _Buckets:
    """A histogram that grows."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        return Histogram(list(self._bounds), self._counts[:], self._sum)


class TrafficMeter:
    """Counts requests and tokens. Times are in the event loop's seconds."""

    def __init__(self) -> None:
        self._prompt_tokens = self._generated = 0
        self._ended: dict[Reason | Literal["failed"], int] = dict.fromkeys(
            ("stop", "length", "cancelled", "failed"), 0
        )
        self._first_token, self._gap = _Buckets(_FIRST_TOKEN_S), _Buckets(_GAP_S)
        self._request, self._step = _Buckets(_REQUEST_S), _Buckets(_STEP_TOKENS)
        self._cache = NO_STATS

    def step(self, tokens: int) -> None:
        """A step of a worker has brought so many tokens."""
        self._step.add(tokens)

    def token(self, request: Request, now: float) -> None:
        """A token of a request has arrived."""
        self._generated += 1
        if request.generated:
            self._gap.add(now - request.stepped)
        else:
            self._first_token.add(now - request.arrived)
            self._prompt_tokens += request.prompt_tokens
        request.stepped = now

    def end(self, request: Request, how: Reason | Literal["failed"], now: float) -> None:
        """A request has ended."""
        self._ended[how] += 1
        self._request.add(now - request.arrived)

    def add_cache(self, stats: CacheStats) -> None:
        """A request has left its worker."""
        both = zip(msgspec.structs.astuple(self._cache), msgspec.structs.astuple(stats), strict=True)
        self._cache = CacheStats(*(before + new for before, new in both))

    def traffic(self) -> Traffic:
        return Traffic(
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            ended=self._ended.copy(),
            first_token=self._first_token.histogram(),
            token_gap=self._gap.histogram(),
            request=self._request.histogram(),
            step_tokens=self._step.histogram(),
            cache=self._cache,
        )
