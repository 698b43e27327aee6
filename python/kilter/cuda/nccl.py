"""NCCL through CuPy's binding: calls on contiguous arrays of one device, in the order of CuPy's current stream."""

from __future__ import annotations

import warnings
from typing import Any

from kilter._kilter import KilterError

# CuPy's constant for each dtype that NCCL can add.
_SUMS = {
    "float64": "NCCL_FLOAT64",
    "float32": "NCCL_FLOAT32",
    "int64": "NCCL_INT64",
    "uint64": "NCCL_UINT64",
    "int32": "NCCL_INT32",
    "uint32": "NCCL_UINT32",
    "int8": "NCCL_INT8",
    "uint8": "NCCL_UINT8",
}
SUMS = frozenset(_SUMS)  # names of the dtypes that `Group.all_reduce` takes
ID_BYTES = 128


def unique_id() -> bytes:
    """Returns a new identity for a group, `ID_BYTES` long, which one rank makes and all get.

    Raises:
        KilterError: CuPy or NCCL is missing.
    """
    identity: bytes = _load()[1].get_unique_id()
    return identity


class Group:
    """One rank's end of a group of devices, one for each rank: the device that is current here.

    All calls return at once; the current stream does the work. All ranks make the same calls, with as many bytes.

    Args:
        size: how many ranks.
        identity: from `unique_id`, the same on all ranks.
        rank: which rank this is.

    Raises:
        KilterError: CuPy or NCCL is missing.
    """

    def __init__(self, size: int, identity: bytes, rank: int) -> None:
        self._cupy, self._nccl = _load()
        self.device = int(self._cupy.cuda.runtime.getDevice())
        self._group = self._nccl.NcclCommunicator(size, identity, rank)

    def all_reduce(self, a: Any) -> None:
        """Writes the sum over all ranks into `a`, whose dtype is one of `SUMS`."""
        kind = getattr(self._nccl, _SUMS[a.dtype.name])
        self._group.allReduce(a.data.ptr, a.data.ptr, a.size, kind, self._nccl.NCCL_SUM, self._stream())

    def broadcast(self, a: Any, root: int) -> None:
        """Writes the array of rank `root` into `a`."""
        self._group.broadcast(a.data.ptr, a.data.ptr, a.nbytes, self._nccl.NCCL_UINT8, root, self._stream())

    def all_gather(self, a: Any, gathered: Any) -> None:
        """Writes the arrays of all ranks, in their order, into `gathered`."""
        self._group.allGather(a.data.ptr, gathered.data.ptr, a.nbytes, self._nccl.NCCL_UINT8, self._stream())

    def _stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)


def _load() -> tuple[Any, Any]:
    try:
        import cupy
    except ModuleNotFoundError:
        raise KilterError("CuPy is not installed: pip install 'kilter[cuda13]' (or 'kilter[cuda12]')") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns where the library is missing: the error below says it
        from cupy.cuda import nccl
    if not nccl.available:
        raise KilterError("NCCL is not installed: pip install 'kilter[nccl]'")
    return cupy, nccl
