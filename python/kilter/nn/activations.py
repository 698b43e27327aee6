"""Activations."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter import _check
from kilter.nn.module import Array, Module, expect


class ReLU(Module):
    """y = max(x, 0); NaN stays NaN. The gradient passes where y > 0."""

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        _check.array("x", x)
        y = self._y = self.buffer("y", x.shape, x.dtype)
        np.maximum(x, x.dtype.type(0), out=y)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dy where the output was positive, else 0."""
        if not need_dx:
            return None
        expect(dy, self._y.shape, self._y.dtype, "dy")
        passed = self.buffer("passed", dy.shape, np.dtype(bool))
        with np.errstate(invalid="ignore"):  # NaN compares without a flag, except in bfloat16
            np.greater(self._y, 0, out=passed)
        return np.multiply(dy, passed, out=self.buffer("dx", dy.shape, dy.dtype))
