"""Layers that normalise each row, the last axes of x, by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter import _check
from kilter._check import KilterError, arithmetic, dtype_of
from kilter.nn.module import Array, Module
from kilter.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward


class _RowNorm(Module):
    """What both layers share: the shape of a row, eps, and parameters in the dtype of the arithmetic."""

    def __init__(self, shape: int | Sequence[int], eps: float, names: Sequence[str], dtype: DTypeLike) -> None:
        super().__init__()
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        whole = [isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in sizes]
        if not sizes or not all(whole):
            raise KilterError(f"shape: expected whole numbers above 0, got {shape!r}")
        real = arithmetic("dtype", dtype_of("dtype", dtype))
        self.shape, self.eps = tuple(int(n) for n in sizes), eps
        for name in names:
            self.add_param(name, np.full(self.shape, float(name == "gamma"), real))

    def _out(self, name: str, x: Array) -> Array | None:
        if name == "y" and _check.array("x", x).shape[-len(self.shape) :] != self.shape:
            raise KilterError(f"x: expected last axes {self.shape}, got shape {x.shape}")
        return self.buffer(name, x.shape, x.dtype) if self._reuse else None

    def _keep(self, **grads: Array | None) -> None:
        for name, grad in grads.items():
            if grad is not None and not self.frozen:
                np.copyto(self.own_grads[name], grad)

    def convert(self, dtype: np.dtype[Any]) -> None:
        """Parameters in the dtype of the arithmetic."""
        super().convert(arithmetic("dtype", dtype))


class LayerNorm(_RowNorm):
    """y = gamma (x - mean) / sqrt(var + eps) + beta, over the last axes of each sample.

    Parameters
    ----------
    shape
        Sizes of the axes that are normalised, or the size of the last axis.
    eps
        Added to the variance.
    affine
        Whether there are `gamma` (ones at first) and `beta` (zeros), of that shape.
    dtype
        Of x. Parameters have the dtype of the arithmetic: float64 for float64, else float32.

    Notes
    -----
    The same in training and evaluation, whatever the batch.

    References
    ----------
    Ba, Kiros, Hinton, 2016, arXiv:1607.06450.
    """

    def __init__(
        self, shape: int | Sequence[int], *, eps: float = 1e-5, affine: bool = True, dtype: DTypeLike = "float32"
    ) -> None:
        super().__init__(shape, eps, ("gamma", "beta") if affine else (), dtype)

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        y: Array
        gamma, beta = self.own_params.get("gamma"), self.own_params.get("beta")
        out = self._out("y", x)
        y, self._cache = layer_norm(x, gamma, beta, ndim=len(self.shape), eps=self.eps, out=out)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx; fills the gradients of gamma and beta."""
        dx, dgamma, dbeta = layer_norm_backward(dy, self._cache, out=self._out("dx", dy))
        self._keep(gamma=dgamma, beta=dbeta)
        return dx if need_dx else None


class RMSNorm(_RowNorm):
    """y = gamma x / sqrt(mean(x²) + eps), over the last axes of each sample.

    Parameters
    ----------
    shape
        Sizes of the axes that are normalised, or the size of the last axis.
    eps
        Added to the mean square.
    affine
        Whether there is `gamma` (ones at first), of that shape.
    dtype
        Of x. `gamma` has the dtype of the arithmetic: float64 for float64, else float32.

    Notes
    -----
    The same in training and evaluation, whatever the batch.

    References
    ----------
    Zhang, Sennrich, 2019, arXiv:1910.07467.
    """

    def __init__(
        self, shape: int | Sequence[int], *, eps: float = 1e-6, affine: bool = True, dtype: DTypeLike = "float32"
    ) -> None:
        super().__init__(shape, eps, ("gamma",) if affine else (), dtype)

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        y: Array
        out = self._out("y", x)
        y, self._cache = rms_norm(x, self.own_params.get("gamma"), ndim=len(self.shape), eps=self.eps, out=out)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx; fills the gradient of gamma."""
        dx, dgamma = rms_norm_backward(dy, self._cache, out=self._out("dx", dy))
        self._keep(gamma=dgamma)
        return dx if need_dx else None
