"""Linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter import init as _init
from kilter._check import KilterError, dtype_of
from kilter.nn.module import Array, Module, expect


class Linear(Module):
    """y = x W + b.

    Parameters
    ----------
    in_features, out_features
        Sizes; `weight` is (in_features, out_features).
    bias
        Whether to add `bias` (out_features,), zero at first. Leave it out before a BatchNorm.
    seed, stream
        Which random numbers fill the weight. Layers of one model need different pairs.
    init
        A function of `kilter.init`.
    dtype
        Of the parameters, of x and of y: float64, float32, float16 or bfloat16. The 16-bit ones are widened
        to float32 for the products, and each result is rounded once.

    References
    ----------
    He, Zhang, Ren, Sun, 2015, arXiv:1502.01852 (the default weights).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        seed: int,
        stream: int = 0,
        init: Callable[..., Array] = _init.he_normal,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise KilterError(f"features: expected at least 1, got {in_features} and {out_features}")
        found = dtype_of("dtype", dtype)
        shape = (in_features, out_features)
        self.random_key = ("init", seed, stream)
        self.add_param("weight", init(shape, seed=seed, stream=stream, layout="io", dtype=found))
        if bias:
            self.add_param("bias", np.zeros(out_features, found))

    def forward(self, x: Array) -> Array:
        """y (N, out_features) for x (N, in_features)."""
        weight, bias = self.own_params["weight"], self.own_params.get("bias")
        expect(x, ("N", weight.shape[0]), weight.dtype)
        y = self.buffer("y", (len(x), weight.shape[1]), weight.dtype)
        if weight.dtype.itemsize > 2:
            self._x, self._weight = x, weight
            np.matmul(x, weight, out=y)
            return y if bias is None else np.add(y, bias, out=y)
        self._x, self._weight = self._widen("x32", x), self._widen("w32", weight)
        wide = np.matmul(self._x, self._weight, out=self.buffer("y32", y.shape, self._x.dtype))
        if bias is not None:
            wide += bias.astype(wide.dtype)
        return _round(wide, y)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx = dy W^T; dweight = x^T dy; dbias = sum of dy over the batch."""
        x, weight = self._x, self._weight
        dtype = self.own_params["weight"].dtype
        expect(dy, (len(x), weight.shape[1]), dtype, "dy")
        narrow = dtype.itemsize == 2
        if narrow:
            dy = self._widen("dy32", dy)
        if not self.frozen:
            self._backward_params(x, dy, narrow)
        if not need_dx:
            return None
        dx = self.buffer("dx", x.shape, dtype)
        if not narrow:
            return np.matmul(dy, weight.T, out=dx)
        return _round(np.matmul(dy, weight.T, out=self.buffer("dx32", x.shape, dy.dtype)), dx)

    def _backward_params(self, x: Array, dy: Array, narrow: bool) -> None:
        dweight, dbias = self.own_grads["weight"], self.own_grads.get("bias")
        if narrow:
            _round(np.matmul(x.T, dy, out=self.buffer("dw32", dweight.shape, dy.dtype)), dweight)
            if dbias is not None:
                _round(np.add.reduce(dy, axis=0), dbias)
            return
        np.matmul(x.T, dy, out=dweight)
        if dbias is not None:
            np.add.reduce(dy, axis=0, out=dbias)

    def _widen(self, slot: str, x: Array) -> Array:
        wide = self.buffer(slot, x.shape, np.dtype(np.float32))
        np.copyto(wide, x)
        return wide


def _round(wide: Array, out: Array) -> Array:
    # past the range of float16 the result is inf, which a LossScaler looks for
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, wide, casting="unsafe")
    return out
