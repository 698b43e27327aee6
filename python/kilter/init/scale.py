"""What decides the scale of initial weights: fans, and gains of nonlinearities."""

from __future__ import annotations

import math
from typing import Any

from kilter import _check
from kilter._check import fail
from kilter.init.fills import shape_of

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
    shape = shape_of(shape)
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


def fan(shape: Any, layout: str, mode: str) -> float:
    """Returns the fan that a mode names, at least 1."""
    fan_in, fan_out = fans(shape, layout)
    modes = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    if not isinstance(mode, str) or mode not in modes:
        fail("mode", " or ".join(map(repr, modes)), repr(mode))
    return max(modes[mode], 1.0)
