"""How the ranks of a group divide a model: whose heads, rows and columns are which."""

from dataclasses import dataclass, replace
from typing import Any

from clo.runtime.model.kv_shape import KVShape
from clo.runtime.wire.errors import ConfigError

_MOST = 64  # ranks that are looked at


@dataclass(frozen=True)
class Rank:
    """One of the processes that serve a model together, ``number`` of ``count``: each has a share of the
    query heads with their KV heads, and of the rows or columns of every other matrix."""

    number: int = 0
    count: int = 1

    def part(self, size: int) -> slice:
        """Its part of ``size`` things. All parts are as large, but for the last ones where ``count`` does not
        divide them."""
        step = -(-size // self.count)
        return slice(min(size, self.number * step), min(size, (self.number + 1) * step))

    def kv_heads(self, heads: int) -> slice:
        """Its KV heads, of ``heads``. Where there are fewer heads than ranks, several ranks have the same
        one, each for query heads of its own."""
        if heads >= self.count:
            return self.part(heads)
        first = self.number * heads // self.count
        return slice(first, first + 1)

    def shape(self, whole: KVShape) -> KVShape:
        """The shape of its share of a model's KV. Blocks hold as many tokens as those of the whole model."""
        if self.count == 1:
            return whole
        heads = self.kv_heads(whole.kv_heads)
        return replace(
            whole,
            query_heads=whole.query_heads // self.count,
            kv_heads=heads.stop - heads.start,
            whole_heads=whole.kv_heads,
            ranks=self.count,
        )


ALONE = Rank()


def fits(config: Any, count: int) -> bool:
    """Whether so many ranks can divide a model. KV heads are divided, or where there are more ranks than
    these, each is held by as many ranks."""
    query: int = config.num_attention_heads
    kv: int = config.num_key_value_heads
    inner: int = config.intermediate_size
    divided = kv % count == 0 or count % kv == 0
    return divided and query % count == 0 and inner % count == 0


def fitting_counts(config: Any, most: int = _MOST) -> list[int]:
    """All numbers of ranks up to ``most`` that can divide a model."""
    return [count for count in range(1, most + 1) if fits(config, count)]


def check_ranks(config: Any, count: int) -> None:
    """Raises ``ConfigError`` where so many ranks cannot divide a model; it names those that can."""
    if fits(config, count):
        return
    *few, last = map(str, fitting_counts(config))
    others = f"{', '.join(few)} or {last} divide" if few else f"{last} divides"
    raise ConfigError(
        f"--tensor-parallel-size {count} cannot divide a model of {config.num_attention_heads} query heads, "
        f"{config.num_key_value_heads} KV heads and an intermediate size of {config.intermediate_size}; "
        f"{others} it."
    )
