"""Convolution layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter import init as _init
from kilter._backend import backend_of
from kilter._check import arithmetic, dtype_of, fail
from kilter.nn.linear import drawn, rounded
from kilter.nn.module import Array, Module, channels_first, channels_last, expect
from kilter.nn.windows import PIXELS, Columns, Pair, Window, images_at_once, interior, window


class Conv2d(Module):
    """y[n, o, i, j] = b[o] + Σ W[o, c, u, v] x[n, c, i s + u - p, j s + v - p], where x is 0 outside the image.

    Parameters
    ----------
    in_channels, out_channels
        Sizes; `weight` is (out_channels, in_channels / groups, kernel height, kernel width).
    kernel, stride, padding
        Each a whole number, or two for height and width.
    groups
        Divides both channels; output channels of a group see the input channels of that group alone.
    bias
        Whether to add `bias` (out_channels,), zero at first. Leave it out before a BatchNorm.
    seed, stream
        Which random numbers fill the weight. Layers of one model need different pairs.
    init
        A function of `kilter.init`, with other options than its own by `functools.partial`.
    dtype
        Of the parameters, of x and of y: float64, float32, float16 or bfloat16. The 16-bit ones are widened
        to float32 for the products, and each result is rounded once.

    Notes
    -----
    y and dx lie in memory as (N, H, W, C), and x is read best so: a window is then `kernel height` runs of adjacent
    numbers, and the copies of a few images at a time, small enough for a cache, are rows of a matrix that multiplies
    the weights. With stride 1 the backward copies the windows of dy, which serve both dx and the weights' gradient.
    A kernel of 1 needs no copies.

    References
    ----------
    He, Zhang, Ren, Sun, 2015, arXiv:1502.01852 (the default weights). Chellapilla, Puri, Simard, 2006, "High
    performance convolutional neural networks for document processing" (windows as a matrix).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        groups: int = 1,
        bias: bool = True,
        seed: int,
        stream: int = 0,
        init: Callable[..., Array] = _init.he_normal,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__()
        for argument, size in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
            if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
                fail(argument, "a whole number of at least 1", repr(size))
        if in_channels % groups or out_channels % groups:
            fail("groups", f"a divisor of {in_channels} and {out_channels}", str(groups))
        self.window, self.groups = window(kernel, stride, padding), int(groups)
        found = dtype_of("dtype", dtype)
        shape = (int(out_channels), int(in_channels // groups), *self.window.kernel)
        self.random_key = ("init", seed, stream)
        self.add_param("weight", drawn(init, shape, "oihw", seed, stream, found))
        if bias:
            self.add_param("bias", np.zeros(shape[0], found))

    def forward(self, x: Array) -> Array:
        """y (N, out_channels, H', W') for x (N, in_channels, H, W), H' = (H + 2 padding - kernel) // stride + 1."""
        weight, bias = self.own_params["weight"], self.own_params.get("bias")
        outs, ins = weight.shape[:2]
        expect(x, ("N", ins * self.groups, "H", "W"), weight.dtype)
        xp, real = backend_of(x, weight, names=("x", "weight")).xp, arithmetic("x", x.dtype)
        columns = self._columns("x", channels_last(x), self.window)
        y = self.buffer("y", x, (len(x), *columns.places, outs))
        wide = y if y.dtype == real else self.buffer("y32", x, y.shape, real)
        matrices = self._matrices(xp, real)
        for a, b in columns:
            for group, out in enumerate(self._by_group(wide[a:b])):
                xp.matmul(columns.rows(group), matrices[group], out=out)
        if bias is not None:  # a row of the image at a time
            lines = wide.reshape(-1, y.shape[2] * outs)
            xp.add(lines, xp.tile(bias.astype(real), y.shape[2]), out=lines)
        self._cache = columns.x, y
        return channels_first(y if wide is y else rounded(wide, y))

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx; fills the gradients of weight and bias."""
        x, y = self.cache()
        expect(dy, channels_first(y).shape, y.dtype, "dy")
        xp, real = backend_of(x, dy, names=("x", "dy")).xp, arithmetic("x", x.dtype)
        upstream = channels_last(dy)
        if not self.frozen and "bias" in self.own_grads:
            self._backward_bias(xp, real, upstream)
        back = self.window.mirrored()
        together = need_dx and self.window.stride == (1, 1) and min(back.padding) >= 0
        if not self.frozen and not together:
            self._backward_weight(x, upstream, real)
        if not need_dx:
            return None
        dx = self.buffer("dx", x, x.shape)
        if together:
            wide = dx if dx.dtype == real else self.buffer("dx32", x, x.shape, real)
            self._backward_both(xp, real, x, self._columns("dy", upstream, back), wide)
        else:
            wide = self._spread(xp, real, x, upstream)
        return channels_first(dx if wide is dx else rounded(wide, dx))

    def _backward_bias(self, xp: Any, real: Any, dy: Array) -> None:
        line = dy.shape[2:]
        lines = xp.ascontiguousarray(dy).reshape(-1, math.prod(line))
        sums = lines.sum(axis=0, dtype=real).reshape(line)
        rounded(sums.sum(axis=0), self.own_grads["bias"])

    def _backward_both(self, xp: Any, real: Any, x: Array, columns: Columns, dx: Array) -> None:
        """With the windows of dy, dx is a convolution by the mirrored weights, and dweight a product with x."""
        _, ins, height, width = self.own_params["weight"].shape
        matrices = self._matrices(xp, real, mirrored=True)
        pixels = self._columns("pixels", x, PIXELS, columns.step)
        sums = Sums(self, x, (self.groups, ins, matrices.shape[1]), real)
        for a, b in columns:
            pixels.load(a, b)
            for group, out in enumerate(self._by_group(dx[a:b])):
                rows = columns.rows(group)
                xp.matmul(rows, matrices[group], out=out)
                if not self.frozen:
                    sums.add(group, pixels.rows(group).T, rows)
        if not self.frozen:
            taps = sums.total.reshape(self.groups, ins, height, width, -1)[:, :, ::-1, ::-1]
            self._keep_weight(taps.transpose(0, 4, 1, 2, 3))

    def _backward_weight(self, x: Array, dy: Array, real: Any) -> None:
        """The gradient of the weights: a product of the windows of x with dy."""
        outs, ins, height, width = self.own_params["weight"].shape
        columns = self._columns("x", x, self.window)
        pixels = self._columns("pixels", dy, PIXELS, columns.step)
        sums = Sums(self, x, (self.groups, height * width * ins, outs // self.groups), real)
        for a, b in columns:
            pixels.load(a, b)
            for group in range(self.groups):
                sums.add(group, columns.rows(group).T, pixels.rows(group))
        self._keep_weight(sums.total.reshape(self.groups, height, width, ins, -1).transpose(0, 4, 3, 1, 2))

    def _spread(self, xp: Any, real: Any, x: Array, dy: Array) -> Array:
        """dx for any stride: what the windows of x get from dy, added up."""
        _, ins, height, width = self.own_params["weight"].shape
        (down, right), (count, tall, wide, channels) = self.window.padding, x.shape
        dx = self.buffer("bordered dx", x, (count, tall + 2 * down, wide + 2 * right, channels), real)
        dx[...] = 0
        places = dy.shape[1:3]
        step = images_at_once(x, math.prod(places) * height * width * ins)
        matrices, pixels = self._matrices(xp, real), self._columns("pixels", dy, PIXELS, step)
        parts = self.buffer("parts", x, (pixels.step, *places, height, width, ins), real)
        for a, b in pixels:
            here = parts[: b - a]
            for group in range(self.groups):
                out = here.reshape(-1, height * width * ins)
                xp.matmul(pixels.rows(group), matrices[group].T, out=out)
                for i, j, seen in self.window.taps(dx[a:b, ..., group * ins : (group + 1) * ins]):
                    xp.add(seen, here[..., i, j, :], out=seen)
        return interior(dx, self.window.padding)

    def _columns(self, slot: str, x: Array, look: Window, step: int = 0) -> Columns:
        """The windows of x, all groups, of `step` images at a time or of as many as fit."""
        height, width = look.places(*x.shape[1:3])
        values = height * width * math.prod(look.kernel) * x.shape[3] // self.groups
        real = arithmetic("x", x.dtype)
        return Columns(self, slot, x, look, real, self.groups, step or images_at_once(x, values))

    def _matrices(self, xp: Any, real: Any, *, mirrored: bool = False) -> Array:
        """Per group what multiplies rows of windows of x, (values, outputs); mirrored, of windows of dy."""
        weight = self.own_params["weight"]
        taps = weight.reshape(self.groups, -1, *weight.shape[1:])
        order = (0, 3, 4, 1, 2) if mirrored else (0, 3, 4, 2, 1)
        taps = (taps[..., ::-1, ::-1] if mirrored else taps).transpose(order)
        matrices = self.buffer("mirrored" if mirrored else "matrices", weight, taps.shape, real)
        xp.copyto(matrices, taps)
        return matrices.reshape(self.groups, -1, taps.shape[-1])

    def _by_group(self, images: Array) -> list[Array]:
        """Images (N, H, W, C) as one matrix of pixels per group."""
        pixels = images.reshape(-1, images.shape[3])
        width = images.shape[3] // self.groups
        return [pixels[:, group * width : (group + 1) * width] for group in range(self.groups)]

    def _keep_weight(self, by_group: Array) -> None:
        grad = self.own_grads["weight"]
        rounded(by_group, grad.reshape(self.groups, -1, *grad.shape[1:]))


class Sums:
    """Sums of matrix products, one for each group, in buffers of a module."""

    def __init__(self, module: Module, like: Array, shape: tuple[int, int, int], real: Any) -> None:
        self.xp = backend_of(like).xp
        self.total = module.buffer("sums", like, shape, real)
        self.part = module.buffer("part", like, shape[1:], real)
        self.begun = [False] * shape[0]
        if not len(like):
            self.total[...] = 0

    def add(self, group: int, one: Array, other: Array) -> None:
        """Add one @ other to the sum of a group."""
        if self.begun[group]:
            self.total[group] += self.xp.matmul(one, other, out=self.part)
        else:
            self.xp.matmul(one, other, out=self.total[group])
            self.begun[group] = True
