"""Softmax with cross-entropy: the loss and its gradient, of a small network and of a large vocabulary."""

from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from kilter import init, nn
from kilter.bench.timing import Case, copy_yard


@pytest.mark.parametrize("shape", [(32, 10), (1024, 10), (256, 1000), (64, 32_000)], ids=str)
def test_softmax_cross_entropy(measured, shape):
    z, y = init.normal(shape, seed=1), np.arange(shape[0]) % shape[1]
    peers = {"torch": with_torch(z, y)} if find_spec("torch") else {}
    name = f"softmax cross-entropy of {shape}"
    measured(Case(name, partial(nn.softmax_cross_entropy, z, y), 2 * z.nbytes, 2 * z.nbytes, *copy_yard(), peers))


def with_torch(z, y):
    import torch

    logits, labels = torch.from_numpy(z).requires_grad_(), torch.from_numpy(y)

    def work():
        logits.grad = None
        torch.nn.functional.cross_entropy(logits, labels).backward()

    return work
