"""Mini-batches in an order that needs no generator state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilter import _kilter
from kilter._backend import backend_of
from kilter._check import fail, seed_and_stream
from kilter.data.augment import crop, flip, noise
from kilter.data.draws import EPOCHS, FIRST_STREAM, keys, whole
from kilter.dist import shard

Transform: TypeAlias = Callable[..., tuple[Any, Any]]

# What these do to a sample does not depend on the rest of its batch.
SINGLE: tuple[Transform, ...] = (flip, crop, noise)


class Batches:
    """Split samples into mini-batches, in a new order for each epoch.

    The order is a pure function of (seed, epoch), and what a transform does to a sample one of (seed, epoch, index):
    a run that is resumed at epoch e sees the batches that the uninterrupted run sees, and nothing has to be saved
    for it.

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
    transform
        None, or one callable, or a sequence of them that is applied in order:
        `transform(x, y, *, seed, epoch, index, stream) -> (x, y)`. It gets a batch, which it must not change; `index`
        (N,) int64, on the host, says which samples of the data set these are, and `stream` is its place in the
        sequence. It must be a pure function of them. `kilter.data` has `flip, crop, noise, mixup, cutmix`, whose
        options `functools.partial` fixes.

    Attributes
    ----------
    samples
        Number of samples, those of all ranks.
    batch_size
        Samples per batch, those of all ranks together.
    rank, size
        Which part of each batch is yielded; see `shard`.

    Raises
    ------
    KilterError
        An argument is not as above, or `drop_last` would leave no batch; in `epoch`, a transform returns something
        else than (x, y) with as many rows in both.

    Examples
    --------
    >>> batches = Batches(x, y, 128, seed=0)
    >>> for epoch in range(10):
    ...     for x_batch, y_batch in batches.epoch(epoch):
    ...         ...
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        transform: Transform | Sequence[Transform] | None = None,
    ) -> None:
        for name, array in (("x", x), ("y", y)):
            if not getattr(array, "shape", ()) or not len(array):
                fail(name, "an array of at least one sample", getattr(array, "shape", type(array).__name__))
        self._xp = backend_of(x, y, names=("x", "y")).xp
        if len(x) != len(y):
            fail("y", f"{len(x)} samples as in x", len(y))
        self.x, self.y, self.samples = x, y, len(x)
        self.batch_size = whole("batch_size", batch_size, 1)
        if drop_last and batch_size > self.samples:
            fail("batch_size", f"at most {self.samples} with drop_last=True", batch_size)
        self.seed, _ = seed_and_stream(seed, FIRST_STREAM)
        self.shuffle, self.drop_last = bool(shuffle), bool(drop_last)
        self.transforms = _transforms(transform)
        self.rank, self.size = 0, 1

    def __len__(self) -> int:
        """Count the batches of one epoch."""
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __repr__(self) -> str:
        more = f", transform={self.transforms}" if self.transforms else ""
        more += f", rank={self.rank}, size={self.size}" if self.size > 1 else ""
        return (
            f"Batches(samples={self.samples}, batch_size={self.batch_size}, seed={self.seed}, "
            f"shuffle={self.shuffle}, drop_last={self.drop_last}{more})"
        )

    def shard(self, rank: int, size: int) -> Batches:
        """Return the part of one of `size` processes that train together.

        Every rank goes through the same batches. Of a batch of n samples, rank r yields the rows
        `kilter.dist.shard(n, r, size)`: together the ranks yield the batch, and shares differ by one sample at
        most. Where n < size, the last are empty: x and y then have zero rows. The samples are those of one process, bit
        for bit, transforms included: one that mixes samples sees the whole batch on every rank, before its rows are
        cut; `flip`, `crop` and `noise` see the rank's rows only.

        Parameters
        ----------
        rank, size
            0 <= rank < size.

        Raises
        ------
        KilterError
            An argument is not as above, or these batches are a shard already.
        """
        if self.size > 1:
            fail("shard", "the batches of all ranks", f"those of rank {self.rank} of {self.size}")
        part = copy.copy(self)
        part.size = whole("size", size, 1)
        part.rank = whole("rank", rank, 0, part.size)
        return part

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
        epoch = whole("epoch", epoch, 0, EPOCHS)
        if not self.shuffle:
            return np.arange(self.samples, dtype=np.int64)
        words = np.empty(2 * self.samples, np.uint32)
        _kilter.philox(words, self.seed, FIRST_STREAM + epoch)
        return np.argsort(keys(words.reshape(-1, 2)), kind="stable").astype(np.int64, copy=False)

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """Iterate over the batches of one epoch.

        Parameters
        ----------
        epoch
            0 <= epoch < 2**30.

        Yields
        ------
        x, y
            The same rows of both: new arrays that may be kept, or without `shuffle` and `transform` views of the data.

        Raises
        ------
        KilterError
            `epoch` is out of range; raised by the call, before the first batch is asked for.
        """
        epoch = whole("epoch", epoch, 0, EPOCHS)
        return self._batches(epoch, self.order(epoch))

    def _batches(self, epoch: int, order: NDArray[np.int64]) -> Iterator[tuple[Any, Any]]:
        rows = self._xp.asarray(order) if self.shuffle else None
        # A transform that mixes samples needs all of them.
        mixing = self.size > 1 and not all(getattr(t, "func", t) in SINGLE for t in self.transforms)
        for batch in range(len(self)):
            first = batch * self.batch_size
            n = min(self.batch_size, self.samples - first)
            own = shard(n, self.rank, self.size) if self.size > 1 else slice(0, n)
            low, high = own.start, own.stop
            start, stop = (first, first + n) if mixing else (first + low, first + high)
            if rows is None:
                x, y = self.x[start:stop], self.y[start:stop]
            else:
                # New arrays cost no more than a reused one: the allocator hands back the last batch's memory.
                taken = rows[start:stop]
                x, y = self.x.take(taken, axis=0), self.y.take(taken, axis=0)
            for stream, transform in enumerate(self.transforms):
                given = transform(x, y, seed=self.seed, epoch=epoch, index=order[start:stop], stream=stream)
                if not isinstance(given, tuple) or len(given) != 2 or len(given[0]) != len(given[1]):
                    fail("transform", "(x, y), with as many rows in both", type(given).__name__)
                x, y = given
            yield (x[low:high], y[low:high]) if mixing else (x, y)


def _transforms(transform: Transform | Sequence[Transform] | None) -> tuple[Transform, ...]:
    if transform is None:
        return ()
    found: tuple[Any, ...] = tuple(transform) if isinstance(transform, (list, tuple)) else (transform,)
    for each in found:
        if not callable(each):
            fail("transform", "callables", type(each).__name__)
    return found
