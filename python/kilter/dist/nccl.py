"""Ranks that have a GPU each."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import NUMPY, backend_of
from kilter._check import fail
from kilter.dist.communicator import Communicator, of_rank, writable
from kilter.dist.mpi import MPI


class NCCL:
    """The communicator of processes with one GPU each, through NCCL.

    Made by all ranks together, each with its own GPU current. Calls return at once, in the order of the current
    stream; arrays are not copied to the host. NumPy arrays go by the host's communicator.

    Args:
        host: a communicator of the same ranks, which sets NCCL up and does what is the host's; None is `MPI()`.

    Raises:
        KilterError: what it needs is missing: the extras `cuda13` (or `cuda12`) and `nccl`, and `mpi` for `MPI()`.

    Notes:
        Arrays are of the GPU, in any layout; what is not contiguous is copied. 16-bit sums are taken in float32 and
        rounded once. Every rank gets the same bits, but NCCL chooses the order of a sum, by the number of ranks and
        how their GPUs are connected. Calls of different ranks are not compared, as this would wait for the GPU:
        `kilter.dist.together` ends the ranks that wait for one that failed.

        The calls follow CuPy's documentation and are tested against a stand-in for NCCL; they have not run on GPUs.
    """

    def __init__(self, host: Communicator | None = None) -> None:
        from kilter.cuda import nccl

        self.host = MPI() if host is None else host
        self.rank, self.size = self.host.rank, self.host.size
        identity = np.zeros(nccl.ID_BYTES, np.uint8)
        if self.rank == 0:
            identity[...] = np.frombuffer(nccl.unique_id(), np.uint8)
        self.host.broadcast(identity)
        self._group = nccl.Group(self.size, identity.tobytes(), self.rank)
        self._sums = nccl.SUMS

    def __deepcopy__(self, memo: object) -> NCCL:
        return self  # the copy of a model speaks for the same rank

    def all_reduce(self, a: Any) -> Any:
        """Writes the sum over all ranks into `a` and returns it.

        Raises:
            KilterError: `a` is no writable array of this rank's GPU, or of a dtype that it cannot add.
        """
        xp = self._open(writable(a))
        if xp is np:
            return self.host.all_reduce(a)
        narrow = a.dtype.itemsize == 2 and a.dtype.name not in self._sums and a.dtype.kind not in "iu"
        if not narrow and a.dtype.name not in self._sums:
            fail("a", "floating-point numbers, or whole ones of 8, 32 or 64 bits", f"dtype {a.dtype}")
        total = a.astype("float32") if narrow else xp.ascontiguousarray(a)
        if a.size:
            self._group.all_reduce(total)
        return _written(a, total)

    def broadcast(self, a: Any, root: int = 0) -> Any:
        """Writes the array of rank `root` into `a` and returns it.

        Raises:
            KilterError: `a` is no writable array of this rank's GPU, or `root` is no rank.
        """
        root, xp = of_rank(root, self.size), self._open(writable(a))
        if xp is np:
            return self.host.broadcast(a, root)
        data = xp.ascontiguousarray(a)
        if a.size:
            self._group.broadcast(data, root)
        return _written(a, data)

    def all_gather(self, a: Any) -> Any:
        """Returns the arrays of all ranks in rank order: a new array of shape (size, *a.shape).

        Raises:
            KilterError: `a` is no array of this rank's GPU.
        """
        xp = self._open(a)
        if xp is np:
            return self.host.all_gather(a)
        gathered = xp.empty((self.size, *a.shape), a.dtype)
        if a.size:
            self._group.all_gather(xp.ascontiguousarray(a), gathered)
        return gathered

    def barrier(self) -> None:
        """Returns when all ranks have called it; what the GPUs were given before may still run."""
        self.host.barrier()

    def _open(self, a: Any) -> Any:
        """Returns the library of an array, which is on the host or on this rank's GPU."""
        backend = backend_of(_check.array("a", a))
        if backend is not NUMPY and a.device.id != self._group.device:
            fail("a", f"an array of GPU {self._group.device}", f"one of GPU {a.device.id}")
        return backend.xp


def _written(a: Any, data: Any) -> Any:
    """Returns `a` with the values of `data`, which is `a` itself or a copy."""
    if data is not a:
        a[...] = data.reshape(a.shape)
    return a
