"""The protocol of a communicator, and the one of a run alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter._check import KilterError, fail


@runtime_checkable
class Communicator(Protocol):
    """One rank's end of a group: all that kilter asks of a communicator.

    Every call but `rank` and `size` is collective: all ranks make the same calls in the same order, with arrays of one
    shape and dtype. Every rank gets the same bits; the ranks that run on the host take sums in their order, in float32
    for 16-bit arrays, which are rounded once.
    """

    @property
    def rank(self) -> int:
        """Which rank this is, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, a: Any) -> Any:
        """Writes the sum over all ranks into `a` and returns it."""

    def broadcast(self, a: Any, root: int = 0) -> Any:
        """Writes the array of rank `root` into `a` and returns it."""

    def all_gather(self, a: Any) -> Any:
        """Returns the arrays of all ranks in rank order: a new array of shape (size, *a.shape)."""

    def barrier(self) -> None:
        """Returns when all ranks have called it."""


class Single:
    """The communicator of a run without others: one rank, every call returns at once."""

    rank = 0
    size = 1

    def all_reduce(self, a: Any) -> Any:
        """`a` as it is.

        Raises:
            KilterError: `a` is not a writable array.
        """
        return writable(a)

    def broadcast(self, a: Any, root: int = 0) -> Any:
        """`a` as it is.

        Raises:
            KilterError: `a` is not a writable array, or `root` is not 0.
        """
        of_rank(root, self.size)
        return writable(a)

    def all_gather(self, a: Any) -> Any:
        """A copy of `a` of shape (1, *a.shape).

        Raises:
            KilterError: `a` is not an array.
        """
        return backend_of(_check.array("a", a)).xp.stack([a])

    def barrier(self) -> None:
        """Nothing to wait for."""


class LeftError(KilterError):
    """A rank is missed by others: their failure is a consequence of its own."""


def add_up(arrays: Sequence[Any]) -> Any:
    """Returns the sum of arrays in their order, 16-bit ones in float32 and rounded once; may overwrite the first."""
    first, *rest = arrays
    narrow = first.dtype.itemsize == 2 and first.dtype.kind not in "iu"
    total = first.astype("float32") if narrow else first
    for other in rest:
        total += other
    return total.astype(first.dtype, copy=False)


def check_alike(calls: Sequence[str]) -> None:
    """Refuses ranks that do not all make the same call."""
    for rank, call in enumerate(calls):
        if call != calls[0]:
            raise KilterError(f"ranks: expected one call on all, got {calls[0]} on rank 0, {call} on rank {rank}")


def writable(a: Any, argument: str = "a") -> Any:
    """Returns `a`, an array that may be written to."""
    if not getattr(_check.array(argument, a).flags, "writeable", True):  # a GPU's arrays always are
        fail(argument, "a writable array", "a read-only one")
    return a


def of_rank(rank: Any, size: int, argument: str = "root") -> int:
    """Returns `rank`, the number of a rank."""
    if not isinstance(rank, (int, np.integer)) or isinstance(rank, bool) or not 0 <= rank < size:
        fail(argument, f"a rank from 0 to {size - 1}", repr(rank))
    return int(rank)
