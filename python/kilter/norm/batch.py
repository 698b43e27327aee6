"""Batch normalisation, forward and backward, as functions on arrays."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np

from kilter import _check, stats
from kilter._backend import NUMPY, backend_of, host
from kilter._channels import Call, open_call, position_weights
from kilter._check import fail

__all__ = ["BatchNormCache", "BatchNormGrads", "batch_norm", "batch_norm_backward"]


_INPUTS = ("x", "gamma", "beta", "residual", "weights", "out", "running", "running")


class BatchNormCache(NamedTuple):
    """What `batch_norm` hands to `batch_norm_backward`: references to arrays, and the small statistics.

    `mean` is hi + lo, `rstd` is 1 / sqrt(var + eps); both are per channel. The arrays of the data must not change
    before the backward pass.
    """

    x: Any
    gamma: Any
    beta: Any
    residual: Any
    weights: Any
    axis: int
    relu: bool
    training: bool
    hi: Any
    lo: Any
    rstd: Any
    moments: stats.Moments
    comm: Any
    overwritten: bool

    @property
    def mean(self) -> Any:
        """The mean that was subtracted, float64 of shape (channels,)."""
        return self.hi.astype("float64") + self.lo


class BatchNormGrads(NamedTuple):
    """Gradients of the inputs of `batch_norm`; None for those that it did not have."""

    dx: Any
    dgamma: Any
    dbeta: Any
    dresidual: Any


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    running: stats.RunningStats | None = None,
    training: bool = True,
    activation: str | None = None,
    residual: Any = None,
    weights: Any = None,
    comm: Any = None,
    out: Any = None,
) -> tuple[Any, BatchNormCache]:
    """Normalises every channel over the batch and all positions.

    y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual), where mean and biased variance are those of this
    batch in training, and the running ones otherwise.

    Args:
        x: data of at least two axes, float64, float32, float16 or bfloat16. C order and channels-last views are read in
            place, any other layout is copied once.
        gamma: scale, shape (channels,), of x's dtype, or float32 for 16-bit x; None is 1.
        beta: shift, likewise; None is 0.
        axis: the channel axis: 1 for (N, C, ...), -1 for (N, ..., C).
        eps: added to the variance, inside the root.
        running: moved towards this batch in training, read otherwise.
        training: whether the statistics are those of this batch.
        activation: None or "relu", after the residual.
        residual: added before the activation, of x's shape and dtype.
        weights: counts or a 0/1 mask, shape (N,) or (N, *positions): the statistics weigh each position by it, n is
            their sum. Positions of weight 0 still get y.
        comm: a communicator of `kilter.dist`: in training the statistics, `cache.moments` and `running` are those of
            all ranks together, on every rank the same. Counts may differ and be zero. One exchange of count, mean and
            m2 in float64.
        out: written to and returned as y; x's shape, dtype and layout. May be x itself, at the price of a copy.

    Returns:
        y, of x's dtype, and the cache for `batch_norm_backward`. `cache.moments` are count, mean and m2 in float64.

    Raises:
        KilterError: an argument does not fit, or there is only one value per channel in training (on all ranks
            together, which then all raise). With `comm`, arguments are checked before the exchange.

    Notes:
        Reads x once where the slice of a channel fits in cache, otherwise twice, and writes y once. The running
        variance is the unbiased one, n / (n - 1), unless `running` says otherwise. The sums are taken per block about
        the mean of the blocks before it, or its own where that is far off, and merged in float64, so that a mean of
        1e4 at a spread of 1 costs no accuracy. Squares are formed in the arithmetic type: spreads up to 1e17 in float32
        (1e150 in float64) are accurate, far larger ones give beta or NaN. Channels-first and channels-last memory are
        summed in different orders: rstd differs by at most 2 ulp of float32, the mean by 2 ulp of itself, or of 1/8 of
        the spread where that is larger.

        On a GPU, x is read twice, and nothing waits for the device but weights, whose sum the host looks at, and
        `comm`, whose counts it looks at.

    References:
        Ioffe, Szegedy 2015, arXiv:1502.03167.
    """
    found: tuple[Any, ...] = ()
    if running is not None:
        if not isinstance(running, stats.RunningStats):
            fail("running", "a RunningStats", type(running).__name__)
        found = running.mean, running.var
    backend = backend_of(x, gamma, beta, residual, weights, out, *found, names=_INPUTS)
    _check.array("x", x)
    xp, ops = backend
    call = open_call(backend, x, axis, out)
    channels, real = call.channels, call.real
    g = _check.vector(xp, "gamma", gamma, channels, real, x.dtype)
    b = _check.vector(xp, "beta", beta, channels, real, x.dtype)
    eps = _check.number("eps", eps, 0.0, sys.float_info.max)
    if activation is not None and activation != "relu":
        fail("activation", "None or 'relu'", repr(activation))
    relu = activation is not None
    r = call.like("residual", residual)
    w = position_weights(call, weights)
    _check.communicator(comm)
    for array in found:
        if array is None:
            fail("running", "arrays", "None")
        if array.shape != (channels,) or array.dtype != real:
            fail("running", f"{real} statistics of {channels} features", f"{array.dtype} of shape {array.shape}")
        if not _check.ready(array):
            fail("running", "contiguous arrays", f"strides {array.strides}")
    y, data, overwritten = call.output(out), call.x, False
    if out is not None:
        overwritten = _check.same_memory(xp, "out", y, call.x)
        if overwritten:
            data = call.x.copy()
        overwritten = overwritten or _check.over_original(xp, y, x, call.x)
        if r is not None:
            over = _check.over_original(xp, y, residual, r)
            if _check.same_memory(xp, "out", y, r):
                r, over = r.copy(), True
            overwritten = overwritten or (over and relu)
        # The core's fused forms look themselves, at what they get: not at vectors that were converted.
        if comm is not None or backend is not NUMPY or g is not gamma or b is not beta or w is not weights:
            _check.apart(xp, y, gamma, beta, weights, *found)
    saved = xp.empty((3, channels), real)
    hi, lo, rstd = saved
    if training:
        train = _train_over_ranks if comm is not None else _train
        moments = train(call, data, w, (eps, running, g, b, r, relu, comm), hi, lo, rstd, y)
    else:
        if running is None:
            fail("running", "running statistics, which inference reads", "None")
        rows = xp.zeros(1 + 2 * channels)
        moments = stats.Moments(rows[0], rows[1 : 1 + channels], rows[1 + channels :])
        ops.bn_infer(data, call.axis, eps, g, b, r, relu, running.mean, running.var, moments.mean, hi, lo, rstd, y)
    cache = BatchNormCache(
        x, gamma, beta, residual, w, call.axis_of_x, relu, training, hi, lo, rstd, moments, comm, overwritten
    )
    return (call.back(y) if out is None else out), cache


def _scalars(eps: float, momentum: float = 0.0, unbiased: bool = False) -> Any:
    return np.array((eps, momentum, unbiased), "float64")


def _towards(running: stats.RunningStats | None, count: float, eps: float) -> tuple[Any, Any, Any]:
    """Returns the running mean and variance, and the scalars of `bn_finish`."""
    if running is None:
        return None, None, _scalars(eps)
    return running.mean, running.var, _scalars(eps, running.weight(count), running.unbiased)


def _enough(count: float, weights: Any) -> None:
    """Refuses statistics of nothing, or of one value: its variance would be zero and y would not depend on x."""
    if not 1.0 < count < math.inf:
        if weights is not None:
            fail("weights", "a finite sum above 1 in training", f"{count:g}")
        fail("x", "more than one value per channel in training", f"{count:g}")


def _train(call: Call, data: Any, w: Any, how: tuple[Any, ...], hi: Any, lo: Any, rstd: Any, y: Any) -> stats.Moments:
    xp, ops = call.backend
    eps, running, g, b, r, relu, _ = how
    channels = call.channels
    count = math.prod(call.shape) // max(channels, 1) if w is None else float(w.sum(dtype="float64"))
    if channels:
        _enough(count, w)
    rows = xp.empty(1 + 2 * channels)
    n, mean, m2 = rows[:1], rows[1 : 1 + channels], rows[1 + channels :]
    running_mean, running_var, h = _towards(running, count, eps)
    ops.bn_train(data, call.axis, w, h, g, b, r, relu, n, mean, m2, hi, lo, rstd, running_mean, running_var, y)
    if running is not None:
        running.advance(count)
    return stats.Moments(n[0], mean, m2)


def _train_over_ranks(
    call: Call, data: Any, w: Any, how: tuple[Any, ...], hi: Any, lo: Any, rstd: Any, y: Any
) -> stats.Moments:
    xp, ops = call.backend
    eps, running, g, b, r, relu, comm = how
    channels = call.channels
    if running is not None:
        running.weight(1.0)  # a schedule that fails must do so before the exchange
    rows = xp.empty(1 + 2 * channels)
    ops.bn_stats(data, call.axis, w, rows[:1], rows[1 : 1 + channels], rows[1 + channels :])
    gathered = comm.all_gather(rows)
    counts = host(gathered[:, 0]).tolist()
    parts = (stats.Moments(n, p[1 : 1 + channels], p[1 + channels :]) for n, p in zip(counts, gathered, strict=True))
    count, mean, m2 = stats.merge(*parts)
    if channels:
        _enough(count, w)
    running_mean, running_var, h = _towards(running, count, eps)
    n = xp.asarray([count])
    ops.bn_finish(n, mean, m2, h, hi, lo, rstd, running_mean, running_var)
    if running is not None:
        running.advance(count)
    ops.bn_apply(data, call.axis, hi, lo, rstd, g, b, r, relu, y)
    return stats.Moments(n[0], mean, m2)


def batch_norm_backward(dy: Any, cache: BatchNormCache, *, out: Any = None, out_residual: Any = None) -> BatchNormGrads:
    """The gradients of `batch_norm`.

    With dz = dy where the activation let it pass and x̂ = (x - mean) * rstd, summed over the batch and all positions:

    dbeta = Σ dz,  dgamma = Σ dz x̂,  dx = gamma rstd (dz - w Σdz / n - x̂ w Σ(dz x̂) / n),  dresidual = dz,

    where n is the count (the sum of weights w, which are 1 without weights). With the running statistics, which do not
    depend on x, dx = gamma rstd dz. After a forward pass with `comm`, n and the sums in dx are those of all ranks: one
    exchange of two vectors in float64. dgamma and dbeta are this rank's own terms, to be summed over the ranks with
    the other gradients.

    Args:
        dy: the upstream gradient, of y's shape and dtype.
        cache: what `batch_norm` returned beside y.
        out: written to and returned as dx; x's shape, dtype and layout. May be dy itself, at the price of a copy.
        out_residual: written to and returned as dresidual, likewise, but with memory of its own. Only after a forward
            pass with a residual and an activation.

    Returns:
        (dx, dgamma, dbeta, dresidual): dx and dresidual of x's dtype, dgamma and dbeta of gamma's and beta's. None for
        what the forward pass did not have. dresidual is dy itself where there was no activation.

    Raises:
        KilterError: an argument does not fit, or the forward pass wrote y over what this pass would read.

    Notes:
        The ReLU's mask is computed again from x, so that no mask is stored and y is not read.

    References:
        Ioffe, Szegedy 2015, arXiv:1502.03167, section 3.
    """
    if not isinstance(cache, BatchNormCache):
        fail("cache", "what batch_norm returned beside y", type(cache).__name__)
    _check.array("dy", dy)
    if cache.overwritten:
        fail("cache", "a forward pass whose inputs are still there", "one whose out= overwrote them")
    backend = backend_of(dy, cache.x, out, out_residual, names=("dy", "x", "out", "out_residual"))
    xp, ops = backend
    call = open_call(backend, cache.x, cache.axis, out)
    channels, real, relu = call.channels, call.real, cache.relu
    fused = cache.training and cache.comm is None
    if out_residual is not None and (cache.residual is None or not relu):
        fail("out_residual", "None without a residual and an activation", "an array")
    g = _check.vector(xp, "gamma", cache.gamma, channels, real, cache.x.dtype)
    b = _check.vector(xp, "beta", cache.beta, channels, real, cache.x.dtype)
    upstream = call.like("dy", dy)
    dx = call.output(out)
    if out is not None:
        if _check.same_memory(xp, "out", dx, upstream):
            upstream = upstream.copy()
        _check.apart(xp, dx, cache.residual)
        if not fused or backend is not NUMPY or g is not cache.gamma or b is not cache.beta:  # as in `batch_norm`
            _check.apart(xp, dx, call.x, cache.weights, cache.gamma, cache.beta)
    r = call.like("residual", cache.residual) if relu else None
    dresidual = None if r is None else call.output(out_residual, "out_residual")
    if out_residual is not None:
        others = (dx, upstream, call.x, r, cache.weights, cache.gamma, cache.beta)
        if any(a is not None and xp.shares_memory(dresidual, a) for a in others):
            fail("out_residual", "memory of its own", "memory of another argument")
    sums = xp.empty((2, channels))
    sum_dy, sum_dy_xhat = sums
    how = (cache.hi, cache.lo, cache.rstd, g, b, r, relu)
    count = cache.moments.count.reshape(1)
    if fused:
        w = cache.weights
        ops.bn_backward(upstream, call.x, call.axis, w, count, *how, sum_dy, sum_dy_xhat, dx, dresidual)
    else:
        ops.bn_backward_reduce(upstream, call.x, call.axis, *how, sum_dy, sum_dy_xhat)
        if cache.training:
            totals = sums.copy()
            cache.comm.all_reduce(totals)
            w = cache.weights
            ops.bn_backward_apply(upstream, call.x, call.axis, w, count, *how, *totals, dx, dresidual)
        elif relu:
            totals = xp.zeros((2, channels))
            ops.bn_backward_apply(upstream, call.x, call.axis, None, xp.ones(1), *how, *totals, dx, dresidual)
        else:
            zeros = xp.zeros(channels, real)
            ops.bn_apply(upstream, call.axis, zeros, zeros, cache.rstd, g, None, None, False, dx)
    if cache.residual is not None and dresidual is None:
        dresidual = dy
    elif dresidual is not None:
        dresidual = call.back(dresidual) if out_residual is None else out_residual
    with np.errstate(over="ignore"):  # a sum past the largest number is infinite, as in dx
        dgamma = None if cache.gamma is None else sum_dy_xhat.astype(cache.gamma.dtype.newbyteorder("="))
        dbeta = None if cache.beta is None else sum_dy.astype(cache.beta.dtype.newbyteorder("="))
    return BatchNormGrads(call.back(dx) if out is None else out, dgamma, dbeta, dresidual)
