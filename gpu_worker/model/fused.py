"""Chains of element-wise operations as one kernel each."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def fused(function: Callable[..., T], *tokens: int) -> Callable[..., T]:
    """A function compiled for a GPU, with the sizes of the model built in.

    With sizes that it does not know, the compiler writes kernels that take three to six times as long over a
    chunk of a prompt.

    Args:
        function: of tensors and numbers.
        tokens: positions of the arguments whose first dimension may have any size.
    """
    # Every model in a process, and a single token, has kernels of its own. The default is 8.
    torch._dynamo.config.recompile_limit = 256
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*arguments: Any) -> T:
        for place in tokens:
            torch._dynamo.maybe_mark_dynamic(arguments[place], 0)
        return compiled(*arguments)

    return call
