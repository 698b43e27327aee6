"""Orthogonal weights."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import beside
from kilter.init.fills import destination, fill
from kilter.init.scale import fans


def orthogonal(
    shape: Any,
    *,
    gain: float = 1.0,
    seed: int,
    stream: int = 0,
    layout: str = "io",
    dtype: Any = "float32",
    out: Any = None,
    xp: Any = np,
) -> Any:
    """Fills with gain times a matrix whose rows or columns, whichever are fewer, are orthonormal.

    As a matrix, weights have an axis of outputs and one of all that feeds an output, channels and window together. It
    is the Q of A = Q R, where the diagonal of R is positive and A holds normals: every orthogonal matrix is equally
    likely. All is computed in float64 and rounded once.

    Args:
        shape: the shape of the weights.
        gain: of at least 0; for instance `gain("relu")`.
        seed: 64 bits.
        stream: 32 bits; give each layer its own.
        layout: the order of the axes; see `fans`.
        dtype: float64, float32, float16 or bfloat16.
        out: filled and returned instead of a new array; C-contiguous, of `shape` and `dtype`.
        xp: the array module of a new array.

    Returns:
        The filled array: `out`, or a new one.

    Raises:
        KilterError: an argument does not fit.

    References:
        Saxe, McClelland, Ganguli 2013, arXiv:1312.6120.
        Mezzadri 2007, "How to generate random matrices from the classical compact groups" (the sign of R).
    """
    fans(shape, layout)
    gain = _check.number("gain", gain, 0.0, sys.float_info.max)
    seed, stream = _check.seed_and_stream(seed, stream)
    out, (xp, _) = destination(shape, dtype, out, xp)
    if not out.size:
        return out
    outs = out.shape[0 if layout[0] == "o" else -1]
    short, long = sorted((outs, out.size // outs))
    with beside(out):
        q, r = xp.linalg.qr(fill("fill_normal", (long, short), 0.0, 1.0, seed, stream, "float64", None, xp))
        q *= xp.where(xp.diagonal(r) < 0, -gain, gain)
        rows = outs if layout[0] == "o" else out.size // outs
        out[...] = (q if rows == long else q.T).reshape(out.shape)
    return out
