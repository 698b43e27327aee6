"""Arrays of more elements than there is memory for, of which launches touch only the ends."""

import ctypes
import mmap

import numpy as np

from cudasim.memory import Library, SimArray
from cudasim.runtime import SimError, SimRuntime, _Launch

ENDS = 2  # waves that run at each end of a grid
_NORESERVE = 0x4000  # of mmap, on Linux


class Sparse(Library):
    """New arrays are zero, and become memory where they are touched."""

    @staticmethod
    def zeros(shape, dtype=float):
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        size = max(1, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        room = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        return np.ndarray.__new__(SimArray, shape, dtype, room)

    empty = zeros


class SparseRuntime(SimRuntime):
    """Runs the first and the last waves of each launch, in one order, and looks at no memory by itself."""

    xp = Sparse()

    def recycle(self, array):
        pass

    def _run(self, function, sizes, wave, pointers, arguments):
        skipped = max(0, int(np.prod(sizes[0], dtype=np.int64)) // wave - 2 * ENDS)
        message = ctypes.create_string_buffer(512)
        launch = _Launch(*sizes, 0, wave, ENDS, skipped)
        if function.call(ctypes.byref(launch), pointers, message):
            raise SimError(f"{function.name}: {message.value.decode()}")
