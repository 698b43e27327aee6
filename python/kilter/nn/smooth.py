"""Smooth activations: Tanh, Sigmoid, SiLU, GELU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import NUMPY, backend_of
from kilter._check import arithmetic, fail
from kilter.nn.linear import rounded
from kilter.nn.module import Array, Module, channels_last, expect, is_channels_last

HOST_BLOCK = 1 << 15  # values at a time: they stay in cache through all steps of a formula
FAR = 1000.0  # beyond it every formula here has its limit

# Φ(-u) exp(u²/2), Φ the normal distribution, as t times a polynomial in t = 1 / (1 + u / 5), highest power first:
# interpolated at Chebyshev points, by size of a number. Relative error 1.3e-8 up to u = 14, 7e-17 up to u = 40.
# fmt: off
TAIL = {
    4: (14.0, (
        -0.03920914619, 0.124195809, -0.06753135412, 0.04612245139, 0.09783985164, 0.01693622048, 0.0897228195,
        0.07172636266, 0.08044592178, 0.07975106104,
    )),
    8: (40.0, (
        -0.00092534151243971999, 0.0113044064061173664, -0.0633496340755868491, 0.215211629638215734,
        -0.494599726714089553, 0.816484776988555415, -1.01082314053461194, 0.97336232545337241, -0.745498205939081085,
        0.455871176734428603, -0.229864613481713444, 0.0944343506155869189, -0.0238981045244418951,
        0.0233990914604229087, 0.0238369213157184727, 0.0378942440189572105, 0.0497459227723277463,
        0.061026564396091614, 0.0702135101232441839, 0.0765969352536948436, 0.0797884555165006561,
        0.0797884560887304075,
    )),
}
# fmt: on


class _Smooth(Module):
    """A formula of each value by itself, in float32 for 16-bit data."""

    def value(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """Fill y; `spare` are three rows of memory."""
        raise NotImplementedError(f"{type(self).__name__}.value")

    def slope(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """Fill y with the derivative."""
        raise NotImplementedError(f"{type(self).__name__}.slope")

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        self._cache = _check.array("x", x)
        return self._by_block(self.value, x, self.buffer("y", x), None)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dy times the derivative, which is computed again from x."""
        if not need_dx:
            return None
        x = self.cache()
        expect(dy, x.shape, x.dtype, "dy")
        return self._by_block(self.slope, x, self.buffer("dx", x), dy)

    def _by_block(self, formula: Callable[..., None], x: Array, out: Array, factor: Array | None) -> Array:
        backend = backend_of(x, factor, names=("x", "dy"))
        xp, real, last = backend.xp, arithmetic("x", x.dtype), is_channels_last(x)

        def flat(array: Array) -> Array:
            return xp.ascontiguousarray(channels_last(array) if last else array).reshape(-1)

        given, target, upstream = flat(x), flat(out), None if factor is None else flat(factor)
        block = max(1, min(HOST_BLOCK, x.size) if backend is NUMPY else x.size)
        spare = self.buffer("spare", x, (5, block), real)
        for a in range(0, x.size, block):
            here = slice(a, a + block)
            rows = spare[:, : len(given[here])]
            wide, result = given[here], target[here]
            if x.dtype != real:
                wide, result = rows[3], rows[4]
                xp.copyto(wide, given[here])
            formula(xp, wide, result, rows)
            if upstream is not None:
                xp.multiply(result, upstream[here].astype(real, copy=False), out=result)
            if x.dtype != real:
                rounded(result, target[here])
        return out


class Tanh(_Smooth):
    """y = tanh(x)."""

    def value(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """tanh(x)."""
        xp.tanh(x, out=y)

    def slope(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """1 - tanh(x)²."""
        xp.tanh(x, out=y)
        xp.multiply(y, y, out=y)
        xp.subtract(1, y, out=y)


class Sigmoid(_Smooth):
    """y = 1 / (1 + exp(-x))."""

    def value(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """The sigmoid of x."""
        xp.negative(x, out=y)
        with np.errstate(over="ignore"):  # 1 / inf is right
            xp.exp(y, out=y)
        xp.add(y, 1, out=y)
        xp.reciprocal(y, out=y)

    def slope(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """s (1 - s)."""
        Sigmoid.value(self, xp, x, y, spare)
        xp.subtract(1, y, out=spare[0])
        xp.multiply(y, spare[0], out=y)


class SiLU(Sigmoid):
    """y = x / (1 + exp(-x)), also called swish.

    References
    ----------
    Elfwing, Uchibe, Doya, 2017, arXiv:1702.03118.
    """

    def value(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """The product of x and its sigmoid."""
        super().value(xp, x, y, spare)
        xp.multiply(y, xp.maximum(x, -FAR, out=spare[0]), out=y)

    def slope(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """s (1 + x (1 - s))."""
        super().value(xp, x, y, spare)
        near, rest = spare[:2]
        xp.clip(x, -FAR, FAR, out=near)
        xp.subtract(1, y, out=rest)
        xp.multiply(rest, near, out=rest)
        xp.add(rest, 1, out=rest)
        xp.multiply(y, rest, out=y)


class GELU(_Smooth):
    """y = x Φ(x), Φ the normal distribution; or its approximation x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2.

    Parameters
    ----------
    approximate
        "none" or "tanh".

    Notes
    -----
    "none" is max(x, 0) - abs(x) Φ(-abs(x)), where Φ(-u) is exp(-u²/2) times a polynomial: the relative error of y is
    at most 1e-6 in float32 and 1e-14 in float64 for x > -5, and grows like x² below, where y is small; the absolute
    error is at most 3e-7 and 2e-15 for abs(x) < 9. The derivative is as accurate as that.

    References
    ----------
    Hendrycks, Gimpel, 2016, arXiv:1606.08415.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            fail("approximate", "'none' or 'tanh'", repr(approximate))
        self.approximate = approximate

    def value(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """The product of x and the share of the normal distribution below it."""
        if self.approximate == "tanh":
            share, near, _ = self._share(xp, x, spare)
            xp.multiply(share, xp.maximum(x, -FAR, out=near), out=y)
            return
        u, t, _ = _tail(xp, x, y, spare)
        xp.multiply(y, u, out=y)
        xp.maximum(x, 0, out=t)
        xp.subtract(t, y, out=y)

    def slope(self, xp: Any, x: Array, y: Array, spare: Array) -> None:
        """Φ(x) + x Φ'(x)."""
        if self.approximate == "tanh":
            share, near, rest = self._share(xp, x, spare)
            xp.subtract(1, share, out=rest)
            xp.multiply(rest, share, out=rest)  # (1 - tanh²) / 4
            xp.multiply(near, near, out=y)
            xp.multiply(y, 6 * 0.044715 * math.sqrt(2 / math.pi), out=y)
            xp.add(y, 2 * math.sqrt(2 / math.pi), out=y)
            xp.multiply(y, near, out=y)
            xp.multiply(y, rest, out=y)
            xp.add(y, share, out=y)
            return
        u, _, e = _tail(xp, x, y, spare)
        xp.multiply(e, 1 / math.sqrt(2 * math.pi), out=e)
        xp.multiply(e, u, out=e)
        xp.subtract(e, y, out=y)
        xp.add(y, 0.5, out=y)
        xp.copysign(y, x, out=y)  # what the slope has above or below 1/2 is odd in x
        xp.add(y, 0.5, out=y)

    def _share(self, xp: Any, x: Array, spare: Array) -> Array:
        """(1 + tanh(...)) / 2, x where it is not far from 0, and a spare row."""
        share, near, _ = spare[:3]
        xp.clip(x, -20, 20, out=near)
        xp.multiply(near, near, out=share)
        xp.multiply(share, 0.044715, out=share)
        xp.add(share, 1, out=share)
        xp.multiply(share, near, out=share)
        xp.multiply(share, math.sqrt(2 / math.pi), out=share)
        xp.tanh(share, out=share)
        xp.add(share, 1, out=share)
        xp.multiply(share, 0.5, out=share)
        return spare[:3]


def _tail(xp: Any, x: Array, p: Array, spare: Array) -> Array:
    """Fill p with Φ(-u); returns u = abs(x) as far as the tail is not 0, a spare row, and exp(-u²/2)."""
    u, t, e = spare[:3]
    top, (first, second, *others) = TAIL[x.dtype.itemsize]
    xp.absolute(x, out=u)
    xp.minimum(u, top, out=u)
    xp.multiply(u, 0.2, out=t)
    xp.add(t, 1, out=t)
    xp.reciprocal(t, out=t)
    xp.multiply(u, u, out=e)
    xp.multiply(e, -0.5, out=e)
    xp.exp(e, out=e)
    xp.multiply(t, first, out=p)
    xp.add(p, second, out=p)
    for c in others:
        xp.multiply(p, t, out=p)
        xp.add(p, c, out=p)
    xp.multiply(p, t, out=p)
    xp.multiply(p, e, out=p)
    return spare[:3]
