"""Pooling layers: the largest or the mean value of windows of an image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kilter._backend import backend_of
from kilter._check import arithmetic, fail
from kilter.nn.linear import rounded
from kilter.nn.module import Array, Module, channels_first, channels_last, expect
from kilter.nn.windows import Pair, Window, interior, window


class _Pool2d(Module):
    """What both pools share: one pass along the columns of the image, then one along the rows of its result.

    Arrays inside are views (N, H, W, C), in x's order in memory, in the dtype of the arithmetic.
    """

    border = 0.0

    def __init__(self, kernel: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        super().__init__()
        self.window = window(kernel, kernel if stride is None else stride, padding)
        (height, width), (down, right), edges = self.window
        if 2 * edges[0] > height or 2 * edges[1] > width:
            fail("padding", f"at most half the kernel {(height, width)}", str(edges))
        self.down = Window((height, 1), (down, 1), (0, 0))
        self.right = Window((1, width), (1, right), (0, 0))

    def gather(self, slot: str, look: Window, x: Array, y: Array) -> None:
        """Fill y with what the windows of x give."""
        raise NotImplementedError(f"{type(self).__name__}.gather")

    def spread(self, slot: str, look: Window, x: Array, y: Array, dy: Array, dx: Array) -> None:
        """Fill dx, or add to its zeros where a pixel has not exactly one window."""
        raise NotImplementedError(f"{type(self).__name__}.spread")

    def forward(self, x: Array) -> Array:
        """y (N, C, H', W') of x's dtype, H' = (H + 2 padding - kernel) // stride + 1."""
        expect(x, ("N", "C", "H", "W"), None)
        height, width = self.window.places(*x.shape[2:])
        image = self._bordered(x)
        between = self._image("between", x, (height, image.shape[2]))
        y = self._image("y", x, (height, width))
        self.gather("down", self.down, image, between)
        self.gather("right", self.right, between, y)
        self._cache = x, image, between, y
        y = channels_first(y)
        return y if y.dtype == x.dtype else rounded(y, self.buffer_like("y16", x, y.shape, x.dtype))

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx, of x's shape and dtype."""
        if not need_dx:
            return None
        x, image, between, y = self.cache()
        expect(dy, channels_first(y).shape, x.dtype, "dy")
        backend_of(x, dy, names=("x", "dy"))
        middle = self._image("dbetween", x, between.shape[1:3])
        dx = self._image("dx", x, image.shape[1:3])
        for target, look in ((middle, self.right), (dx, self.down)):
            if not _tiles(look, target):
                target[...] = 0
        self.spread("right", self.right, between, y, channels_last(dy), middle)
        self.spread("down", self.down, image, between, middle, dx)
        dx = interior(dx, self.window.padding)
        if dx.shape == image.shape and dx.dtype == x.dtype:
            return channels_first(dx)
        return channels_first(rounded(dx, channels_last(self.buffer("dx inside", x))))

    def _bordered(self, x: Array) -> Array:
        (down, right), (height, width) = self.window.padding, x.shape[2:]
        if (down, right) == (0, 0) and x.dtype == arithmetic("x", x.dtype):
            return channels_last(x)
        image = self._image("image", x, (height + 2 * down, width + 2 * right))
        for edge in (image[:, :down], image[:, down + height :]):
            edge[...] = self.border
        for edge in (image[:, :, :right], image[:, :, right + width :]):
            edge[...] = self.border
        interior(image, self.window.padding)[...] = channels_last(x)
        return image

    def _image(self, slot: str, x: Array, size: Pair) -> Array:
        return channels_last(self.buffer_like(slot, x, (*x.shape[:2], *size), arithmetic("x", x.dtype)))


class MaxPool2d(_Pool2d):
    """y[n, c, i, j] = the largest x[n, c, i s + u - p, j s + v - p] of all u, v in the kernel; NaN where there is one.

    Parameters
    ----------
    kernel, stride, padding
        Each a whole number, or two for height and width. The stride is the kernel unless given; the padding, at most
        half the kernel, never wins.

    Notes
    -----
    The gradient goes to one of equal values: in the first column that has one, the first.
    """

    border = -math.inf

    def gather(self, slot: str, look: Window, x: Array, y: Array) -> None:
        """Fill y with the largest values."""
        xp, first = backend_of(x).xp, True
        for *_, seen in look.taps(x):
            if first:
                xp.copyto(y, seen)
            else:
                xp.maximum(y, seen, out=y)
            first = False

    def spread(self, slot: str, look: Window, x: Array, y: Array, dy: Array, dx: Array) -> None:
        """Give dy to the first of the largest values."""
        xp, tiles, last = backend_of(x).xp, _tiles(look, dx), math.prod(look.kernel) - 1
        like = channels_first(y)
        hit, free = (
            channels_last(self.buffer(f"{kind} {slot}", like, dtype=np.dtype(bool))) for kind in ("hit", "free")
        )
        part = None if tiles else channels_last(self.buffer(f"part {slot}", like))
        free[...] = True  # the windows whose largest value has not been met yet
        for k, ((*_, seen), (*_, target)) in enumerate(zip(look.taps(x), look.taps(dx), strict=True)):
            if k < last:
                xp.logical_and(xp.equal(seen, y, out=hit), free, out=hit)
                xp.logical_xor(free, hit, out=free)
            else:
                hit = free
            if part is None:
                xp.multiply(dy, hit, out=target)
            else:
                xp.add(target, xp.multiply(dy, hit, out=part), out=target)


class AvgPool2d(_Pool2d):
    """y[n, c, i, j] = the mean of x[n, c, i s + u - p, j s + v - p] over all u, v in the kernel; x is 0 outside.

    Parameters
    ----------
    kernel, stride, padding
        Each a whole number, or two for height and width. The stride is the kernel unless given; the padding is at most
        half the kernel, and its zeros count.
    """

    def gather(self, slot: str, look: Window, x: Array, y: Array) -> None:
        """Fill y with the means."""
        xp, first = backend_of(x).xp, True
        for *_, seen in look.taps(x):
            if first:
                xp.copyto(y, seen)
            else:
                xp.add(y, seen, out=y)
            first = False
        xp.multiply(y, y.dtype.type(1 / math.prod(look.kernel)), out=y)

    def spread(self, slot: str, look: Window, x: Array, y: Array, dy: Array, dx: Array) -> None:
        """Give every value its share of dy."""
        xp, tiles = backend_of(x).xp, _tiles(look, dx)
        share = channels_last(self.buffer(f"share {slot}", channels_first(y)))
        xp.multiply(dy, y.dtype.type(1 / math.prod(look.kernel)), out=share)
        for *_, target in look.taps(dx):
            if tiles:
                xp.copyto(target, share)
            else:
                xp.add(target, share, out=target)


def _tiles(look: Window, x: Array) -> bool:
    """Whether every pixel of x lies in exactly one window."""
    return look.stride == look.kernel and not any(n % k for n, k in zip(x.shape[1:3], look.kernel, strict=True))


class GlobalAvgPool2d(Module):
    """y[n, c] = the mean of x[n, c] over all positions.

    References
    ----------
    Lin, Chen, Yan, 2013, arXiv:1312.4400, section 3.2.
    """

    def forward(self, x: Array) -> Array:
        """y (N, C) for x (N, C, H, W), of x's dtype."""
        expect(x, ("N", "C", "H", "W"), None)
        real = arithmetic("x", x.dtype)
        if not x.shape[2] * x.shape[3]:
            fail("x", "at least one position", f"shape {x.shape}")
        self._cache = x
        y = self.buffer("y", x, x.shape[:2])
        return rounded(x.mean(axis=(2, 3), dtype=real), y)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx: the share of dy that each position has."""
        if not need_dx:
            return None
        x = self.cache()
        expect(dy, x.shape[:2], x.dtype, "dy")
        real = arithmetic("dy", dy.dtype)
        share = dy.astype(real) * real.type(1 / (x.shape[2] * x.shape[3]))
        dx = self.buffer("dx", x)
        rounded(share[:, np.newaxis, np.newaxis], channels_last(dx))
        return dx
