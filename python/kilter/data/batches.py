"""Mini-batches in an order that needs no generator state."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilter import _kilter
from kilter._backend import backend_of
from kilter._check import fail, seed_and_stream

# Initial weights use the streams below 2**30 of a seed; each epoch has one of the next 2**30 for its order.
FIRST_STREAM = 2**30
EPOCHS = 2**30


class Batches:
    """Split samples into mini-batches, in a new order for each epoch.

    The order is a pure function of (seed, epoch): a run that is resumed at epoch e sees the batches that the
    uninterrupted run sees, and nothing has to be saved for it.

    Parameters
    ----------
    x, y
        Inputs and targets, arrays of one library with the samples along the first axis, as many in both and
        at least one. They are not copied.
    batch_size
        Samples per batch, at least 1. One larger than the number of samples gives one batch of all of them.
    seed
        0 <= seed < 2**64.
    shuffle
        False keeps the order of the samples in every epoch.
    drop_last
        True leaves out the samples of an epoch that do not fill a batch, so that all batches have the same
        size.

    Attributes
    ----------
    samples
        Number of samples.

    Raises
    ------
    KilterError
        An argument is not as above, or `drop_last` would leave no batch.

    Examples
    --------
    >>> batches = Batches(x, y, 128, seed=0)
    >>> for epoch in range(10):
    ...     for x_batch, y_batch in batches.epoch(epoch):
    ...         ...
    """

    def __init__(
        self, x: Any, y: Any, batch_size: int, *, seed: int, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        for name, array in (("x", x), ("y", y)):
            if not getattr(array, "shape", ()) or not len(array):
                fail(name, "an array of at least one sample", getattr(array, "shape", type(array).__name__))
        self._xp = backend_of(x, y).xp
        if len(x) != len(y):
            fail("y", f"{len(x)} samples as in x", len(y))
        self.x, self.y, self.samples = x, y, len(x)
        self.batch_size = _whole("batch_size", batch_size, 1)
        if drop_last and batch_size > self.samples:
            fail("batch_size", f"at most {self.samples} with drop_last=True", batch_size)
        self.seed, _ = seed_and_stream(seed, FIRST_STREAM)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)

    def __len__(self) -> int:
        """Count the batches of one epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __repr__(self) -> str:
        return (
            f"Batches(samples={self.samples}, batch_size={self.batch_size}, seed={self.seed}, "
            f"shuffle={self.shuffle}, drop_last={self.drop_last})"
        )

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of all samples in the order of one epoch: (samples,) int64, on the host.

        Each sample has two words of Philox4x32-10, keyed by the seed in a stream of the epoch, as a 64-bit
        sort key; equal keys keep the order of the samples.

        Parameters
        ----------
        epoch
            0 <= epoch < 2**30.

        Raises
        ------
        KilterError
            `epoch` is out of range.
        """
        epoch = _whole("epoch", epoch, 0, EPOCHS)
        if not self.shuffle:
            return np.arange(self.samples, dtype=np.int64)
        words = np.empty(2 * self.samples, np.uint32)
        _kilter.philox(words, self.seed, FIRST_STREAM + epoch)
        keys = words[0::2].astype(np.uint64) << np.uint64(32) | words[1::2]
        return np.argsort(keys, kind="stable").astype(np.int64, copy=False)

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """Iterate over the batches of one epoch.

        Parameters
        ----------
        epoch
            0 <= epoch < 2**30.

        Yields
        ------
        x, y
            The same rows of both: new arrays that may be kept, or without `shuffle` views of the data.

        Raises
        ------
        KilterError
            `epoch` is out of range; raised by the call, before the first batch is asked for.
        """
        return self._gather(self.order(epoch)) if self.shuffle else self._slice(epoch)

    def _bounds(self) -> Iterator[tuple[int, int]]:
        for batch in range(len(self)):
            yield batch * self.batch_size, min((batch + 1) * self.batch_size, self.samples)

    def _gather(self, order: NDArray[np.int64]) -> Iterator[tuple[Any, Any]]:
        rows = self._xp.asarray(order)
        for start, stop in self._bounds():
            # New arrays cost no more than a reused one: the allocator hands back the last batch's memory.
            yield self.x.take(rows[start:stop], axis=0), self.y.take(rows[start:stop], axis=0)

    def _slice(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        _whole("epoch", epoch, 0, EPOCHS)
        return ((self.x[start:stop], self.y[start:stop]) for start, stop in self._bounds())


def _whole(argument: str, value: Any, low: int, stop: float = math.inf) -> int:
    """Return `value`, an integer with low <= value < stop, as an int."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value < stop:
        limit = "" if stop == math.inf else f" below {stop}"
        fail(argument, f"a whole number of at least {low}{limit}", repr(value))
    return int(value)
