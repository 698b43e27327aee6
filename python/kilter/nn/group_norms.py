"""Layers that normalise groups of channels of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter import _check
from kilter._check import KilterError, arithmetic, dtype_of
from kilter.nn.module import Array, Module
from kilter.norm import group_norm, group_norm_backward


class GroupNorm(Module):
    """y = gamma (x - mean) / sqrt(var + eps) + beta, per sample over each group of adjacent channels.

    Parameters
    ----------
    groups
        How many; divides `features`.
    features
        Number of channels.
    axis
        The channel axis: 1, or -1 for channels-last.
    eps
        Added to the variance.
    affine
        Whether there are `gamma` (ones at first) and `beta` (zeros).
    dtype
        Of x. Parameters have the dtype of the arithmetic: float64 for float64, else float32.

    Notes
    -----
    The same in training and evaluation, whatever the batch. A group of one value raises a KilterError.

    References
    ----------
    Wu, He, 2018, arXiv:1803.08494.
    """

    def __init__(
        self,
        groups: int,
        features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__()
        real = arithmetic("dtype", dtype_of("dtype", dtype))
        if not isinstance(features, (int, np.integer)) or features < 1:
            raise KilterError(f"features: expected a whole number of at least 1, got {features!r}")
        if not isinstance(groups, (int, np.integer)) or groups < 1 or features % groups:
            raise KilterError(f"groups: expected a divisor of the {features} features, got {groups!r}")
        self.groups, self.features, self.axis, self.eps = int(groups), features, axis, eps
        if affine:
            self.add_param("gamma", np.ones(features, real))
            self.add_param("beta", np.zeros(features, real))

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        shape = _check.array("x", x).shape
        if len(shape) > 1 and shape[self.axis] != self.features:
            raise KilterError(f"x: expected {self.features} channels on axis {self.axis}, got shape {shape}")
        y: Array
        y, self._cache = group_norm(
            x,
            self.groups,
            self.own_params.get("gamma"),
            self.own_params.get("beta"),
            axis=self.axis,
            eps=self.eps,
            out=self.buffer("y", x) if self._reuse else None,
        )
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx; fills the gradients of gamma and beta."""
        cache = self.cache()
        out = self.buffer("dx", cache.x) if self._reuse else None
        dx, dgamma, dbeta = group_norm_backward(dy, cache, out=out)
        self.keep_grads(gamma=dgamma, beta=dbeta)
        return dx if need_dx else None

    def convert(self, dtype: np.dtype[Any]) -> None:
        """Parameters in the dtype of the arithmetic."""
        super().convert(arithmetic("dtype", dtype))


class InstanceNorm(GroupNorm):
    """y = gamma (x - mean) / sqrt(var + eps) + beta, per sample and channel over the positions.

    Parameters
    ----------
    features
        Number of channels.
    axis
        The channel axis: 1, or -1 for channels-last.
    eps
        Added to the variance.
    affine
        Whether there are `gamma` (ones at first) and `beta` (zeros).
    dtype
        Of x. Parameters have the dtype of the arithmetic: float64 for float64, else float32.

    Notes
    -----
    `GroupNorm` with one group per channel. A single position raises a KilterError.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky, 2016, arXiv:1607.08022.
    """

    def __init__(
        self,
        features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__(features, features, axis=axis, eps=eps, affine=affine, dtype=dtype)
