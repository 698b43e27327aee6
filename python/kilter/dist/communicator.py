"""The protocol of a communicator, and the one of a run alone."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter._check import fail


@runtime_checkable
class Communicator(Protocol):
    """One rank's end of a group: all that kilter asks of a communicator.

    Every call but `rank` and `size` is collective: all ranks make the same calls in the same order, with arrays of one
    shape and dtype. Sums are taken in the order of the ranks, so that every rank gets the same bits.
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


def writable(a: Any) -> Any:
    """Returns `a`, an array that may be written to."""
    if not _check.array("a", a).flags.writeable:
        fail("a", "a writable array", "a read-only one")
    return a


def of_rank(root: Any, size: int) -> int:
    """Returns `root`, the number of a rank."""
    if not isinstance(root, (int, np.integer)) or isinstance(root, bool) or not 0 <= root < size:
        fail("root", f"a rank from 0 to {size - 1}", repr(root))
    return int(root)
