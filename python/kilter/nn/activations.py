"""Activations that cut: ReLU and its leaky form."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter.nn.module import Array, Module, expect


class ReLU(Module):
    """y = max(x, 0); NaN stays NaN. The gradient passes where y > 0."""

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        _check.array("x", x)
        y = self._cache = self.buffer("y", x)
        backend_of(x).xp.maximum(x, x.dtype.type(0), out=y)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dy where the output was positive, else 0."""
        if not need_dx:
            return None
        y = self.cache()
        expect(dy, y.shape, y.dtype, "dy")
        return backend_of(y, dy, names=("y", "dy")).xp.multiply(dy, positive(self, y), out=self.buffer("dx", y))


class LeakyReLU(Module):
    """y = x where x > 0, else negative_slope * x; NaN stays NaN.

    Parameters
    ----------
    negative_slope
        In [0, 1].

    References
    ----------
    Maas, Hannun, Ng, 2013, "Rectifier nonlinearities improve neural network acoustic models".
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = _check.number("negative_slope", negative_slope, 0.0, 1.0)

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        _check.array("x", x)
        xp, y = backend_of(x).xp, self.buffer("y", x)
        self._cache = x
        xp.multiply(x, x.dtype.type(self.negative_slope), out=y)
        return xp.maximum(x, y, out=y)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dy where x was positive, else negative_slope * dy."""
        if not need_dx:
            return None
        x = self.cache()
        expect(dy, x.shape, x.dtype, "dy")
        xp, dx = backend_of(x, dy, names=("x", "dy")).xp, self.buffer("dx", x)
        xp.maximum(positive(self, x), x.dtype.type(self.negative_slope), out=dx)  # 1 or the slope
        return xp.multiply(dx, dy, out=dx)


def positive(module: Module, x: Array) -> Array:
    """Where x > 0, in a buffer of the module."""
    with np.errstate(invalid="ignore"):  # NaN compares without a flag, except in bfloat16
        return backend_of(x).xp.greater(x, x.dtype.type(0), out=module.buffer("passed", x, dtype=np.dtype(bool)))
