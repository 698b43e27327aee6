"""Loss and accuracy over batches of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from kilter._backend import backend_of
from kilter._check import KilterError
from kilter.data import Batches
from kilter.dist import Communicator
from kilter.nn import Module, softmax_cross_entropy
from kilter.train.ranks import total

Loss: TypeAlias = Callable[[Any, Any], tuple[float, Any]]
EVALUATE_BATCH = 250  # of a small network for images, larger ones leave the caches


@runtime_checkable
class Data(Protocol):
    """What `fit` and `evaluate` read: `kilter.data.Batches`, or anything with these two methods."""

    def epoch(self, epoch: int, /) -> Iterable[tuple[Any, Any]]:
        """The batches (x, y) of one epoch."""

    def __len__(self) -> int: ...


class Metrics(NamedTuple):
    """Means over samples."""

    loss: float
    accuracy: float | None  # share of right labels; None where targets are no class indices, as those of mixed samples
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
            self.right += int(backend_of(logits).xp.count_nonzero(logits.argmax(axis=1) == y))
        else:
            self.labelled = False

    def mean(self) -> Metrics:
        """Means so far."""
        if not self.samples:
            return NOTHING
        return Metrics(self.loss / self.samples, self.right / self.samples if self.labelled else None, self.samples)

    @property
    def sums(self) -> list[float]:
        """What `mean` divides, as plain numbers that can be saved, or added over ranks."""
        return [self.loss, self.samples, self.right, not self.labelled]

    @sums.setter
    def sums(self, values: list[float]) -> None:
        self.loss, self.samples, self.right, self.labelled = values[0], int(values[1]), int(values[2]), not values[3]


def evaluate(
    model: Module,
    data: Data | tuple[Any, Any],
    loss: Loss = softmax_cross_entropy,
    *,
    comm: Communicator | None = None,
) -> Metrics:
    """Mean loss and accuracy of a model in eval mode, weighted by the true number of samples in each batch.

    Parameters
    ----------
    model
        Its modes are restored afterwards.
    data
        Batches, whose epoch 0 is read, or arrays (x, y).
    loss
        As for `fit`.
    comm
        Shares the samples of `Batches` and of arrays out; all ranks get the metrics of all.
    """
    batches = data if isinstance(data, Data) else Batches(*arrays(data), EVALUATE_BATCH, seed=0, shuffle=False)
    parts = shared(batches, comm).epoch(0)
    modes = [(module, module.training) for _, module in model.modules()]
    model.eval()
    meter = Meter()
    try:
        for x, y in parts:
            if len(x):
                logits = model(x)
                meter.add(loss(logits, y)[0], logits, y)
    finally:
        for module, mode in modes:
            module.training = mode
    meter.sums = total(comm, meter.sums)
    return meter.mean()


def shared(batches: Data, comm: Communicator | None) -> Data:
    """This rank's share of each batch, where it is still that of all ranks."""
    if comm is None or comm.size == 1 or not isinstance(batches, Batches) or batches.size > 1:
        return batches
    return batches.shard(comm.rank, comm.size)


def arrays(data: Any) -> tuple[Any, Any]:
    """The pair (x, y), or a KilterError."""
    try:
        x, y = data
    except (TypeError, ValueError):
        raise KilterError(f"data: expected batches or arrays (x, y), got {type(data).__name__}") from None
    return x, y
