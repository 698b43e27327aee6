"""Random numbers of one sample: a pure function of (seed, epoch, index), whatever batch the sample is in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilter import _kilter
from kilter._check import fail, seed_and_stream

# Initial weights use the streams below 2**30 of a seed; each epoch has one of the next 2**30. Attempt 0 of it is the
# order of the samples, attempt 1 + i belongs to sample i. Dropout has the streams from 2**31 on.
FIRST_STREAM = 2**30
EPOCHS = 2**30
STREAMS = 64  # transforms in a row
WORDS = 64  # of a sample in one stream; no two augmentations share one
FLIP, CROP, NOISE, MIXUP, CUTMIX = slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 9), slice(9, 15)


def whole(argument: str, value: Any, low: int, stop: float = np.inf) -> int:
    """Return `value`, an integer with low <= value < stop, as an int."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value < stop:
        limit = "" if stop == np.inf else f" below {stop}"
        fail(argument, f"a whole number of at least {low}{limit}", repr(value))
    return int(value)


def sample_words(
    part: slice, samples: int, seed: int, epoch: int, index: NDArray[np.int64] | None, stream: int
) -> NDArray[np.uint32]:
    """Return the words of an augmentation: (samples, size of part) uint32, on the host.

    Raises
    ------
    KilterError
        seed, epoch or stream is out of range, or `index` is not one whole number of at least 0 per sample.
    """
    seed, _ = seed_and_stream(seed, 0)
    epoch, stream = whole("epoch", epoch, 0, EPOCHS), whole("stream", stream, 0, STREAMS)
    if index is None:
        index = np.arange(samples)
    elif getattr(index, "shape", None) != (samples,) or index.dtype.kind not in "iu":
        fail("index", f"({samples},) integers", f"{getattr(index, 'dtype', type(index))} {getattr(index, 'shape', '')}")
    attempts = [1 + i for i in index.tolist()]
    if samples and not 1 <= min(attempts) <= max(attempts) < 2**32:
        fail("index", "numbers of at least 0 below 2**32 - 1", f"{min(attempts) - 1} to {max(attempts) - 1}")
    rows = np.empty((samples, stream * WORDS + part.stop), np.uint32)
    for row, attempt in zip(rows, attempts, strict=True):
        _kilter.philox(row, seed, FIRST_STREAM + epoch, attempt)
    return rows[:, stream * WORDS + part.start :]


def unit(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return numbers in (0, 1), the centres of 2**32 equal steps."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def keys(words: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return 64-bit numbers from pairs of words: (..., 2) to (...)."""
    return words[..., 0].astype(np.uint64) << np.uint64(32) | words[..., 1]


def beta(alpha: float, words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return variates of Beta(alpha, alpha) from pairs of words: (..., 2) to (...), without rejection.

    With u and v uniform, t = sqrt(2 alpha (u**(-1 / alpha) - 1)) cos(2 pi v) has Student's distribution with 2 alpha
    degrees of freedom, and (1 + t / sqrt(2 alpha + t**2)) / 2 the wanted one.

    References
    ----------
    R. W. Bailey, Polar generation of random variates with the t-distribution, 1994.
    L. Devroye, Random variate generation in one line of code, 1996.
    """
    u, cos = unit(words[..., 0]), np.cos(2 * np.pi * unit(words[..., 1]))
    with np.errstate(over="ignore"):  # a small alpha gives exactly 0 or 1
        odds = np.expm1(-np.log(u) / alpha)
    variates: NDArray[np.float64] = (1 + cos / np.sqrt(cos * cos + 1 / odds)) / 2
    return variates
