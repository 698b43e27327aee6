"""Linear layers."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter import init as _init
from kilter._backend import backend_of
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
        A function of `kilter.init`, with other options than its own by `functools.partial`.
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
        self.add_param("weight", drawn(init, shape, "io", seed, stream, found))
        if bias:
            self.add_param("bias", np.zeros(out_features, found))

    def forward(self, x: Array) -> Array:
        """y (N, out_features) for x (N, in_features)."""
        weight, bias = self.own_params["weight"], self.own_params.get("bias")
        xp, y = self.recall("forward", x) or self._prepare(x, weight)
        if weight.dtype.itemsize > 2:
            self._cache = x, weight
            # of two matrices what matmul gives, without a ufunc's machinery: microseconds less a call
            xp.dot(x, weight, out=y)
            return y if bias is None else xp.add(y, bias, out=y)
        x32, w32 = self._cache = widened(self, "x32", x), widened(self, "w32", weight)
        wide = xp.dot(x32, w32, out=self.buffer("y32", x32, y.shape))
        if bias is not None:
            wide += bias.astype(wide.dtype)
        return rounded(wide, y)

    def _prepare(self, x: Array, weight: Array) -> Any:
        """The library, and where y goes."""
        expect(x, ("N", weight.shape[0]), weight.dtype)
        xp = backend_of(x, weight, names=("x", "weight")).xp
        self.forget("backward")
        return self.remember("forward", x, (xp, self.buffer("y", x, (len(x), weight.shape[1]))))

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx = dy W^T; dweight = x^T dy; dbias = sum of dy over the batch."""
        x, weight = self.cache()
        xp, dtype = self.recall("backward", dy) or self._prepare_backward(x, dy)
        narrow = dtype.itemsize == 2
        if narrow:
            dy = widened(self, "dy32", dy)
        if not self.frozen:
            self._backward_params(xp, x, dy, narrow)
        if not need_dx:
            return None
        dx = self.buffer("dx", x, dtype=dtype)
        if not narrow:
            return xp.dot(dy, weight.T, out=dx)
        return rounded(xp.dot(dy, weight.T, out=self.buffer("dx32", dy, x.shape)), dx)

    def _prepare_backward(self, x: Array, dy: Array) -> Any:
        """The library, and the dtype of dx."""
        dtype = self.own_params["weight"].dtype
        expect(dy, (len(x), self.own_params["weight"].shape[1]), dtype, "dy")
        return self.remember("backward", dy, (backend_of(x, dy, names=("x", "dy")).xp, dtype))

    def _backward_params(self, xp: Any, x: Array, dy: Array, narrow: bool) -> None:
        dweight, dbias = self.own_grads["weight"], self.own_grads.get("bias")
        if narrow:
            rounded(xp.dot(x.T, dy, out=self.buffer("dw32", dy, dweight.shape)), dweight)
            if dbias is not None:
                rounded(dy.sum(axis=0), dbias)
            return
        xp.dot(x.T, dy, out=dweight)
        if dbias is not None:
            dy.sum(axis=0, out=dbias)


def drawn(
    init: Callable[..., Array], shape: tuple[int, ...], layout: str, seed: int, stream: int, dtype: np.dtype[Any]
) -> Array:
    """A weight by a function of `kilter.init`; those that ask for fans are told the layout."""
    if not callable(init):
        raise KilterError(f"init: expected a function of kilter.init, got {init!r}")
    told = {"layout": layout} if "layout" in signature(init).parameters else {}
    return init(shape, seed=seed, stream=stream, dtype=dtype, **told)


def widened(module: Module, slot: str, x: Array) -> Array:
    """x in float32, in a buffer of the module."""
    wide = module.buffer(slot, x, x.shape, np.dtype(np.float32))
    backend_of(x).xp.copyto(wide, x)
    return wide


def rounded(wide: Array, out: Array) -> Array:
    """`out`, filled with the values of `wide`."""
    # past the range of float16 the result is inf, which a LossScaler looks for
    with np.errstate(over="ignore", invalid="ignore"):
        backend_of(out).xp.copyto(out, wide, casting="unsafe")
    return out
