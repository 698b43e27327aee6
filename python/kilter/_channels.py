"""Arrays around a channel axis, as kernels see them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kilter import _check
from kilter._backend import Backend
from kilter._check import fail


class Call(NamedTuple):
    """The arrays of one call as kernels see them."""

    backend: Backend
    shape: tuple[int, ...]
    x: Any
    axis: int
    moved: bool  # x is a channels-last array seen with its channel axis in front
    real: Any
    channels: int

    @property
    def axis_of_x(self) -> int:
        """The channel axis as the caller sees it."""
        return 1 if self.moved else self.axis

    def like(self, argument: str, array: Any) -> Any:
        """Returns an input of x's shape and dtype in x's layout."""
        if array is None:
            return None
        if array.shape != self.shape:
            fail(argument, f"shape {self.shape}", f"shape {array.shape}")
        if not _check.same_dtype(array.dtype, self.x.dtype):
            fail(argument, f"dtype {self.x.dtype}", f"dtype {array.dtype}")
        return _check.contiguous(self.backend.xp, self.move(array))

    def move(self, array: Any) -> Any:
        """Returns the view in which x's channels are where kernels see them."""
        return self.backend.xp.moveaxis(array, 1, -1) if self.moved else array

    def back(self, array: Any) -> Any:
        """Returns the view in which the caller sees an array of x's shape."""
        return self.backend.xp.moveaxis(array, -1, 1) if self.moved else array

    def output(self, out: Any, argument: str = "out") -> Any:
        """Returns an array of x's shape and layout to write to: new, or `out`, which messages call `argument`."""
        xp = self.backend.xp
        if out is None:
            return xp.empty(self.x.shape, self.x.dtype)
        if out.shape != self.shape:
            fail(argument, f"shape {self.shape}", f"shape {out.shape}")
        if out.dtype != self.x.dtype:
            fail(argument, f"dtype {self.x.dtype}", f"dtype {out.dtype}")
        target = self.move(out)
        if not _check.ready(target):
            fail(argument, "an array in the layout of x, aligned and of native byte order", f"strides {out.strides}")
        if not _check.writable(target):
            fail(argument, "a writable array", "a read-only one")
        return target


def open_call(backend: Backend, x: Any, axis: int, out: Any = None) -> Call:
    """Returns the call on `x`, read where it lies if its layout (and that of `out`) allows, copied otherwise."""
    xp, shape, ndim = backend.xp, x.shape, x.ndim
    if ndim < 2:
        fail("x", "at least 2 axes", f"shape {shape}")
    if not isinstance(axis, (int, np.integer)) or not -ndim <= axis < ndim:
        fail("axis", f"a whole number from {-ndim} to {ndim - 1}", repr(axis))
    real = _check.arithmetic("x", x.dtype)
    axis = int(axis) % ndim
    channels, moved = shape[axis], False
    if not _check.ready(x):
        last = xp.moveaxis(x, 1, -1) if axis == 1 and ndim > 2 else x
        if _check.ready(last) and (out is None or not _check.ready(out)):
            x, axis, moved = last, ndim - 1, True
        else:
            x = _check.contiguous(xp, x)
    return Call(backend, shape, x, axis, moved, real, channels)


def position_weights(call: Call, weights: Any) -> Any:
    """Returns one weight per position, in the order of the positions, or None."""
    if weights is None:
        return None
    positions = tuple(n for i, n in enumerate(call.shape) if i != call.axis_of_x)
    if weights.shape not in (positions, positions[:1]):
        fail("weights", f"shape {positions[:1]} or {positions}", f"shape {weights.shape}")
    if weights.dtype.kind not in "fiub":
        fail("weights", "real numbers", f"dtype {weights.dtype}")
    xp = call.backend.xp
    with np.errstate(over="ignore"):
        wide = weights.astype(call.real).reshape(weights.shape + (1,) * (len(positions) - weights.ndim))
    if not bool(xp.all((wide >= 0) & xp.isfinite(wide))):
        fail("weights", "finite numbers of at least 0", "others")
    return xp.ascontiguousarray(xp.broadcast_to(wide, positions))
