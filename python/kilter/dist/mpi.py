"""Ranks that are processes, under mpiexec."""

from __future__ import annotations

import atexit
import sys
from importlib import import_module
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import NUMPY, backend_of
from kilter._check import KilterError, fail
from kilter._interrupt import ctrl_c_waits
from kilter.dist.communicator import add_up, of_rank, writable
from kilter.dist.gradients import shard
from kilter.dist.letters import Letters

_PIECE = 1 << 22  # bytes of a large sum that are exchanged at once


class MPI:
    """The communicator of processes that mpiexec started, through mpi4py.

    Made by all ranks together. Each call begins with a letter of a fixed size from each rank to all: what it calls,
    with which dtype and shape, and the data where they fit in. So ranks whose calls do not belong together get the
    KilterError that `Threads` gives, and small exchanges take one message. Larger sums go in pieces, of which each
    rank adds its part in rank order: the bits are those of `Threads`, whatever the MPI library does.

    Args:
        comm: an intracommunicator of mpi4py, which is duplicated; None is all processes.

    Raises:
        KilterError: mpi4py is missing, or `comm` is no intracommunicator.

    Notes:
        Arrays are NumPy's, of numbers, in any layout. Ranks on one machine share its cores: let KILTER_NUM_THREADS and
        OPENBLAS_NUM_THREADS be the cores of each. A program that ends on one rank alone, with an exception or
        without, ends on all; `kilter.dist.together` prints it once, too.
    """

    def __init__(self, comm: Any = None) -> None:
        with ctrl_c_waits():  # no rank leaves before it can say so
            mpi = _mpi4py()
            if comm is None:
                comm = mpi.COMM_WORLD
            if not isinstance(comm, mpi.Intracomm):
                fail("comm", "an intracommunicator of mpi4py", type(comm).__name__)
            self._comm = comm.Dup()
            self.letters = Letters(self._comm)
            self.rank, self.size = self.letters.rank, self.letters.size
            self._byte = mpi.BYTE
            self._stage = np.empty(0, np.uint8)
            atexit.register(self._at_exit)  # runs before mpi4py's, which waits for all ranks

    def __deepcopy__(self, memo: object) -> MPI:
        return self  # the copy of a model speaks for the same rank

    def all_reduce(self, a: Any) -> Any:
        """Writes the sum over all ranks, taken in their order, into `a` and returns it.

        Raises:
            KilterError: `a` is no writable NumPy array of numbers, or the ranks' calls differ.
        """
        with self.letters.exchange("all_reduce", _numbers(writable(a))) as rows:
            if rows is not None:
                return _written(a, add_up(list(rows.view(a.dtype))))
            flat, step = _flat(a), _PIECE // a.itemsize
            for start in range(0, a.size, step):
                self._reduce_piece(flat[start : start + step])
            return _written(a, flat)

    def broadcast(self, a: Any, root: int = 0) -> Any:
        """Writes the array of rank `root` into `a` and returns it.

        Raises:
            KilterError: `a` is no writable NumPy array of numbers, `root` is no rank, or the ranks' calls differ.
        """
        root = of_rank(root, self.size)
        with self.letters.exchange(f"broadcast from {root}", _numbers(writable(a))) as rows:
            if rows is not None:
                return _written(a, rows[root].view(a.dtype))
            flat = _flat(a)
            self.letters.wait(self._comm.Ibcast(_bytes(flat), root))
            return _written(a, flat)

    def all_gather(self, a: Any) -> Any:
        """Returns the arrays of all ranks in rank order: a new array of shape (size, *a.shape).

        Raises:
            KilterError: `a` is no NumPy array of numbers, or the ranks' calls differ.
        """
        with self.letters.exchange("all_gather", _numbers(a)) as rows:
            if rows is not None:
                return rows.view(a.dtype).reshape(self.size, *a.shape)
            gathered = np.empty((self.size, *a.shape), a.dtype)
            self.letters.wait(self._comm.Iallgather(_bytes(a), _bytes(gathered)))
            return gathered

    def barrier(self) -> None:
        """Returns when all ranks have called it.

        Raises:
            KilterError: another rank made another call.
        """
        with self.letters.exchange("barrier"):
            pass

    def _reduce_piece(self, piece: Any) -> None:
        """Sums a contiguous piece in place: to each rank its part from all, and the sums of the parts to all."""
        item = piece.itemsize
        parts = [shard(piece.size, rank, self.size) for rank in range(self.size)]
        lengths = [item * (part.stop - part.start) for part in parts]
        starts = [item * part.start for part in parts]
        mine = lengths[self.rank]
        if self._stage.size < self.size * mine:
            self._stage = np.empty(self.size * mine, np.uint8)
        rows = self._stage[: self.size * mine].view(piece.dtype).reshape(self.size, mine // item)
        data, wait = _bytes(piece), self.letters.wait
        there = [_bytes(rows), [mine] * self.size, [mine * rank for rank in range(self.size)], self._byte]
        wait(self._comm.Ialltoallv([data, lengths, starts, self._byte], there))
        total = _bytes(add_up(list(rows)))
        wait(self._comm.Iallgatherv([total, mine, self._byte], [data, lengths, starts, self._byte]))

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # the exception that ended the program: Python has printed it
        if not self.letters.leave(error):
            self._comm.Abort(1)


def _mpi4py() -> Any:
    try:
        return import_module("mpi4py.MPI")
    except ModuleNotFoundError:
        raise KilterError("mpi4py is not installed: pip install 'kilter[mpi]'") from None
    except (ImportError, RuntimeError) as error:  # no MPI library
        raise KilterError(f"MPI: cannot be loaded ({error}): pip install 'kilter[mpi]' brings MPICH") from None


def _numbers(a: Any) -> Any:
    """Returns `a`, an array of numbers where MPI can read it."""
    if backend_of(_check.array("a", a)) is not NUMPY:
        fail("a", "a NumPy array (of a GPU's arrays, kilter.dist.NCCL takes care)", type(a).__name__)
    if a.dtype.kind not in "biufc":
        _check.arithmetic("a", a.dtype)
    return a


def _flat(a: Any) -> Any:
    """The elements of an array, contiguous: where they lie, or copies."""
    return np.ascontiguousarray(a).reshape(-1)


def _bytes(a: Any) -> Any:
    """The bytes of an array, or those of a contiguous copy."""
    return _flat(a).view(np.uint8)


def _written(a: Any, flat: Any) -> Any:
    """Returns `a` with the values of `flat`, which is a view of it or a copy."""
    if not np.may_share_memory(a, flat):
        a[...] = flat.reshape(a.shape)
    return a
