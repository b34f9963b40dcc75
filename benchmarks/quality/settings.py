"""The caches that are measured, by name."""

from typing import NamedTuple, cast, get_args

from runtime.config import CacheConfig, Prefetch


class Setting(NamedTuple):
    """A cache to measure. ``whole``: a head that selects moves all that it selects, resident or not."""

    name: str
    config: CacheConfig
    whole: bool = False


DEFAULT = Setting("default", CacheConfig())
ACCEPT = Setting("default, accept", CacheConfig(prefetch="accept"))
CORRECT = Setting("default, correct", CacheConfig(prefetch="correct"))
FASTER = Setting("faster", CacheConfig(select_k=64))
PAPER = Setting("paper's rule", CacheConfig(select_k=256, resident=256, gate=0.8), whole=True)
SETTINGS = (
    # never selects: its one row stays the one that the prompt chose
    Setting("window", CacheConfig(select_k=1, resident=1, gate=0.0)),
    Setting("exact top-k", CacheConfig(attention="topk")),
    PAPER,
    DEFAULT,
    ACCEPT,
    CORRECT,
    FASTER,
)


def parse_setting(text: str) -> Setting:
    """A setting such as ``k=256,C=2048,gate=.9,prefetch=accept``; what is left out is the default's.

    Raises:
        ValueError: it is none.
    """
    options = dict(part.split("=", 1) for part in text.split(","))
    gate, prefetch = options.pop("gate", None), options.pop("prefetch", "off")
    config = CacheConfig(
        select_k=int(options.pop("k", DEFAULT.config.select_k)),
        resident=int(options.pop("C", DEFAULT.config.resident)),
        gate=None if gate is None else float(gate),
        prefetch=cast(Prefetch, prefetch),
    )
    if options or prefetch not in get_args(Prefetch):
        raise ValueError(f"'{text}' is no setting")
    return Setting(text, config)
