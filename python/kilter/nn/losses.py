"""Losses: each returns `(loss, dlogits)`, the mean over the batch and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter import _check
from kilter._check import KilterError, arithmetic
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
        (N,) integers in [0, K), or (N, K) floating rows that sum to 1.
    label_smoothing
        eps in [0, 1]: how much probability leaves the target.
    smooth_others
        "uniform": q <- (1 - eps) q + eps / K. "rest": q <- (1 - eps) q + eps (1 - q) / (K - 1), where the
        other K - 1 classes share what a class index loses.
    weights
        (N,) weight of each sample, for instance a 0/1 mask or `class_weights[targets]`.

    Returns
    -------
    (float, dlogits of the shape and dtype of logits). 16-bit logits are widened to float32.

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
    samples, classes = logits.shape
    real = arithmetic("logits", logits.dtype)
    on, off = _smoothing(label_smoothing, smooth_others, classes)
    scale = _scale(weights, samples, real)
    with np.errstate(invalid="ignore"):  # inf and NaN travel into the loss, where the caller sees them
        z = logits.T.astype(real, order="C")  # classes first: every reduction runs over whole rows
        z -= np.maximum.reduce(z, axis=0, initial=-np.inf)
        p = np.exp(z)
        total = np.add.reduce(p, axis=0)
        p /= total
        per_sample = np.log(total)
        if getattr(targets, "ndim", 0) == 2:
            q = _soft(targets, logits.shape, real)
            q = q * (on - off) + off if off else q
            per_sample -= np.einsum("kn,kn->n", q, z)
            p -= q
        else:
            at = _flat_index(targets, samples, classes)
            per_sample -= (on - off) * z.ravel().take(at)
            if off:
                per_sample -= off * np.add.reduce(z, axis=0)
                p -= off
            p.ravel()[at] -= on - off
        per_sample *= scale
        loss = float(np.add.reduce(per_sample, dtype=np.float64))
        p *= scale
        return loss, p.T.astype(logits.dtype, order="C")


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
    z, t, real = _pair(logits, targets, "logits")
    if t.size and not (t.min() >= 0 and t.max() <= 1):
        raise KilterError("targets: expected numbers in [0, 1]")
    small = np.exp(-np.abs(z))
    loss = np.maximum(z, 0) - z * t + np.log1p(small)
    sigmoid = np.where(z >= 0, real.type(1), small) / (1 + small)
    return float(loss.mean(dtype=np.float64)), ((sigmoid - t) / real.type(z.size)).astype(logits.dtype, copy=False)


def mse(y: Array, targets: Array) -> tuple[float, Array]:
    """Mean squared error: mean of (y - t)^2 over all elements, and its gradient 2 (y - t) / y.size.

    Parameters
    ----------
    y, targets
        The same shape; y floating.
    """
    wide, t, real = _pair(y, targets, "y")
    diff = wide - t
    loss = float(np.square(diff).mean(dtype=np.float64))
    return loss, (diff * real.type(2 / diff.size)).astype(y.dtype, copy=False)


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


def _scale(weights: Array | None, samples: int, real: np.dtype[Any]) -> Any:
    """1 / N, or the weights divided by their sum."""
    if samples == 0:
        raise KilterError("logits: expected at least one sample, got shape (0, K)")
    if weights is None:
        return real.type(1 / samples)
    expect(weights, (samples,), None, "weights")
    wide = weights.astype(np.float64)
    total = wide.sum()
    if not (total > 0 and wide.min() >= 0):
        raise KilterError("weights: expected numbers of at least 0 with a positive sum")
    return (wide / total).astype(real)


def _flat_index(targets: Array, samples: int, classes: int) -> Array:
    """Where each sample's class lies in the flattened (K, N) logits."""
    expect(targets, (samples,), None, "targets")
    if targets.dtype.kind not in "iu":
        raise KilterError(f"targets: expected integers or soft targets ({samples}, {classes}), got {targets.dtype}")
    at: Array = targets.astype(np.intp)
    if np.maximum.reduce(at.view(np.uintp)) >= classes:  # negative labels are large there
        wrong = targets[(targets < 0) | (targets >= classes)]
        raise KilterError(f"targets: expected labels in [0, {classes}), got {wrong[0]}")
    at *= samples
    at += np.arange(samples)
    return at


def _soft(targets: Array, shape: tuple[int, ...], real: np.dtype[Any]) -> Array:
    """Soft targets as (K, N)."""
    expect(targets, shape, None, "targets")
    arithmetic("targets", targets.dtype)
    q: Array = targets.T.astype(real, order="C")
    # wide enough for rows rounded to bfloat16
    if not (np.abs(np.add.reduce(q, axis=0) - 1) < 2e-2).all():
        raise KilterError("targets: expected rows that sum to 1")
    return q


def _pair(y: Array, targets: Array, name: str) -> tuple[Array, Array, np.dtype[Any]]:
    _check.array(name, y)
    real = arithmetic(name, y.dtype)
    expect(targets, y.shape, None, "targets")
    if y.size == 0:
        raise KilterError(f"{name}: expected at least one element, got shape {y.shape}")
    return y.astype(real), targets.astype(real), real
