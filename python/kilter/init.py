"""Initialisation: random arrays that are a pure function of (seed, stream, index).

The same seed and stream give the same bits for any number of threads, on every device and in every release.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter._check import fail

__all__ = [
    "fans",
    "gain",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "torch_default",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
]

_MOST = sys.float_info.max
_ORDERS = {"io": "io", "oi": "oi", "oihw": "oi", "hwio": "io"}


def fans(shape: tuple[int, ...], layout: str = "io") -> tuple[int, int]:
    """Returns (fan_in, fan_out): how many inputs feed one output, and how many outputs one input feeds.

    Args:
        shape: the shape of the weights.
        layout: the order of their axes: "io" (in, out), "oi" (out, in), "oihw" (out, in, height, width) and "hwio".
            The conv layouts take any number of spatial axes; these count in both fans.

    Raises:
        KilterError: the layout is unknown, or the shape has too few axes.
    """
    if not isinstance(layout, str) or layout not in _ORDERS:
        fail("layout", " or ".join(map(repr, _ORDERS)), repr(layout))
    shape = _shape(shape)
    if len(shape) != 2 if len(layout) == 2 else len(shape) < 3:
        fail("shape", f"{'2' if len(layout) == 2 else 'at least 3'} axes for layout {layout!r}", f"shape {shape}")
    if layout in ("oihw", "oi"):
        (outs, ins), space = shape[:2], shape[2:]
    else:
        (ins, outs), space = shape[-2:], shape[:-2]
    return ins * math.prod(space), outs * math.prod(space)


def gain(nonlinearity: str, a: float = 0.0) -> float:
    """Returns the factor on the standard deviation that keeps the signal's size through a nonlinearity.

    "linear", "sigmoid" 1; "tanh" 5/3; "relu" sqrt(2); "leaky_relu" sqrt(2 / (1 + a²)); "selu" 3/4.

    Raises:
        KilterError: the nonlinearity is unknown.

    References:
        He, Zhang, Ren, Sun 2015, arXiv:1502.01852, for the rectifiers.
    """
    gains = {
        "linear": 1.0,
        "sigmoid": 1.0,
        "tanh": 5.0 / 3.0,
        "relu": math.sqrt(2.0),
        "leaky_relu": math.sqrt(2.0 / (1.0 + _check.number("a", a) ** 2)),
        "selu": 0.75,
    }
    if not isinstance(nonlinearity, str) or nonlinearity not in gains:
        fail("nonlinearity", " or ".join(map(repr, gains)), repr(nonlinearity))
    return gains[nonlinearity]


def uniform(
    shape: Any,
    low: float = 0.0,
    high: float = 1.0,
    *,
    seed: int,
    stream: int = 0,
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills with low + (high - low) u, u uniform on [0, 1) in steps of 2^-24.

    Args:
        shape: the shape of the result.
        low: the lower bound.
        high: the upper bound; reached only where the sum rounds to it.
        seed: 64 bits.
        stream: 32 bits; other streams of one seed are independent.
        dtype: float64, float32, float16 or bfloat16.
        out: filled and returned instead of a new array; C-contiguous, of `shape` and `dtype`.
        xp: the array module of a new array.

    Returns:
        The filled array: `out`, or a new one.

    Raises:
        KilterError: an argument does not fit.

    References:
        Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
    """
    low, high = _check.number("low", low, -_MOST, _MOST), _check.number("high", high, -_MOST, _MOST)
    if not low <= high:
        fail("high", f"a number of at least low, {low:g}", f"{high:g}")
    return _fill("fill_uniform", shape, low, high - low, seed, stream, dtype, out, xp)


def normal(
    shape: Any,
    mean: float = 0.0,
    std: float = 1.0,
    *,
    seed: int,
    stream: int = 0,
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills with mean + std z, z standard normal; the other arguments are those of `uniform`.

    Raises:
        KilterError: an argument does not fit.

    References:
        Box, Muller 1958, "A note on the generation of random normal deviates".
    """
    mean, std = _check.number("mean", mean, -_MOST, _MOST), _check.number("std", std, 0.0, _MOST)
    return _fill("fill_normal", shape, mean, std, seed, stream, dtype, out, xp)


def he_normal(
    shape: Any,
    *,
    seed: int,
    stream: int = 0,
    mode: str = "fan_in",
    nonlinearity: str = "relu",
    a: float = 0.0,
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills with normals of variance gain² / fan: 2 / fan_in for ReLU.

    Args:
        shape: the shape of the weights.
        seed: 64 bits.
        stream: 32 bits; give each layer its own.
        mode: "fan_in", "fan_out" or "fan_avg", the mean of both.
        nonlinearity: what follows the layer; see `gain`.
        a: the negative slope of "leaky_relu".
        layout: the order of the axes; see `fans`.
        dtype: float64, float32, float16 or bfloat16.
        out: filled and returned instead of a new array; C-contiguous, of `shape` and `dtype`.
        xp: the array module of a new array.

    Returns:
        The filled array: `out`, or a new one.

    Raises:
        KilterError: an argument does not fit.

    References:
        He, Zhang, Ren, Sun 2015, arXiv:1502.01852, equation 10.
    """
    std = gain(nonlinearity, a) / math.sqrt(_fan(shape, layout, mode))
    return _fill("fill_normal", shape, 0.0, std, seed, stream, dtype, out, xp)


def he_uniform(
    shape: Any,
    *,
    seed: int,
    stream: int = 0,
    mode: str = "fan_in",
    nonlinearity: str = "relu",
    a: float = 0.0,
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills uniformly on ±gain sqrt(3 / fan), the variance of `he_normal`, whose arguments these are."""
    bound = gain(nonlinearity, a) * math.sqrt(3.0 / _fan(shape, layout, mode))
    return _symmetric(bound, shape, seed, stream, dtype, out, xp)


def xavier_normal(
    shape: Any,
    *,
    seed: int,
    stream: int = 0,
    mode: str = "fan_avg",
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills with normals of variance 2 / (fan_in + fan_out), or 1 / fan_in with `mode="fan_in"`.

    The other arguments are those of `he_normal`.

    Raises:
        KilterError: an argument does not fit.

    References:
        Glorot, Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", equation 12.
    """
    std = math.sqrt(1.0 / _fan(shape, layout, mode))
    return _fill("fill_normal", shape, 0.0, std, seed, stream, dtype, out, xp)


def xavier_uniform(
    shape: Any,
    *,
    seed: int,
    stream: int = 0,
    mode: str = "fan_avg",
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills uniformly on ±sqrt(6 / (fan_in + fan_out)), the variance of `xavier_normal`, whose arguments these are.

    References:
        Glorot, Bengio 2010, equation 16.
    """
    bound = math.sqrt(3.0 / _fan(shape, layout, mode))
    return _symmetric(bound, shape, seed, stream, dtype, out, xp)


def lecun_normal(
    shape: Any,
    *,
    seed: int,
    stream: int = 0,
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills with normals of variance 1 / fan_in; the arguments are those of `he_normal`.

    References:
        LeCun, Bottou, Orr, Müller 1998, "Efficient BackProp", section 4.6.
    """
    std = math.sqrt(1.0 / _fan(shape, layout, "fan_in"))
    return _fill("fill_normal", shape, 0.0, std, seed, stream, dtype, out, xp)


def lecun_uniform(
    shape: Any,
    *,
    seed: int,
    stream: int = 0,
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills uniformly on ±sqrt(3 / fan_in), the variance of `lecun_normal`; the arguments are those of `he_normal`."""
    bound = math.sqrt(3.0 / _fan(shape, layout, "fan_in"))
    return _symmetric(bound, shape, seed, stream, dtype, out, xp)


def torch_default(
    shape: Any,
    *,
    seed: int,
    stream: int = 0,
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills uniformly on ±1 / sqrt(fan_in), variance 1 / (3 fan_in): what PyTorch's Linear and Conv2d start from.

    The arguments are those of `he_normal`. It equals `he_uniform` with "leaky_relu" and a = sqrt(5).
    """
    bound = math.sqrt(1.0 / _fan(shape, layout, "fan_in"))
    return _symmetric(bound, shape, seed, stream, dtype, out, xp)


def _shape(shape: Any) -> tuple[int, ...]:
    try:
        axes = tuple(shape) if not isinstance(shape, (int, np.integer)) else (shape,)
        if all(isinstance(n, (int, np.integer)) and n >= 0 for n in axes):
            return tuple(int(n) for n in axes)
    except TypeError:
        pass
    return fail("shape", "a tuple of whole numbers of at least 0", repr(shape))


def _fan(shape: Any, layout: str, mode: str) -> float:
    fan_in, fan_out = fans(shape, layout)
    modes = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    if not isinstance(mode, str) or mode not in modes:
        fail("mode", " or ".join(map(repr, modes)), repr(mode))
    return max(modes[mode], 1.0)


def _symmetric(bound: float, shape: Any, seed: int, stream: int, dtype: Any, out: Any, xp: Any) -> Any:
    return _fill("fill_uniform", shape, -bound, 2.0 * bound, seed, stream, dtype, out, xp)


def _fill(
    op: str, shape: Any, shift: float, scale: float, seed: int, stream: int, dtype: Any, out: Any, xp: Any
) -> Any:
    shape = _shape(shape)
    seed, stream = _check.seed_and_stream(seed, stream)
    if out is None:
        out = xp.empty(shape, _check.dtype_of("dtype", dtype))
    backend = backend_of(out, names=("out",))
    if out.shape != shape:
        fail("out", f"shape {shape}", f"shape {out.shape}")
    if out.dtype != (wanted := _check.dtype_of("dtype", dtype)):
        fail("out", f"dtype {wanted}", f"dtype {out.dtype}")
    if not _check.ready(out):
        fail("out", "a C-contiguous, aligned array of native byte order", f"strides {out.strides}")
    getattr(backend.ops, op)(out, seed, stream, backend.xp.array([shift, scale], "float64"))
    return out
