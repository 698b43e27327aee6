"""Layers that normalise each row, the last axes of x, by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter import _check
from kilter._check import KilterError, arithmetic, dtype_of
from kilter.nn.module import Array, Module, channels_first, channels_last
from kilter.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward


class _RowNorm(Module):
    """What both layers share: the shape of a row, its axes, eps, and parameters in the dtype of the arithmetic."""

    def __init__(
        self, shape: int | Sequence[int], axis: int, eps: float, names: Sequence[str], dtype: DTypeLike
    ) -> None:
        super().__init__()
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        whole = [isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in sizes]
        if not sizes or not all(whole):
            raise KilterError(f"shape: expected whole numbers above 0, got {shape!r}")
        if axis != -1 and (axis != 1 or len(sizes) > 1):
            raise KilterError(f"axis: expected -1, or 1 for a single size, got {axis!r}")
        real = arithmetic("dtype", dtype_of("dtype", dtype))
        self.shape, self.axis, self.eps = tuple(int(n) for n in sizes), axis, eps
        for name in names:
            self.add_param(name, np.full(self.shape, float(name == "gamma"), real))

    def _rows(self, x: Array) -> Array:
        """x seen with its rows last."""
        _check.array("x", x)
        if self.axis == -1:
            if x.shape[-len(self.shape) :] != self.shape:
                raise KilterError(f"x: expected last axes {self.shape}, got shape {x.shape}")
            return x
        if x.ndim < 2 or x.shape[1] != self.shape[0]:
            raise KilterError(f"x: expected {self.shape[0]} channels on axis 1, got shape {x.shape}")
        return channels_last(x)

    def _upstream(self, dy: Array) -> Array:
        return channels_last(dy) if self.axis == 1 and _check.array("dy", dy).ndim > 1 else dy

    def _back(self, rows: Array) -> Array:
        return rows if self.axis == -1 else channels_first(rows)

    def _out(self, name: str, rows: Array) -> Array | None:
        return self.buffer(name, rows, rows.shape) if self._reuse else None

    def convert(self, dtype: np.dtype[Any]) -> None:
        """Parameters in the dtype of the arithmetic."""
        super().convert(arithmetic("dtype", dtype))


class LayerNorm(_RowNorm):
    """y = gamma (x - mean) / sqrt(var + eps) + beta, over the last axes of each sample.

    Parameters
    ----------
    shape
        Sizes of the last axes, which are normalised; or the size of one axis.
    axis
        -1: the last axes. 1: the channels of images (N, C, ...), at each position by itself.
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
        self,
        shape: int | Sequence[int],
        *,
        axis: int = -1,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__(shape, axis, eps, ("gamma", "beta") if affine else (), dtype)

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        y: Array
        gamma, beta = self.own_params.get("gamma"), self.own_params.get("beta")
        rows = self._rows(x)
        out = self._out("y", rows)
        y, self._cache = layer_norm(rows, gamma, beta, ndim=len(self.shape), eps=self.eps, out=out)
        return self._back(y)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx; fills the gradients of gamma and beta."""
        cache = self.cache()
        dx, dgamma, dbeta = layer_norm_backward(self._upstream(dy), cache, out=self._out("dx", cache.x))
        self.keep_grads(gamma=dgamma, beta=dbeta)
        return self._back(dx) if need_dx else None


class RMSNorm(_RowNorm):
    """y = gamma x / sqrt(mean(x²) + eps), over the last axes of each sample.

    Parameters
    ----------
    shape
        Sizes of the last axes, which are normalised; or the size of one axis.
    axis
        -1: the last axes. 1: the channels of images (N, C, ...), at each position by itself.
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
        self,
        shape: int | Sequence[int],
        *,
        axis: int = -1,
        eps: float = 1e-6,
        affine: bool = True,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__(shape, axis, eps, ("gamma",) if affine else (), dtype)

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        y: Array
        rows = self._rows(x)
        out = self._out("y", rows)
        y, self._cache = rms_norm(rows, self.own_params.get("gamma"), ndim=len(self.shape), eps=self.eps, out=out)
        return self._back(y)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx; fills the gradient of gamma."""
        cache = self.cache()
        dx, dgamma = rms_norm_backward(self._upstream(dy), cache, out=self._out("dx", cache.x))
        self.keep_grads(gamma=dgamma)
        return self._back(dx) if need_dx else None
