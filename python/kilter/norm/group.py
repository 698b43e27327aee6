"""Group normalisation and instance normalisation, forward and backward, as functions on arrays."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kilter import _check, stats
from kilter._backend import backend_of
from kilter._channels import Call, open_call
from kilter._check import fail

__all__ = [
    "GroupNormCache",
    "GroupNormGrads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
]


class GroupNormCache(NamedTuple):
    """What `group_norm` and `instance_norm` hand to their backward passes: references to arrays, and the moments.

    `moments` are count, mean and m2 in float64, the last two of shape (N, groups). The arrays of the data must not
    change before the backward pass.
    """

    x: Any
    gamma: Any
    beta: Any
    groups: int
    axis: int
    eps: float
    moments: stats.Moments
    overwritten: bool

    @property
    def mean(self) -> Any:
        """The mean that was subtracted, float64 of shape (N, groups)."""
        return self.moments.mean

    @property
    def rstd(self) -> Any:
        """1 / sqrt(var + eps), float64 of shape (N, groups)."""
        return (self.moments.m2 / self.moments.count + self.eps) ** -0.5


class GroupNormGrads(NamedTuple):
    """Gradients of the inputs of `group_norm` or `instance_norm`; None for those that it did not have."""

    dx: Any
    dgamma: Any
    dbeta: Any


def group_norm(
    x: Any,
    groups: int,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Any = None,
) -> tuple[Any, GroupNormCache]:
    """Normalises every group of adjacent channels of every sample.

    y = (x - mean) / sqrt(var + eps) * gamma + beta, where mean and biased variance are those of the channels of a group
    at all positions of one sample: the same in training and in use, whatever the batch.

    Args:
        x: data of at least two axes, float64, float32, float16 or bfloat16. C order and channels-last views are read in
            place, any other layout is copied once.
        groups: how many groups; divides the number of channels. With one group each sample is normalised as a whole,
            with one per channel this is `instance_norm`.
        gamma: scale, shape (channels,), of x's dtype, or float32 for 16-bit x; None is 1.
        beta: shift, likewise; None is 0.
        axis: the channel axis: 1 for (N, C, ...), -1 for (N, ..., C).
        eps: added to the variance, inside the root.
        out: written to and returned as y; x's shape, dtype and layout. May be x itself, at the price of a copy.

    Returns:
        y, of x's dtype, and the cache for `group_norm_backward`.

    Raises:
        KilterError: an argument does not fit, or a group has only one value: its variance would be zero and y would not
            depend on x.

    Notes:
        Reads x from memory once where a group (channels last: a sample) fits in cache. The moments are taken as in
        `batch_norm`, with the same accuracy. Channels-first and channels-last memory are summed in different orders:
        rstd differs by at most 2 ulp of float32, the mean by 2 ulp of itself, or of 1/8 of the spread where that is
        larger.

    References:
        Wu, He 2018, arXiv:1803.08494.
    """
    return _forward(x, partial(_divisor, groups), gamma, beta, axis, eps, out)


def instance_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Any = None,
) -> tuple[Any, GroupNormCache]:
    """Normalises every channel of every sample.

    y = (x - mean) / sqrt(var + eps) * gamma + beta, where mean and biased variance are those of a channel at all
    positions of one sample. The same as `group_norm` with one group per channel.

    Args:
        x: data of at least two axes, float64, float32, float16 or bfloat16. C order and channels-last views are read in
            place, any other layout is copied once.
        gamma: scale, shape (channels,), of x's dtype, or float32 for 16-bit x; None is 1.
        beta: shift, likewise; None is 0.
        axis: the channel axis: 1 for (N, C, ...), -1 for (N, ..., C).
        eps: added to the variance, inside the root.
        out: written to and returned as y; x's shape, dtype and layout. May be x itself, at the price of a copy.

    Returns:
        y, of x's dtype, and the cache for `instance_norm_backward`.

    Raises:
        KilterError: an argument does not fit, or there is only one position.

    References:
        Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022.
    """
    return _forward(x, _each, gamma, beta, axis, eps, out)


def group_norm_backward(dy: Any, cache: GroupNormCache, *, out: Any = None) -> GroupNormGrads:
    """The gradients of `group_norm`.

    With x̂ = (x - mean) * rstd, g = dy * gamma, and means over a group:

    dx = rstd (g - mean(g) - x̂ mean(g x̂)),  dgamma = Σ dy x̂,  dbeta = Σ dy,

    the sums over all samples and positions.

    Args:
        dy: the upstream gradient, of y's shape and dtype.
        cache: what `group_norm` returned beside y.
        out: written to and returned as dx; x's shape, dtype and layout. May be dy itself, at the price of a copy.

    Returns:
        (dx, dgamma, dbeta): dx of x's dtype, dgamma and dbeta of gamma's and beta's. None for what the forward pass did
        not have.

    Raises:
        KilterError: an argument does not fit, or the forward pass wrote y over x.

    References:
        Wu, He 2018, arXiv:1803.08494.
    """
    return _backward(dy, cache, out, "group_norm")


def instance_norm_backward(dy: Any, cache: GroupNormCache, *, out: Any = None) -> GroupNormGrads:
    """The gradients of `instance_norm`: those of `group_norm_backward` with one group per channel.

    dx = rstd (g - mean(g) - x̂ mean(g x̂)) with g = dy * gamma,  dgamma = Σ dy x̂,  dbeta = Σ dy.

    Args:
        dy: the upstream gradient, of y's shape and dtype.
        cache: what `instance_norm` returned beside y.
        out: written to and returned as dx; x's shape, dtype and layout. May be dy itself, at the price of a copy.

    Returns:
        (dx, dgamma, dbeta): dx of x's dtype, dgamma and dbeta of gamma's and beta's. None for what the forward pass did
        not have.

    Raises:
        KilterError: an argument does not fit, or the forward pass wrote y over x.

    References:
        Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022.
    """
    return _backward(dy, cache, out, "instance_norm")


def _divisor(groups: Any, channels: int) -> int:
    """Returns `groups`, which must divide the channels."""
    whole = isinstance(groups, (int, np.integer)) and not isinstance(groups, bool)
    if not whole or groups < 1 or channels % groups:
        fail("groups", f"a divisor of the {channels} channels", repr(groups))
    return int(groups)


def _each(channels: int) -> int:
    """Returns the number of groups of one channel."""
    return max(channels, 1)


def _opened(x: Any, axis: int, out: Any, backend: Any) -> Call:
    """Returns the call on `x`, whose channel axis must be the one after the samples or the last."""
    call = open_call(backend, x, axis, out)
    if call.axis not in (1, x.ndim - 1):
        fail("axis", "1 or -1", repr(axis))
    return call


def _forward(
    x: Any, divide: Callable[[int], int], gamma: Any, beta: Any, axis: int, eps: float, out: Any
) -> tuple[Any, GroupNormCache]:
    backend = backend_of(x, gamma, beta, out, names=("x", "gamma", "beta", "out"))
    _check.array("x", x)
    xp, ops = backend
    call = _opened(x, axis, out, backend)
    channels = call.channels
    parts = divide(channels)
    g = _check.vector(xp, "gamma", gamma, channels, call.real, x.dtype)
    b = _check.vector(xp, "beta", beta, channels, call.real, x.dtype)
    eps = _check.number("eps", eps, 0.0, sys.float_info.max)
    count = math.prod(call.shape[1:]) // parts
    if channels and count <= 1:
        fail("x", "more than one value per group", f"{count}")
    y, data, overwritten = call.output(out), call.x, False
    if out is not None:
        overwritten = _check.same_memory(xp, "out", y, call.x)
        if overwritten:
            data = call.x.copy()
        overwritten = overwritten or _check.over_original(xp, y, x, call.x)
        _check.apart(xp, y, gamma, beta)
    mean, m2 = xp.empty((2, call.shape[0], parts))
    ops.gn_forward(data, call.axis, parts, np.array([eps]), g, b, mean.reshape(-1), m2.reshape(-1), y)
    moments = stats.Moments(np.float64(count), mean, m2)
    cache = GroupNormCache(x, gamma, beta, parts, call.axis_of_x, eps, moments, overwritten)
    return (call.back(y) if out is None else out), cache


def _backward(dy: Any, cache: GroupNormCache, out: Any, forward: str) -> GroupNormGrads:
    if not isinstance(cache, GroupNormCache):
        fail("cache", f"what {forward} returned beside y", type(cache).__name__)
    _check.array("dy", dy)
    if cache.overwritten:
        fail("cache", "a forward pass whose inputs are still there", "one whose out= overwrote them")
    backend = backend_of(dy, cache.x, out, names=("dy", "x", "out"))
    xp, ops = backend
    call = open_call(backend, cache.x, cache.axis, out)
    upstream = call.like("dy", dy)
    dx = call.output(out)
    if out is not None:
        if _check.same_memory(xp, "out", dx, upstream):
            upstream = upstream.copy()
        _check.apart(xp, dx, call.x, cache.gamma, cache.beta)
    g = _check.vector(xp, "gamma", cache.gamma, call.channels, call.real, cache.x.dtype)
    _, mean, m2 = cache.moments
    dbeta, dgamma = xp.empty((2, call.channels))
    h = np.array([cache.eps])
    ops.gn_backward(
        upstream, call.x, call.axis, cache.groups, h, mean.reshape(-1), m2.reshape(-1), g, dbeta, dgamma, dx
    )
    with np.errstate(over="ignore"):  # a sum past the largest number is infinite, as in dx
        dgamma = None if cache.gamma is None else dgamma.astype(cache.gamma.dtype.newbyteorder("="))
        dbeta = None if cache.beta is None else dbeta.astype(cache.beta.dtype.newbyteorder("="))
    return GroupNormGrads(call.back(dx) if out is None else out, dgamma, dbeta)
