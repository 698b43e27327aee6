"""What kilter computes, in plain float64 NumPy: slow, short, obvious. The specification of every kernel.

Nothing here is fast, nothing writes in place, and nothing imports kilter.
"""

import math
from typing import NamedTuple

import numpy as np

# --------------------------------------------------------------------------- statistics


class Moments(NamedTuple):
    """Number of values, mean, and sum of squared deviations, per channel."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray


def columns(x, axis=1):
    """x as a float64 matrix: one column per channel, one row per position."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    return x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


def total(values):
    """Sum of each column, exact to the last digits of float64 whatever the number of rows."""
    return values.sum(0, dtype=np.longdouble).astype(np.float64)


def positions(weights, x, axis=1):
    """weights of shape (N,) or (N, *spatial) as one number per row of columns(x)."""
    spatial = np.moveaxis(x, axis, -1).shape[:-1]
    weights = np.ones(spatial) if weights is None else np.asarray(weights, np.float64)
    weights = weights.reshape(weights.shape + (1,) * (len(spatial) - weights.ndim))
    return np.broadcast_to(weights, spatial).reshape(-1, 1)


def moments(x, axis=1, weights=None):
    w, x = positions(weights, x, axis), columns(x, axis)
    count = np.broadcast_to(total(w), x.shape[1:])
    mean = total(w * x) / np.maximum(count, 1e-300)
    return Moments(count, mean, total(w * (x - mean) ** 2))


def merge(*parts):
    """Moments of the union (Chan, Golub, LeVeque 1983); parts with a count of zero change nothing."""
    count, mean, m2 = parts[0]
    for part in parts[1:]:
        total = count + part.count
        share = part.count / np.maximum(total, 1e-300)
        delta = part.mean - mean
        mean = mean + delta * share
        m2 = m2 + part.m2 + delta**2 * count * share
        count = total
    return Moments(count, mean, m2)


def ema(old, new, momentum):
    """momentum is the weight of the new value."""
    return (1 - momentum) * old + momentum * new


def running(batches, *, momentum=0.1, unbiased=True):
    """Mean and variance after a list of (mean, biased variance, n), from mean 0 and variance 1.

    momentum: the weight of the new batch; None is the average weighted by n; or a function of the step.
    """
    mean, var, seen = 0.0, 1.0, 0
    for step, (batch_mean, batch_var, n) in enumerate(batches):
        seen += n
        m = n / seen if momentum is None else momentum(step) if callable(momentum) else momentum
        mean = ema(mean, np.asarray(batch_mean, np.float64), m)
        var = ema(var, np.asarray(batch_var, np.float64) * (n / (n - 1) if unbiased else 1), m)
    return mean, var


# --------------------------------------------------------------------------- batch norm


def _channels(values, x, axis, default):
    values = np.full(x.shape[axis], default) if values is None else np.asarray(values, np.float64)
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def batch_norm(
    x,
    gamma=None,
    beta=None,
    *,
    axis=1,
    eps=1e-5,
    mean=None,
    var=None,
    relu=False,
    residual=None,
    weights=None,
):
    """y, mean and biased variance; a given mean and var are used as they are (evaluation)."""
    if mean is None:
        count, mean, m2 = moments(x, axis, weights)
        var = m2 / count
    xhat = (np.asarray(x, np.float64) - _channels(mean, x, axis, 0)) / np.sqrt(_channels(var, x, axis, 1) + eps)
    z = xhat * _channels(gamma, x, axis, 1) + _channels(beta, x, axis, 0)
    if residual is not None:
        z = z + np.asarray(residual, np.float64)
    return np.where(z < 0, 0.0, z) if relu else z, mean, var


def batch_norm_backward(dy, x, gamma=None, *, axis=1, eps=1e-5, mean=None, var=None, y=None, weights=None):
    """dx, dgamma, dbeta, dresidual. Given mean and var are constants (frozen); y is given after ReLU.

    With weights w, n = sum(w): dx_i = gamma * rstd * (dy_i - w_i * (sum(dy) + xhat_i * sum(dy * xhat)) / n).
    """
    frozen = mean is not None
    dy = np.asarray(dy, np.float64)
    if y is not None:
        dy = np.where(np.asarray(y, np.float64) <= 0, 0.0, dy)
    if not frozen:
        _, mean, var = batch_norm(x, axis=axis, eps=eps, weights=weights)
    rstd = 1 / np.sqrt(np.asarray(var, np.float64) + eps)
    xhat = (columns(x, axis) - mean) * rstd
    dz, w = columns(dy, axis), positions(weights, x, axis)
    dgamma, dbeta = total(dz * xhat), total(dz)
    dxhat = dz if frozen else dz - w * (dbeta + xhat * dgamma) / total(w)
    dx = dxhat * rstd * (1 if gamma is None else np.asarray(gamma, np.float64))
    shape = np.moveaxis(dy, axis, -1).shape
    return np.moveaxis(dx.reshape(shape), -1, axis), dgamma, dbeta, dy


# --------------------------------------------------------------------------- layer norm, RMS norm


def _rows(x, ndim):
    """x in float64, the axes of a row, and how many values a row has."""
    x, axes = np.asarray(x, np.float64), tuple(range(-ndim, 0))
    return x, axes, np.prod(x.shape[-ndim:])


def layer_norm(x, gamma=None, beta=None, *, ndim=1, eps=1e-5, centred=True):
    """y, mean and rstd of each row, the last ndim axes; RMS norm where not centred."""
    x, axes, n = _rows(x, ndim)
    mean = x.sum(axes, keepdims=True) / n * centred
    mean += (x - mean).sum(axes, keepdims=True) / n * centred  # what the first rounding left
    rstd = 1 / np.sqrt(((x - mean) ** 2).sum(axes, keepdims=True) / n + eps)
    gamma, beta = (d if v is None else np.asarray(v, np.float64) for v, d in ((gamma, 1.0), (beta, 0.0)))
    return (x - mean) * rstd * gamma + beta, mean.squeeze(axes), rstd.squeeze(axes)


def layer_norm_backward(dy, x, gamma=None, *, ndim=1, eps=1e-5, centred=True):
    """dx, dgamma, dbeta."""
    dy, axes, n = _rows(dy, ndim)
    xhat, _, rstd = layer_norm(x, ndim=ndim, eps=eps, centred=centred)
    g = dy * (1.0 if gamma is None else np.asarray(gamma, np.float64))
    c1 = g.sum(axes, keepdims=True) / n * centred
    c2 = (g * xhat).sum(axes, keepdims=True) / n
    before = tuple(range(dy.ndim - ndim))
    return np.expand_dims(rstd, axes) * (g - c1 - xhat * c2), (dy * xhat).sum(before), dy.sum(before)


# --------------------------------------------------------------------------- group norm


def grouped(x, groups, axis=1):
    """x in float64 as one row per group of adjacent channels of each sample, and the way back."""
    first = np.moveaxis(np.asarray(x, np.float64), axis, 1)
    rows = first.reshape(len(first), groups, -1)
    return rows, lambda rows: np.moveaxis(rows.reshape(first.shape), 1, axis)


def group_norm(x, groups, gamma=None, beta=None, *, axis=1, eps=1e-5):
    """y, mean and biased variance, the last two of shape (N, groups)."""
    rows, back = grouped(x, groups, axis)
    mean, var = rows.mean(-1), rows.var(-1)
    xhat = back((rows - mean[..., None]) / np.sqrt(var[..., None] + eps))
    return xhat * _channels(gamma, x, axis, 1) + _channels(beta, x, axis, 0), mean, var


def group_norm_backward(dy, x, groups, gamma=None, *, axis=1, eps=1e-5):
    """dx, dgamma, dbeta: dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * gamma, per group."""
    xhat, _, var = group_norm(x, groups, axis=axis, eps=eps)
    dy = np.asarray(dy, np.float64)
    (g, back), (rows, _) = grouped(dy * _channels(gamma, x, axis, 1), groups, axis), grouped(xhat, groups, axis)
    dx = (g - g.mean(-1, keepdims=True) - rows * (g * rows).mean(-1, keepdims=True)) / np.sqrt(var[..., None] + eps)
    return back(dx), total(columns(dy * xhat, axis)), total(columns(dy, axis))


# --------------------------------------------------------------------------- loss scale


def loss_scale(finite, *, init=65536.0, growth=2.0, backoff=0.5, interval=2000, minimum=1.0):
    """The scale after each step, of which `finite` says whether all gradients were."""
    scale, clean, path = init, 0, []
    for ok in finite:
        clean = clean + 1 if ok else 0
        if not ok:
            scale = max(scale * backoff, minimum)
        elif clean == interval:
            scale, clean = scale * growth, 0
        path.append(scale)
    return path


# --------------------------------------------------------------------------- random numbers


def philox(counter, key):
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011): counter (..., 4) and key (2,) to words (..., 4)."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def words(size, *, seed, stream=0, attempt=0, start=0):
    """The fill mapping: the word that belongs to each of the elements start ... start + size - 1.

    Element i lies in group b = i / 64 at position 16 k + l and takes word k of the counter 16 b + l.
    """
    i = np.arange(start, start + size, dtype=np.uint64)
    b, k, lane = i // 64, i % 64 // 16, i % 16
    number = 16 * b + lane
    counter = np.stack(
        [
            number & np.uint64(0xFFFFFFFF),
            number >> np.uint64(32),
            np.full_like(i, stream),
            np.full_like(i, attempt),
        ],
        -1,
    )
    out = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return out[np.arange(size), k.astype(np.intp)]


def uniform(size, *, seed, stream=0):
    """Uniform in [0, 1): multiples of 2^-24, exact in float32."""
    return (words(size, seed=seed, stream=stream) >> 8) * 2.0**-24


def normal(size, *, seed, stream=0, attempt=0):
    """Box and Muller (1958) on words (0, 1) and (2, 3) of one counter, in float64."""
    groups = -(-size // 64)
    w = words(64 * groups, seed=seed, stream=stream, attempt=attempt).reshape(groups, 2, 2, 16) >> 8
    a, v = (w[:, :, 0] + 1) * 2.0**-24, w[:, :, 1] * 2.0**-24
    r, angle = np.sqrt(-2 * np.log(a)), 2 * np.pi * v
    return np.stack([r * np.cos(angle), r * np.sin(angle)], 2).reshape(-1)[:size]


def truncated_normal(size, *, seed, stream=0, cut=2.0):
    """Each element's first normal variate, over the attempts, with abs(z) < cut: not scaled to variance 1."""
    z = normal(size, seed=seed, stream=stream)
    attempt = 0
    while (outside := np.abs(z) >= cut).any():
        attempt += 1
        z[outside] = normal(size, seed=seed, stream=stream, attempt=attempt)[outside]
    return z


def truncated_deviation(cut=2.0):
    """Standard deviation of a standard normal cut off at +-cut: var = 1 - 2 cut pdf(cut) / (2 cdf(cut) - 1)."""
    inside, density = math.erf(cut / math.sqrt(2)), math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / inside)


# --------------------------------------------------------------------------- initialisation


def fans(shape, layout="io"):
    """(fan_in, fan_out): a convolution's window counts on both sides."""
    window = int(np.prod([n for n, letter in zip(shape, layout, strict=True) if letter in "hw"]))
    return shape[layout.index("i")] * window, shape[layout.index("o")] * window


def gain(nonlinearity, a=0.0):
    return {
        "linear": 1.0,
        "sigmoid": 1.0,
        "tanh": 5 / 3,
        "relu": np.sqrt(2),
        "leaky_relu": np.sqrt(2 / (1 + a**2)),
        "selu": 3 / 4,
    }[nonlinearity]


def deviation(name, shape, layout="io", *, mode=None, nonlinearity="relu", a=0.0):
    """Standard deviation of he, xavier, lecun or torch_default (uniform within 1/sqrt(fan_in))."""
    fan_in, fan_out = fans(shape, layout)
    mode = mode or ("fan_avg" if name == "xavier" else "fan_in")
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    numerator = {"he": gain(nonlinearity, a) ** 2, "xavier": 1.0, "lecun": 1.0, "torch_default": 1 / 3}[name]
    return np.sqrt(numerator / fan)


def bound(std):
    """Half width of the centred uniform distribution of that standard deviation."""
    return np.sqrt(3) * std
