"""Mailbox: tokens leave the device through memory that the host polls."""

import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.launch import launch

_SIGNATURE = Signature(
    "post",
    (
        Argument("tokens", torch.int64, "N"),
        Argument("counter", torch.int64, "1"),
        Argument("mailbox", torch.int64, "entries width", anywhere=True),
    ),
    (Rule("entries >= 1 and width > N", "an entry is a number and its tokens"),),
)


def post(tokens: Tensor, counter: Tensor, mailbox: Tensor) -> None:
    """Write the next entry of a ring, in place: the tokens, then its number, with system-scope release.

    Args:
        tokens: [N] int64.
        counter: [1] int64, entries posted so far.
        mailbox: [entries, 1 + M] int64, M >= N, in memory that host and device share; entry n stands in row
            ``n % entries`` as its number n and its tokens.
    """
    _SIGNATURE.check(tokens, counter, mailbox)
    if not tokens.is_cpu:
        launch(
            "mailbox.cu", "post", (1,), 128,
            [tokens, len(tokens), counter, mailbox, len(mailbox), mailbox.shape[1]],
        )  # fmt: skip
        return
    counter += 1
    entry = mailbox[int(counter) % len(mailbox)]
    entry[1 : 1 + len(tokens)] = tokens
    entry[0] = counter[0]
