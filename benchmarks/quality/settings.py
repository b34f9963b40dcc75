"""The caches that are measured, by name."""

from typing import NamedTuple, cast, get_args

from clo.runtime.config import CacheConfig, Prefetch


class Setting(NamedTuple):
    """A cache to measure. ``whole``: a head that selects moves all that it selects, resident or not."""

    name: str
    config: CacheConfig
    whole: bool = False


DEFAULT = Setting("default", CacheConfig())
OFF = Setting("default, prefetch off", CacheConfig(prefetch="off"))
VERIFIED = Setting("default, prefetch verified", CacheConfig(prefetch="verified"))
FASTER = Setting("faster", CacheConfig(select_k=64, resident=512))
CLOSER = Setting("closer", CacheConfig(select_k=256, resident=2048, tail=8192))
DROPPING = Setting("closer, without a tail", CacheConfig(select_k=256, resident=2048, tail=0))
PAPER = Setting(
    "paper's rule",
    CacheConfig(select_k=256, resident=256, tail=0, gate=0.8, prefetch="off"),
    whole=True,
)
SETTINGS = (
    # never selects: its one row stays the one that the prompt chose
    Setting("window", CacheConfig(select_k=1, resident=1, tail=0, gate=0.0, prefetch="off")),
    Setting("exact top-k", CacheConfig(attention="topk")),
    PAPER,
    DEFAULT,
    OFF,
    VERIFIED,
    FASTER,
    CLOSER,
    DROPPING,
    Setting("default, gate .9", CacheConfig(gate=0.9)),
)


def parse_setting(text: str) -> Setting:
    """A setting such as ``k=256,C=2048,tail=4096,gate=.9,prefetch=off``; what is left out is the default's.

    Raises:
        ValueError: it is none.
    """
    options = dict(part.split("=", 1) for part in text.split(","))
    k, resident, tail, gate = (options.pop(key, None) for key in ("k", "C", "tail", "gate"))
    prefetch = options.pop("prefetch", DEFAULT.config.prefetch)
    config = CacheConfig(
        select_k=None if k is None else int(k),
        resident=None if resident is None else int(resident),
        tail=None if tail is None else int(tail),
        gate=None if gate is None else float(gate),
        prefetch=cast(Prefetch, prefetch),
    )
    if options or prefetch not in get_args(Prefetch):
        raise ValueError(f"'{text}' is no setting")
    return Setting(text, config)
