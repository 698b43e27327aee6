"""The windows that convolutions and pools look through."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter._backend import NUMPY, backend_of
from kilter._check import fail
from kilter.nn.module import Array, Module

HOST_BYTES = 1 << 21  # of columns at a time, which caches then hold
DEVICE_BYTES = 1 << 28  # a device wants few and large products

Pair = tuple[int, int]


class Window(NamedTuple):
    """Height and width of a window, of its steps, and of the border around the image."""

    kernel: Pair
    stride: Pair
    padding: Pair

    def places(self, height: int, width: int) -> Pair:
        """How many windows an image has in each direction."""
        sizes = height + 2 * self.padding[0], width + 2 * self.padding[1]
        if sizes[0] < self.kernel[0] or sizes[1] < self.kernel[1]:
            fail("x", f"images of at least the kernel's size {self.kernel}", f"{sizes} with the border")
        down, right = ((n - k) // s + 1 for n, k, s in zip(sizes, self.kernel, self.stride, strict=True))
        return down, right

    def mirrored(self) -> Window:
        """The window that leads from the gradient of the outputs back to the image; for stride 1."""
        (height, width), (down, right) = self.kernel, self.padding
        return Window(self.kernel, (1, 1), (height - 1 - down, width - 1 - right))

    def taps(self, x: Array) -> Iterator[tuple[int, int, Array]]:
        """For each row and column of the window, what all windows see there of images (N, H, W, C) and border."""
        (tall, wide), (down, right) = x.shape[1:3], self.stride
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                last = tall - self.kernel[0] + i + 1, wide - self.kernel[1] + j + 1
                yield i, j, x[:, i : last[0] : down, j : last[1] : right]


PIXELS = Window((1, 1), (1, 1), (0, 0))


def window(kernel: Any, stride: Any, padding: Any) -> Window:
    """The window of these arguments: each a whole number, or two for height and width."""
    return Window(pair("kernel", kernel, 1), pair("stride", stride, 1), pair("padding", padding, 0))


def pair(argument: str, value: Any, least: int) -> Pair:
    """A whole number twice, or two of them."""
    two = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    whole = [isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= least for n in two]
    if len(two) != 2 or not all(whole):
        fail(argument, f"a whole number of at least {least}, or two", repr(value))
    return int(two[0]), int(two[1])


class Columns:
    """The windows of images (N, H, W, C) as the rows of a matrix, a few images at a time, in buffers of a module.

    A row has kernel height * kernel width * channels of one group values, in this order. Where an image has few
    channels, the rows lie in memory as columns, so that copies run along the rows of the image.

    Parameters
    ----------
    module, slot
        Whose buffers, and what they are called.
    x
        The images, of any order in memory; (N, H, W, C) needs the fewest copies.
    look
        The window; of `PIXELS` the rows are the pixels themselves.
    real
        The dtype of the rows.
    groups
        Into how many the channels are divided.
    step
        How many images at a time, at most; see `images_at_once`.
    """

    def __init__(self, module: Module, slot: str, x: Array, look: Window, real: Any, groups: int, step: int) -> None:
        self.xp, self.x, self.look = backend_of(x).xp, x, look
        self.step, self.places = max(1, min(step, len(x))), look.places(*x.shape[1:3])
        self.channels = x.shape[3] // groups
        self.pixels = look == PIXELS
        planar = not self.pixels and look.kernel[1] * self.channels < self.places[1] // 2
        self.bordered: Array | None = None
        if look.padding != (0, 0) or x.dtype != real or (self.pixels and not x.flags.c_contiguous):
            self.bordered = self._border(module, f"{slot} bordered", real, planar)
        if self.pixels:
            return
        shape = (self.step, *self.places, *look.kernel, self.channels)
        count, width = math.prod(shape[:3]), math.prod(shape[3:])
        flat = module.buffer(f"{slot} columns", x, (count * width,), real)
        if planar:
            self.matrix = flat.reshape(width, count).T
            self.columns = flat.reshape(*shape[3:], *shape[:3]).transpose(3, 4, 5, 0, 1, 2)
        else:
            self.matrix = flat.reshape(count, width)
            self.columns = flat.reshape(shape)
        self.windows = windows(self.xp, x if self.bordered is None else self.bordered, look)

    def _border(self, module: Module, slot: str, real: Any, planar: bool) -> Array:
        (down, right), (_, height, width, channels) = self.look.padding, self.x.shape
        sizes = height + 2 * down, width + 2 * right
        shape = (self.step, channels, *sizes) if planar else (self.step, *sizes, channels)
        bordered = module.buffer(slot, self.x, shape, real)
        bordered = bordered.transpose(0, 2, 3, 1) if planar else bordered
        for edge in (bordered[:, :down], bordered[:, down + height :]):
            edge[...] = 0
        for edge in (bordered[:, :, :right], bordered[:, :, right + width :]):
            edge[...] = 0
        return bordered

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Load some images after the others: from image a to the one before b."""
        for a in range(0, len(self.x), self.step):
            b = min(a + self.step, len(self.x))
            self.load(a, b)
            yield a, b

    def load(self, a: int, b: int) -> None:
        """Make images a to b those of `rows`."""
        self.here = slice(a, b) if self.bordered is None else slice(0, b - a)
        if self.bordered is not None:
            interior(self.bordered[: b - a], self.look.padding)[...] = self.x[a:b]

    def rows(self, group: int) -> Array:
        """The matrix of the images that are loaded, for one group; valid until the next call."""
        chosen = slice(group * self.channels, (group + 1) * self.channels)
        if self.pixels:
            x = self.x if self.bordered is None else self.bordered
            return x[self.here].reshape(-1, x.shape[3])[:, chosen]
        seen = self.windows[self.here, ..., chosen]
        self.xp.copyto(self.columns[: len(seen)], seen)
        return self.matrix[: math.prod(seen.shape[:3])]


def images_at_once(x: Array, values: int) -> int:
    """How many images to take at a time when the columns of each have `values` values."""
    limit = HOST_BYTES if backend_of(x) is NUMPY else DEVICE_BYTES
    return max(1, limit // max(4 * values, 1))


def windows(xp: Any, x: Array, look: Window) -> Array:
    """View images (N, H, W, C), border included, as (N, places, kernel, C)."""
    seen = xp.lib.stride_tricks.sliding_window_view(x, look.kernel, axis=(1, 2))
    chosen: Array = seen[:, :: look.stride[0], :: look.stride[1]]
    return chosen.transpose(0, 1, 2, 4, 5, 3)


def interior(x: Array, padding: Pair) -> Array:
    """View images (N, H, W, C) without their border."""
    (down, right), (height, width) = padding, x.shape[1:3]
    return x[:, down : height - down, right : width - right]
