"""Layer normalisation and RMS normalisation, forward and backward, as functions on arrays."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

from kilter import _check
from kilter._backend import Backend, backend_of
from kilter._channels import Call
from kilter._check import fail

__all__ = [
    "LayerNormCache",
    "LayerNormGrads",
    "RMSNormCache",
    "RMSNormGrads",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]


class LayerNormCache(NamedTuple):
    """What `layer_norm` hands to `layer_norm_backward`: references to arrays, and the small statistics.

    `x` is what was normalised: the sum where there was a residual. hi + lo is the mean, `rstd` is 1 / sqrt(var + eps);
    all are of the shape of the axes that were not normalised. The arrays must not change before the backward pass.
    """

    x: Any
    gamma: Any
    beta: Any
    ndim: int
    hi: Any
    lo: Any
    rstd: Any
    overwritten: bool

    @property
    def mean(self) -> Any:
        """The mean that was subtracted, in float64."""
        return self.hi.astype("float64") + self.lo


class LayerNormGrads(NamedTuple):
    """Gradients of the inputs of `layer_norm`; None for those that it did not have. dx is also that of the residual."""

    dx: Any
    dgamma: Any
    dbeta: Any


class RMSNormCache(NamedTuple):
    """What `rms_norm` hands to `rms_norm_backward`: references to arrays, and `rstd`, 1 / sqrt(mean(x²) + eps)."""

    x: Any
    gamma: Any
    ndim: int
    rstd: Any
    overwritten: bool


class RMSNormGrads(NamedTuple):
    """Gradients of the inputs of `rms_norm`; dgamma is None where it had no gamma."""

    dx: Any
    dgamma: Any


def layer_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    ndim: int = 1,
    eps: float = 1e-5,
    residual: Any = None,
    out: Any = None,
) -> tuple[Any, LayerNormCache]:
    """Normalises every row, the last `ndim` axes, by its own mean and variance.

    y = (x - mean) / sqrt(var + eps) * gamma + beta, with x + residual in place of x where there is a residual; mean and
    biased variance are those of the row.

    Args:
        x: data, float64, float32, float16 or bfloat16. C order is read in place, any other layout is copied once.
        gamma: scale, shape x.shape[-ndim:], of x's dtype, or float32 for 16-bit x; None is 1.
        beta: shift, likewise; None is 0.
        ndim: how many of the last axes make a row.
        eps: added to the variance, inside the root.
        residual: added to x first, of x's shape and dtype. The sum, rounded to that dtype, is `cache.x`.
        out: written to and returned as y; x's shape and dtype, in C order. May be x or residual itself, at the price
            of a copy.

    Returns:
        y, of x's dtype, and the cache for `layer_norm_backward`.

    Raises:
        KilterError: an argument does not fit, or rows are empty.

    Notes:
        Reads x (and residual) from memory once where a row fits in cache, and writes y (and the sum) once. A row of
        one value, or of equal ones, gives beta. The moments are taken as in `batch_norm`, with the same accuracy; each
        row's bits depend on that row alone.

    References:
        Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """
    backend = backend_of(x, gamma, beta, residual, out, names=("x", "gamma", "beta", "residual", "out"))
    call, g, eps = _open(backend, x, gamma, ndim, eps)
    b = _affine(call, "beta", beta)
    r = call.like("residual", residual)
    y, data, overwritten = _target(call, x, out, gamma, beta)
    if r is not None and out is not None and _check.same_memory(call.backend.xp, "out", y, r):
        r = r.copy()
    xp, ops = backend
    saved = xp.empty((3, *call.shape[: call.axis]), call.real)
    hi, lo, rstd = (saved[k, ...] for k in range(3))
    total = None if r is None else xp.empty(call.shape, call.x.dtype)
    rows = [_rows(call, array) for array in (data, r, total, y)]
    ops.ln_forward(rows[0], rows[1], np.array([eps]), g, b, hi, lo, rstd, rows[2], rows[3])
    overwritten = overwritten and total is None
    cache = LayerNormCache(x if total is None else total, gamma, beta, int(ndim), hi, lo, rstd, overwritten)
    return (y if out is None else out), cache


def layer_norm_backward(dy: Any, cache: LayerNormCache, *, dsum: Any = None, out: Any = None) -> LayerNormGrads:
    """The gradients of `layer_norm`.

    With x̂ = (x - mean) * rstd, g = dy * gamma, and means over a row:

    dx = rstd (g - mean(g) - x̂ mean(g x̂)) + dsum,  dgamma = Σ dy x̂,  dbeta = Σ dy, the sums over all rows.

    Args:
        dy: the upstream gradient of y, of its shape and dtype.
        cache: what `layer_norm` returned beside y.
        dsum: the upstream gradient of `cache.x` itself, where that is used elsewhere too; likewise.
        out: written to and returned as dx; x's shape and dtype, in C order. May be dy or dsum itself, at the price of a
            copy.

    Returns:
        (dx, dgamma, dbeta): dx of x's dtype, the gradient of x and of residual; dgamma and dbeta of gamma's and beta's
        shape and dtype. None for what the forward pass did not have.

    Raises:
        KilterError: an argument does not fit, or the forward pass wrote y over x.

    Notes:
        Reads dy, x (and dsum) from memory once where a row of each fits in cache, and writes dx once. The sums over
        rows are merged in float64.

    References:
        Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """
    if not isinstance(cache, LayerNormCache):
        fail("cache", "what layer_norm returned beside y", type(cache).__name__)
    dx, sums = _backward(dy, cache, cache.hi, cache.lo, dsum, out)
    return LayerNormGrads(dx, _sum(sums[1], cache.gamma), _sum(sums[0], cache.beta))


def rms_norm(
    x: Any, gamma: Any = None, *, ndim: int = 1, eps: float = 1e-6, out: Any = None
) -> tuple[Any, RMSNormCache]:
    """Divides every row, the last `ndim` axes, by the root of its mean square.

    y = x / sqrt(mean(x²) + eps) * gamma.

    Args:
        x: data, float64, float32, float16 or bfloat16. C order is read in place, any other layout is copied once.
        gamma: scale, shape x.shape[-ndim:], of x's dtype, or float32 for 16-bit x; None is 1.
        ndim: how many of the last axes make a row.
        eps: added to the mean square, inside the root.
        out: written to and returned as y; x's shape and dtype, in C order. May be x itself, at the price of a copy.

    Returns:
        y, of x's dtype, and the cache for `rms_norm_backward`.

    Raises:
        KilterError: an argument does not fit, or rows are empty.

    Notes:
        Reads x from memory once where a row fits in cache, and writes y once. Squares are formed in the arithmetic
        type: values up to 1e18 in float32 (1e150 in float64) are accurate. Each row's bits depend on that row alone.

    References:
        Zhang, Sennrich 2019, arXiv:1910.07467.
    """
    backend = backend_of(x, gamma, out, names=("x", "gamma", "out"))
    call, g, eps = _open(backend, x, gamma, ndim, eps)
    y, data, overwritten = _target(call, x, out, gamma)
    xp, ops = backend
    rstd = xp.empty(call.shape[: call.axis], call.real)
    ops.ln_forward(_rows(call, data), None, np.array([eps]), g, None, None, None, rstd, None, _rows(call, y))
    return (y if out is None else out), RMSNormCache(x, gamma, int(ndim), rstd, overwritten)


def rms_norm_backward(dy: Any, cache: RMSNormCache, *, out: Any = None) -> RMSNormGrads:
    """The gradients of `rms_norm`.

    With x̂ = x * rstd, g = dy * gamma, and the mean over a row:

    dx = rstd (g - x̂ mean(g x̂)),  dgamma = Σ dy x̂ over all rows.

    Args:
        dy: the upstream gradient, of y's shape and dtype.
        cache: what `rms_norm` returned beside y.
        out: written to and returned as dx; x's shape and dtype, in C order. May be dy itself, at the price of a copy.

    Returns:
        (dx, dgamma): dx of x's dtype, dgamma of gamma's shape and dtype, or None without gamma.

    Raises:
        KilterError: an argument does not fit, or the forward pass wrote y over x.

    References:
        Zhang, Sennrich 2019, arXiv:1910.07467.
    """
    if not isinstance(cache, RMSNormCache):
        fail("cache", "what rms_norm returned beside y", type(cache).__name__)
    dx, sums = _backward(dy, cache, None, None, None, out)
    return RMSNormGrads(dx, _sum(sums[1], cache.gamma))


def _opened(backend: Backend, x: Any, ndim: int) -> Call:
    """Returns the call on `x`, whose axis is the first of a row."""
    if not isinstance(ndim, (int, np.integer)) or isinstance(ndim, bool) or not 1 <= ndim <= x.ndim:
        fail("ndim", f"a whole number from 1 to x.ndim, {x.ndim}", repr(ndim))
    real, axis = _check.arithmetic("x", x.dtype), x.ndim - int(ndim)
    width = math.prod(x.shape[axis:])
    if width == 0:
        fail("x", f"rows, its last {ndim} axes, of at least one value", f"shape {x.shape}")
    return Call(backend, x.shape, _check.contiguous(backend.xp, x), axis, False, real, width)


def _open(backend: Backend, x: Any, gamma: Any, ndim: int, eps: float) -> tuple[Call, Any, float]:
    """Returns the call on `x`, gamma as a vector, and eps."""
    call = _opened(backend, _check.array("x", x), ndim)
    return call, _affine(call, "gamma", gamma), _check.number("eps", eps, 0.0, sys.float_info.max)


def _affine(call: Call, argument: str, values: Any) -> Any:
    """Returns gamma or beta, shaped like a row, as a vector of the arithmetic's dtype."""
    if values is None:
        return None
    if values.shape != call.shape[call.axis :]:
        fail(argument, f"shape {call.shape[call.axis :]}", f"shape {values.shape}")
    return _check.vector(call.backend.xp, argument, values.reshape(-1), call.channels, call.real, call.x.dtype)


def _rows(call: Call, array: Any) -> Any:
    """Returns the view of an array of x's shape as a matrix of rows."""
    return None if array is None else array.reshape(-1, call.channels)


def _target(call: Call, x: Any, out: Any, *apart: Any) -> tuple[Any, Any, bool]:
    """Returns what y is written to, what x is read from, and whether the one lies over the other."""
    y, data = call.output(out), call.x
    if out is None:
        return y, data, False
    xp = call.backend.xp
    overwritten = _check.same_memory(xp, "out", y, call.x)
    if overwritten:
        data = call.x.copy()
    overwritten = overwritten or _check.over_original(xp, y, x, call.x)
    _check.apart(xp, y, *apart)
    return y, data, overwritten


def _backward(
    dy: Any, cache: LayerNormCache | RMSNormCache, hi: Any, lo: Any, dsum: Any, out: Any
) -> tuple[Any, tuple[Any, Any]]:
    """Returns dx, and the sums of dy and of dy * x̂ over all rows."""
    _check.array("dy", dy)
    if cache.overwritten:
        fail("cache", "a forward pass whose inputs are still there", "one whose out= overwrote them")
    backend = backend_of(dy, cache.x, dsum, out, names=("dy", "x", "dsum", "out"))
    xp, ops = backend
    call = _opened(backend, cache.x, cache.ndim)
    reads, dx = [call.like("dy", dy), call.like("dsum", dsum)], call.output(out)
    if out is not None:
        for k, array in enumerate(reads):
            if array is not None and _check.same_memory(xp, "out", dx, array):
                reads[k] = array.copy()
        _check.apart(xp, dx, call.x, cache.gamma, hi, lo, cache.rstd)
    g = _affine(call, "gamma", cache.gamma)
    sum_dy, sum_dy_xhat = xp.empty((2, call.channels))
    upstream, x, other, target = (_rows(call, array) for array in (reads[0], call.x, reads[1], dx))
    ops.ln_backward(upstream, x, g, hi, lo, cache.rstd, other, sum_dy, sum_dy_xhat, target)
    return (dx if out is None else out), (sum_dy, sum_dy_xhat)


def _sum(total: Any, parameter: Any) -> Any:
    """Returns the gradient of gamma or beta."""
    if parameter is None:
        return None
    with np.errstate(over="ignore"):  # a sum past the largest number is infinite, as in dx
        return total.astype(parameter.dtype.newbyteorder("=")).reshape(parameter.shape)
