"""Plain fills: uniform, normal and truncated normal variates."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import Backend, backend_of, beside
from kilter._check import fail

_MOST = sys.float_info.max
CUT = 2.0  # where the truncated normal ends
CUT_STD = 0.87962566103423978  # its standard deviation there: sqrt(1 - 2 CUT pdf(CUT) / (cdf(CUT) - cdf(-CUT)))


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
    return fill("fill_uniform", shape, low, high - low, seed, stream, dtype, out, xp)


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
    return fill("fill_normal", shape, mean, std, seed, stream, dtype, out, xp)


def truncated_normal(
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
    """Fills with mean + std z / 0.8796, z standard normal with abs(z) < 2; the other arguments are those of `uniform`.

    The divisor is the standard deviation of such a z: `std` is that of the result, which lies within 2.2737 std of
    the mean. An element takes the first of its variates, attempt 0, 1, ... of the random words, that lies inside;
    where attempt 0 does, it is the variate of `normal`.

    Raises:
        KilterError: an argument does not fit.

    Examples:
        >>> truncated_normal((784, 512), std=gain("relu") / math.sqrt(784), seed=0)
    """
    mean, std = _check.number("mean", mean, -_MOST, _MOST), _check.number("std", std, 0.0, _MOST)
    seed, stream = _check.seed_and_stream(seed, stream)
    out, (xp, ops) = destination(shape, dtype, out, xp)
    unit = np.array([0.0, 1.0])
    with beside(out):
        again = xp.empty(out.shape, np.float32)
        z = out if out.dtype == again.dtype else xp.empty_like(again)
    ops.fill_normal(z, seed, stream, unit)
    attempt = 0
    while bool((outside := abs(z) >= CUT).any()):
        attempt += 1
        ops.fill_normal(again, seed, stream, unit, attempt)
        xp.copyto(z, again, where=outside)
    real = _check.arithmetic("dtype", out.dtype).type
    z = z.astype(real, copy=False)
    z *= real(std / CUT_STD)
    z += real(mean)
    if z is not out:
        out[...] = z
    return out


def shape_of(shape: Any) -> tuple[int, ...]:
    """Returns `shape` as a tuple of ints."""
    try:
        axes = tuple(shape) if not isinstance(shape, (int, np.integer)) else (shape,)
        if all(isinstance(n, (int, np.integer)) and n >= 0 for n in axes):
            return tuple(int(n) for n in axes)
    except TypeError:
        pass
    return fail("shape", "a tuple of whole numbers of at least 0", repr(shape))


def destination(shape: Any, dtype: Any, out: Any, xp: Any) -> tuple[Any, Backend]:
    """Returns the array to fill, `out` or a new one, and its backend."""
    shape, wanted = shape_of(shape), _check.dtype_of("dtype", dtype)
    if out is None:
        out = xp.empty(shape, wanted)
    backend = backend_of(out, names=("out",))
    if out.shape != shape:
        fail("out", f"shape {shape}", f"shape {out.shape}")
    if out.dtype != wanted:
        fail("out", f"dtype {wanted}", f"dtype {out.dtype}")
    if not _check.ready(out):
        fail("out", "a C-contiguous, aligned array of native byte order", f"strides {out.strides}")
    if not _check.writable(out):
        fail("out", "a writable array", "a read-only one")
    return out, backend


def fill(op: str, shape: Any, shift: float, scale: float, seed: int, stream: int, dtype: Any, out: Any, xp: Any) -> Any:
    """Fills by an operation with shift + scale * variate."""
    seed, stream = _check.seed_and_stream(seed, stream)
    out, backend = destination(shape, dtype, out, xp)
    getattr(backend.ops, op)(out, seed, stream, np.array([shift, scale]))
    return out
