"""Loss and accuracy over batches of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from kilter._check import KilterError
from kilter.data import Batches
from kilter.nn import Module, softmax_cross_entropy

Loss: TypeAlias = Callable[[Any, Any], tuple[float, Any]]
EVALUATE_BATCH = 1000


@runtime_checkable
class Data(Protocol):
    """What `fit` and `evaluate` read: `kilter.data.Batches`, or anything with these two methods."""

    def epoch(self, epoch: int, /) -> Iterable[tuple[Any, Any]]:
        """The batches (x, y) of one epoch."""

    def __len__(self) -> int: ...


class Metrics(NamedTuple):
    """Means over samples."""

    loss: float
    accuracy: float | None  # share of right labels; None where the targets are no class indices
    samples: int


NOTHING = Metrics(math.nan, None, 0)


class Meter:
    """Sums loss and right labels over batches of any size."""

    def __init__(self) -> None:
        self.samples = self.right = 0
        self.loss = 0.0
        self.labelled = True

    def add(self, loss: float, logits: Any, y: Any) -> None:
        """Count one batch, with its mean loss."""
        n = len(y)
        self.samples += n
        self.loss += loss * n
        if self.labelled and y.ndim == 1 and logits.ndim == 2 and y.dtype.kind in "iu":
            self.right += int(np.count_nonzero(logits.argmax(axis=1) == y))
        else:
            self.labelled = False

    def mean(self) -> Metrics:
        """Means so far."""
        if not self.samples:
            return NOTHING
        return Metrics(self.loss / self.samples, self.right / self.samples if self.labelled else None, self.samples)


def evaluate(model: Module, data: Data | tuple[Any, Any], loss: Loss = softmax_cross_entropy) -> Metrics:
    """Mean loss and accuracy of a model in eval mode, weighted by the true number of samples in each batch.

    Parameters
    ----------
    model
        Its modes are restored afterwards.
    data
        Batches, whose epoch 0 is read, or arrays (x, y).
    loss
        As for `fit`.
    """
    if isinstance(data, Data):
        parts = data.epoch(0)
    else:
        x, y = arrays(data)
        parts = Batches(x, y, EVALUATE_BATCH, seed=0, shuffle=False).epoch(0)
    modes = [(module, module.training) for _, module in model.modules()]
    model.eval()
    meter = Meter()
    try:
        for x, y in parts:
            logits = model(x)
            meter.add(loss(logits, y)[0], logits, y)
    finally:
        for module, mode in modes:
            module.training = mode
    return meter.mean()


def arrays(data: Any) -> tuple[Any, Any]:
    """The pair (x, y), or a KilterError."""
    try:
        x, y = data
    except (TypeError, ValueError):
        raise KilterError(f"data: expected batches or arrays (x, y), got {type(data).__name__}") from None
    return x, y
