"""Augmentation of one image by itself: flip, crop and noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilter._backend import backend_of
from kilter._check import arithmetic, fail, number
from kilter.data import draws


def flip(
    x: Any,
    y: Any = None,
    *,
    p: float = 0.5,
    axis: int = -1,
    seed: int,
    epoch: int = 0,
    index: NDArray[np.int64] | None = None,
    stream: int = 0,
) -> tuple[Any, Any]:
    """Mirror each image with probability p.

    Parameters
    ----------
    x
        Images (N, H, W) or (N, C, H, W) of any dtype.
    y
        Handed through.
    p
        In [0, 1].
    axis
        -1: left and right change places; -2: top and bottom.
    seed, epoch
        0 <= seed < 2**64, 0 <= epoch < 2**30.
    index
        Which samples of the data set these are, (N,) integers on the host; None stands for 0..N-1. What happens to a
        sample is a pure function of (seed, epoch, index, stream).
    stream
        0 <= stream < 64. The same augmentation twice in a row needs two streams to be independent; `Batches` gives
        each of its transforms its own.

    Returns
    -------
    x, y
        A new array of x's shape and dtype, and y.

    Raises
    ------
    KilterError
        An argument is not as above.

    Examples
    --------
    >>> x, y = flip(x, y, seed=0)
    >>> Batches(x, y, 128, seed=0, transform=partial(flip, p=0.3))
    """
    xp = _images(x)
    p = number("p", p, 0.0, 1.0)
    if axis not in (-1, -2):
        fail("axis", "-1 or -2", repr(axis))
    words = draws.sample_words(draws.FLIP, len(x), seed, epoch, index, stream)
    rows = xp.asarray(np.flatnonzero(draws.unit(words[:, 0]) < p))
    out = x.copy()
    out[rows] = xp.flip(x.take(rows, axis=0), axis)
    return out, y


def crop(
    x: Any,
    y: Any = None,
    *,
    padding: int = 4,
    seed: int,
    epoch: int = 0,
    index: NDArray[np.int64] | None = None,
    stream: int = 0,
) -> tuple[Any, Any]:
    """Cut a window of the images' own size out of each image, after putting `padding` zeros around it.

    This moves the image by -padding..padding pixels along both axes, all moves equally likely. The other arguments,
    the result and the errors are those of `flip`.

    Parameters
    ----------
    padding
        0 <= padding <= H and W.

    References
    ----------
    He, Zhang, Ren, Sun, 2016, arXiv:1512.03385, section 4.2: padding 4 for 32 x 32 pixels.
    """
    xp = _images(x)
    height, width = x.shape[-2:]
    padding = draws.whole("padding", padding, 0, min(height, width) + 1)
    words = draws.sample_words(draws.CROP, len(x), seed, epoch, index, stream)
    moves = (draws.unit(words) * (2 * padding + 1)).astype(np.int64) - padding
    out = xp.zeros(x.shape, x.dtype)
    for image, source, (down, right) in zip(out, x, moves.tolist(), strict=True):
        to, of = zip(_overlap(down, height), _overlap(right, width), strict=True)
        image[..., to[0], to[1]] = source[..., of[0], of[1]]
    return out, y


def noise(
    x: Any,
    y: Any = None,
    *,
    std: float = 0.1,
    seed: int,
    epoch: int = 0,
    index: NDArray[np.int64] | None = None,
    stream: int = 0,
) -> tuple[Any, Any]:
    """Add normal noise: x + std z, z of its own for each number of each sample.

    The other arguments, the result and the errors are those of `flip`.

    Parameters
    ----------
    x
        Floating samples (N, ...). 16-bit ones are widened to float32 and rounded once.
    std
        At least 0.
    """
    xp, ops = backend_of(x, names=("x",))
    real = arithmetic("x", x.dtype)
    if not x.ndim:
        fail("x", "shape (N, ...)", "shape ()")
    std = number("std", std, 0.0)
    # Each sample's noise is a fill with a seed of the sample's own.
    words = draws.sample_words(draws.NOISE, len(x), seed, epoch, index, stream)
    out = xp.empty(x.shape, real)
    h = xp.asarray(np.array([0.0, std]))
    for row, own in zip(out.reshape(len(x), -1) if x.size else (), draws.keys(words).tolist(), strict=False):
        ops.fill_normal(row, own, 0, h)
    out += x.astype(real, copy=False)
    return out.astype(x.dtype, copy=False), y


def _images(x: Any) -> Any:
    """Return the array module of images."""
    xp = backend_of(x, names=("x",)).xp
    if x.ndim not in (3, 4):
        fail("x", "images (N, H, W) or (N, C, H, W)", f"shape {x.shape}")
    return xp


def _overlap(move: int, size: int) -> tuple[slice, slice]:
    """Return where an axis moved by -size..size lands, and what of it stays inside."""
    return slice(max(move, 0), size + min(move, 0)), slice(max(-move, 0), size - max(move, 0))
