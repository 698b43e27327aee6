"""Augmentation that mixes the samples of a batch and their labels: mixup and cutmix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilter._backend import backend_of
from kilter._check import arithmetic, fail, number
from kilter.data import draws


def mixup(
    x: Any,
    y: Any,
    alpha: float = 0.2,
    *,
    classes: int | None = None,
    seed: int,
    epoch: int = 0,
    index: NDArray[np.int64] | None = None,
    stream: int = 0,
) -> tuple[Any, Any]:
    """Mix each sample, and its label with the same weight, with another sample of the batch.

    x_i <- lam_i x_i + (1 - lam_i) x_j and y_i <- lam_i y_i + (1 - lam_i) y_j, lam_i ~ Beta(alpha, alpha)

    The samples, in a random order, form a ring in which j follows i: each sample is mixed into exactly one other.

    Parameters
    ----------
    x
        Floating samples (N, ...). 16-bit ones are mixed in float32 and rounded once.
    y
        Integer labels (N,), which become rows of `classes` probabilities; or floating targets (N, ...), such as the
        rows that another mixing has made.
    alpha
        Above 0. Small values leave most samples almost as they are, 1 takes every weight alike.
    classes
        How many there are; needed with integer labels.
    seed, epoch
        0 <= seed < 2**64, 0 <= epoch < 2**30.
    index
        Which samples of the data set these are, (N,) integers on the host; None stands for 0..N-1. The weight of a
        sample and its place in the ring are a pure function of (seed, epoch, index, stream).
    stream
        0 <= stream < 64. The same augmentation twice in a row needs two streams to be independent; `Batches` gives
        each of its transforms its own.

    Returns
    -------
    x, y
        New arrays: x of its shape and dtype; y of its shape and dtype, or (N, classes) of the dtype of the arithmetic
        on x. Rows of probabilities still sum to 1.

    Raises
    ------
    KilterError
        An argument is not as above; a label lies outside [0, classes).

    Examples
    --------
    >>> x, y = mixup(x, y, 0.2, classes=10, seed=0)
    >>> Batches(x, y, 128, seed=0, transform=partial(mixup, alpha=0.2, classes=10))

    References
    ----------
    Zhang, Cisse, Dauphin, Lopez-Paz, 2017, arXiv:1710.09412.
    """
    alpha = number("alpha", alpha, 0.0, open_low=True)
    xp, y = _targets(x, y, classes)
    arithmetic("x", x.dtype)
    words = draws.sample_words(draws.MIXUP, len(x), seed, epoch, index, stream)
    partner, weight = xp.asarray(_ring(words[:, :2])), xp.asarray(draws.beta(alpha, words[:, 2:4]))
    return _mix(x, partner, weight), _mix(y, partner, weight)


def cutmix(
    x: Any,
    y: Any,
    alpha: float = 1.0,
    *,
    classes: int | None = None,
    seed: int,
    epoch: int = 0,
    index: NDArray[np.int64] | None = None,
    stream: int = 0,
) -> tuple[Any, Any]:
    """Paste a rectangle of another image of the batch into each image, and mix the labels by area.

    The rectangle has sqrt(1 - lam) of the height and of the width, lam ~ Beta(alpha, alpha), around a pixel of which
    all are equally likely; what lies outside the image is cut off. The label's weight is the share of the area that is
    left. Partners, the other arguments, the result and the errors are those of `mixup`.

    Parameters
    ----------
    x
        Images (N, H, W) or (N, C, H, W) of any dtype.

    References
    ----------
    Yun, Han, Oh, Chun, Choe, Yoo, 2019, arXiv:1905.04899.
    """
    alpha = number("alpha", alpha, 0.0, open_low=True)
    xp, y = _targets(x, y, classes)
    if x.ndim not in (3, 4):
        fail("x", "images (N, H, W) or (N, C, H, W)", f"shape {x.shape}")
    words = draws.sample_words(draws.CUTMIX, len(x), seed, epoch, index, stream)
    side = np.sqrt(1 - draws.beta(alpha, words[:, 2:4]))
    down, height = _inside(words[:, 4], side, x.shape[-2])
    right, width = _inside(words[:, 5], side, x.shape[-1])
    weight = xp.asarray(1 - height * width / max(down.shape[1] * right.shape[1], 1))
    pasted = xp.asarray(down[:, :, None] & right[:, None, :])
    partner = xp.asarray(_ring(words[:, :2]))
    mixed = xp.where(pasted if x.ndim == 3 else pasted[:, None], x.take(partner, axis=0), x)
    return mixed, _mix(y, partner, weight)


def _targets(x: Any, y: Any, classes: int | None) -> tuple[Any, Any]:
    """Return the array module, and y as floating targets."""
    xp = backend_of(x, y, names=("x", "y")).xp
    if not x.ndim or y is None or y.shape[:1] != x.shape[:1]:
        fail("y", "one target for each sample of x", f"{getattr(y, 'shape', None)} for {x.shape}")
    if classes is not None:
        classes = draws.whole("classes", classes, 1)
    if y.dtype.kind not in "iu":
        arithmetic("y", y.dtype)
        if classes is not None and y.shape[1:] != (classes,):
            fail("y", f"integers, or shape ({len(x)}, {classes})", f"shape {y.shape}")
        return xp, y
    if classes is None or y.ndim != 1:
        fail("classes" if classes is None else "y", "the number of classes of (N,) integer labels", f"shape {y.shape}")
    if y.size and not (y.min() >= 0 and y.max() < classes):
        fail("y", f"labels in [0, {classes})", f"{y.min()} to {y.max()}")
    rows = xp.zeros((len(y), classes), np.float64 if x.dtype == np.float64 else np.float32)
    rows[xp.arange(len(y)), y] = 1
    return xp, rows


def _ring(words: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the partner of each sample: the next one in a random order."""
    order = np.argsort(draws.keys(words), kind="stable")
    partner = np.empty_like(order)
    partner[order] = np.roll(order, -1)
    return partner


def _mix(a: Any, partner: Any, weight: Any) -> Any:
    """Return weight a + (1 - weight) a[partner], of the dtype of a."""
    real = arithmetic("x", a.dtype)
    wide = a.astype(real, copy=False)
    out = wide.take(partner, axis=0)
    out -= wide
    out *= (1 - weight).astype(real).reshape(-1, *[1] * (a.ndim - 1))
    out += wide
    return out.astype(a.dtype, copy=False)


def _inside(word: Any, share: Any, size: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return which of `size` places lie within a stretch of share * size around a random one, and how many."""
    length, place = (share * size).astype(np.int64), np.arange(size)
    first = (draws.unit(word) * size).astype(np.int64) - length // 2
    inside = (place >= first[:, None]) & (place < (first + length)[:, None])
    return inside, inside.sum(axis=1)
