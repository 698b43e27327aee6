"""Clipping of gradients outside an optimizer's step."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import Backend
from kilter.optim import structure

__all__ = ["clip_grad_norm", "clip_grad_value"]


def clip_grad_norm(grads: Any, max_norm: float) -> float:
    """Scales all gradients together, in place, to at most a Euclidean norm: g <- g min(1, max_norm / (norm + 1e-6)).

    Args:
        grads: a list, a dict name -> array, or a list of groups of these; float64, float32, float16 or bfloat16.
        max_norm: above 0; math.inf measures without clipping.

    Returns:
        The norm before clipping; the squares are summed in float64.

    Raises:
        KilterError: an argument does not fit; the message names the gradient, and nothing has changed.

    Notes:
        If a gradient is not finite, the norm returned is not finite either, and the gradients are left as they are.
        16-bit gradients are scaled in float32 and rounded once. `clip_norm` of an optimizer does the same within its
        step, without the second pass over memory, and on a GPU without waiting for the norm.

    References:
        Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063, algorithm 1.
    """
    max_norm = _check.number("max_norm", max_norm, 0.0, math.inf, open_low=True)
    arrays = structure.named("grads", grads)
    structure.check_writable("grads", arrays)
    backend = structure.backend("grads", arrays)
    norm = _norm(backend, arrays)
    if not math.isfinite(norm) or norm + 1e-6 <= max_norm:
        return norm
    _limit(backend, arrays, max_norm / (norm + 1e-6), sys.float_info.max)
    return norm


def clip_grad_value(grads: Any, max_value: float) -> None:
    """Limits every element of every gradient, in place: g <- min(max(g, -max_value), max_value); NaN stays NaN.

    Args:
        grads: a list, a dict name -> array, or a list of groups of these; float64, float32, float16 or bfloat16.
        max_value: above 0.

    Raises:
        KilterError: an argument does not fit; the message names the gradient, and nothing has changed.
    """
    max_value = _check.number("max_value", max_value, 0.0, sys.float_info.max, open_low=True)
    arrays = structure.named("grads", grads)
    structure.check_writable("grads", arrays)
    _limit(structure.backend("grads", arrays), arrays, 1.0, max_value)


def _limit(backend: Backend, arrays: dict[str, Any], scale: float, most: float) -> None:
    """Scales arrays, or limits their elements, where they lie; on a device by one launch for all."""
    xp, ops = backend
    if hasattr(ops, "clip"):
        dense = {name: _check.contiguous(xp, g) for name, g in arrays.items()}
        ops.clip(list(dense), list(dense.values()), np.array([scale, most]))
        for name, g in arrays.items():
            if dense[name] is not g:
                g[...] = dense[name]
        return
    for g in arrays.values():
        real = _check.arithmetic("grads", g.dtype)
        if scale != 1.0:
            xp.multiply(g, real.type(scale), out=g, casting="unsafe")
        else:
            limit = real.type(min(most, float(xp.finfo(real).max)))
            xp.clip(g, -limit, limit, out=g, casting="unsafe")


def _norm(backend: Backend, arrays: dict[str, Any]) -> float:
    """Returns the norm of all arrays together; of finite ones it is finite, as far as float64 can say it."""
    xp, ops = backend
    found = xp.empty(2)
    ops.grad_scan(list(arrays), [_check.contiguous(xp, g) for g in arrays.values()], found)
    squares, finite = float(found[0]), found[1] == 1.0
    if squares != math.inf or not finite:
        return math.sqrt(squares)
    top = max(float(xp.abs(g).max()) for g in arrays.values() if g.size)  # float64 whose squares leave float64's range
    return top * math.sqrt(sum(float(xp.square(g / top).sum()) for g in arrays.values()))
