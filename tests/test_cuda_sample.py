"""The CUDA kernel of sampling against its reference on the CPU, token by token."""

import pytest
import torch
from torch import Tensor

from clo.kernels.sample import sample

pytestmark = pytest.mark.gpu


def compare(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> None:
    rows = len(logits)
    seed, position = torch.randint(0, 2**63 - 1, (rows,)), torch.randint(0, 10**6, (rows,))
    inputs = logits, temperature, top_p, top_k, seed, position
    found = sample(*(tensor.cuda() for tensor in inputs)).cpu()
    assert torch.equal(sample(*inputs), found)


@pytest.mark.parametrize("vocab", [1, 3, 50, 512, 1000, 1001, 49152, 128256, 128257, 262144])
def test_sample(vocab: int) -> None:
    rows = 24
    for spread in (1e-6, 0.3, 3.0, 10.0, 1e30):
        logits = torch.randn(rows, vocab) * spread
        logits[1] = 1.25
        logits[2:6] = logits[2:6].round()
        logits[7, ::3] = -torch.inf
        logits[8] = -0.0
        logits[8, ::2] = 0.0
        temperature = torch.rand(rows) * 2
        temperature[::5] = 0
        temperature[11:14] = torch.tensor([1e-9, 0.01, 100.0])
        top_p = torch.rand(rows)
        top_p[::3] = 1
        top_p[4] = 1e-30
        top_k = torch.randint(0, vocab + 2, (rows,))
        top_k[::4] = 0
        top_k[9:12] = torch.tensor([vocab, 2**31 - 1, 1])
        top_k[14:20] = torch.randint(1, 50, (6,))
        compare(logits, temperature, top_p, top_k)
        compare(logits, torch.zeros(rows), top_p, top_k)
        compare(logits, temperature + 0.1, torch.ones(rows), torch.zeros(rows, dtype=torch.int64))


def test_a_row_of_rubbish_gives_some_token_and_leaves_the_others_alone() -> None:
    rows, vocab = 24, 1000
    logits = torch.randn(rows, vocab)
    temperature, top_p = torch.arange(rows) % 2 * 0.7, torch.full((rows,), 0.9)
    numbers = torch.arange(rows)
    top_k = numbers % 3 * 20
    expected = sample(logits, temperature, top_p, top_k, numbers, numbers)
    logits[:4] = torch.nan
    logits[4:8, ::2] = torch.nan
    logits[8:10] = -torch.inf
    logits[10:12, 5] = torch.inf
    inputs = logits, temperature, top_p, top_k, numbers, numbers
    found = sample(*(tensor.cuda() for tensor in inputs)).cpu()
    assert ((found >= 0) & (found < vocab)).all()
    assert torch.equal(found[12:], expected[12:])
