"""The named schemes: fills whose variance follows from the shape of the weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kilter.init.fills import fill
from kilter.init.scale import fan, gain


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
    std = gain(nonlinearity, a) / math.sqrt(fan(shape, layout, mode))
    return fill("fill_normal", shape, 0.0, std, seed, stream, dtype, out, xp)


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
    bound = gain(nonlinearity, a) * math.sqrt(3.0 / fan(shape, layout, mode))
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
    std = math.sqrt(1.0 / fan(shape, layout, mode))
    return fill("fill_normal", shape, 0.0, std, seed, stream, dtype, out, xp)


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
    bound = math.sqrt(3.0 / fan(shape, layout, mode))
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
    std = math.sqrt(1.0 / fan(shape, layout, "fan_in"))
    return fill("fill_normal", shape, 0.0, std, seed, stream, dtype, out, xp)


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
    bound = math.sqrt(3.0 / fan(shape, layout, "fan_in"))
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
    bound = math.sqrt(1.0 / fan(shape, layout, "fan_in"))
    return _symmetric(bound, shape, seed, stream, dtype, out, xp)


def _symmetric(bound: float, shape: Any, seed: int, stream: int, dtype: Any, out: Any, xp: Any) -> Any:
    return fill("fill_uniform", shape, -bound, 2.0 * bound, seed, stream, dtype, out, xp)
