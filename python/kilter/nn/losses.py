"""Losses: each returns `(loss, dlogits)`, the mean over the batch and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter._check import KilterError, arithmetic
from kilter.nn.linear import rounded
from kilter.nn.module import Array, expect


def softmax_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    label_smoothing: float = 0.0,
    smooth_others: str = "uniform",
    weights: Array | None = None,
) -> tuple[float, Array]:
    """Cross-entropy of softmax(logits) against class indices or soft targets.

    loss = sum_i w_i (log sum_k exp z_ik - sum_k q_ik z_ik) / sum_i w_i
    dlogits_ik = w_i (p_ik - q_ik) / sum_i w_i

    Parameters
    ----------
    logits
        z (N, K), floating.
    targets
        (N,) integers in [0, K), or (N, K) floating rows of numbers of at least 0 that sum to 1.
    label_smoothing
        eps in [0, 1]: how much probability leaves the target.
    smooth_others
        "uniform": q <- (1 - eps) q + eps / K. "rest": q <- (1 - eps) q + eps (1 - q) / (K - 1), where the
        other K - 1 classes share what a class index loses.
    weights
        (N,) weight of each sample, for instance a 0/1 mask or `class_weights[targets]`.

    Returns
    -------
    (float, dlogits of the shape and dtype of logits).

    Notes
    -----
    NumPy arrays: one pass, all arithmetic in float64, the same bits on every processor. CuPy arrays: one launch, in
    float64 for float64, else in float32 with sums in float64; the host waits for the loss. What each sample gets does
    not depend on the others but for the weights' sum. While a CUDA graph is captured, without weights, the loss is a
    CuPy array without axes that each replay fills, and targets are not looked at.

    Raises
    ------
    KilterError
        A label lies outside [0, K); rows of soft targets do not sum to 1; shapes differ; weights are negative
        or sum to 0.

    References
    ----------
    Szegedy et al., 2016, arXiv:1512.00567 (label smoothing, uniform).
    """
    expect(logits, ("N", "K"), None, "logits")
    xp, ops = backend_of(logits, targets, weights, names=("logits", "targets", "weights"))
    samples, classes = logits.shape
    if not samples or not classes:
        raise KilterError(f"logits: expected at least one sample and one class, got shape {logits.shape}")
    real = arithmetic("logits", logits.dtype)
    on, off = _smoothing(label_smoothing, smooth_others, classes)
    soft = getattr(targets, "ndim", 0) == 2
    expect(targets, logits.shape if soft else (samples,), None, "targets")
    if soft:
        arithmetic("targets", targets.dtype)
    elif targets.dtype.kind not in "iu":
        raise KilterError(f"targets: expected integers or soft targets ({samples}, {classes}), got {targets.dtype}")
    w = _weights(weights, samples)
    z = xp.ascontiguousarray(logits, real)
    dz = xp.empty_like(z)
    # Every label that may be is exact in float64, and none that may not comes near one.
    loss: float = ops.softmax_cross_entropy(z, xp.ascontiguousarray(targets, np.float64), w, on, off, dz)
    return loss, dz if dz.dtype == logits.dtype else rounded(dz, xp.empty_like(dz, logits.dtype))


def bce_with_logits(logits: Array, targets: Array) -> tuple[float, Array]:
    """Binary cross-entropy of sigmoid(logits): mean of max(z, 0) - z t + log(1 + exp(-abs(z))).

    Parameters
    ----------
    logits
        z, any shape, floating.
    targets
        t in [0, 1], the same shape.

    Returns
    -------
    (float, dlogits = (sigmoid(z) - t) / z.size)
    """
    xp, z, t = _pair(logits, targets, "logits")
    if not (t.min() >= 0 and t.max() <= 1):
        raise KilterError("targets: expected numbers in [0, 1]")
    small = xp.exp(-abs(z))
    part = xp.log1p(small)
    part += xp.maximum(z, 0)
    part -= z * t
    loss = float(part.mean(dtype=np.float64))
    sigmoid = xp.where(z >= 0, z.dtype.type(1), small)
    small += 1
    sigmoid /= small
    sigmoid -= t
    sigmoid /= z.dtype.type(z.size)
    return loss, sigmoid.astype(logits.dtype, copy=False)


def mse(y: Array, targets: Array) -> tuple[float, Array]:
    """Mean squared error: mean of (y - t)^2 over all elements, and its gradient 2 (y - t) / y.size.

    Parameters
    ----------
    y, targets
        The same shape; y floating.
    """
    xp, wide, t = _pair(y, targets, "y")
    diff = wide - t
    loss = float(xp.square(diff).mean(dtype=np.float64))
    diff *= diff.dtype.type(2 / diff.size)
    return loss, diff.astype(y.dtype, copy=False)


def _smoothing(eps: float, others: str, classes: int) -> tuple[float, float]:
    """(on, off): the target's probability and that of every other class, for a hard label."""
    if not 0 <= eps <= 1:
        raise KilterError(f"label_smoothing: expected a number in [0, 1], got {eps!r}")
    if others not in ("uniform", "rest"):
        raise KilterError(f"smooth_others: expected 'uniform' or 'rest', got {others!r}")
    if not eps:
        return 1.0, 0.0
    if others == "uniform":
        return 1 - eps + eps / classes, eps / classes
    if classes < 2:
        raise KilterError(f"logits: expected at least 2 classes to smooth over, got {classes}")
    return 1 - eps, eps / (classes - 1)


def _weights(weights: Array | None, samples: int) -> Array | None:
    """The weights in float64, divided by their sum."""
    if weights is None:
        return None
    expect(weights, (samples,), None, "weights")
    wide = weights.astype(np.float64)
    total = wide.sum()
    if not (total > 0 and wide.min() >= 0):
        raise KilterError("weights: expected numbers of at least 0 with a positive sum")
    return wide / total


def _pair(y: Array, targets: Array, name: str) -> tuple[Any, Array, Array]:
    """The array module, and both in the arithmetic's dtype."""
    _check.array(name, y)
    real = arithmetic(name, y.dtype)
    expect(targets, y.shape, None, "targets")
    xp = backend_of(y, targets, names=(name, "targets")).xp
    if y.size == 0:
        raise KilterError(f"{name}: expected at least one element, got shape {y.shape}")
    return xp, y.astype(real, copy=False), targets.astype(real, copy=False)
