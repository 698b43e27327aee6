"""What data-parallel training adds to a step: a share of the batch for each rank, and one sum of all gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kilter import _check
from kilter._check import fail
from kilter.dist.communicator import Communicator, of_rank
from kilter.optim import structure

# A weight travels as two digits of this base: sums of whole weights are exact in float32 up to 2**36, for up to 2**12
# ranks, where one float32 number would lose the odd ones above 2**24.
_BASE = 4096.0
_TOO_HEAVY = _BASE**3


def shard(n: int, rank: int, size: int) -> slice:
    """Returns the part of n samples that belongs to a rank.

    The parts of all ranks follow each other and together are 0 to n; the first n % size of them have one sample more.

    Args:
        n: the number of samples, at least 0.
        rank, size: which rank, of how many.

    Raises:
        KilterError: an argument is not as above.
    """
    for argument, value, low in (("n", n, 0), ("size", size, 1)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
            fail(argument, f"a whole number of at least {low}", repr(value))
    rank = of_rank(rank, size, "rank")
    share, longer = divmod(int(n), int(size))
    start = rank * share + min(rank, longer)
    return slice(start, start + share + (rank < longer))


class GradientReducer:
    """The mean gradients over the samples of all ranks, by one exchange.

    With g_r the mean gradient of rank r over its w_r samples, every rank gets, in the same bits,

    sum(w_r g_r) / sum(w_r),

    the gradient of the whole batch, however unequal its parts are.

    Args:
        like: arrays that have the structure and shapes of the gradients: a list, a dict name -> array, or a list of
            groups of these; the same on all ranks. They are not read.
        comm: this rank's communicator.

    Raises:
        KilterError: an argument does not fit; the message names it.

    Notes:
        The gradients travel in one float32 array (float64 if `like` holds float64), which is allocated here, once;
        16-bit gradients are widened, summed in float32 and rounded once. On a GPU nothing waits for the host.
    """

    def __init__(self, like: Any, comm: Communicator) -> None:
        self._like = structure.named("like", like)
        self._backend = structure.backend("like", self._like)
        if _check.communicator(comm) is None:
            fail("comm", "a communicator", "None")
        self._comm = comm
        reals = {_check.arithmetic(f"like[{name}]", a.dtype) for name, a in self._like.items()}
        real = np.result_type(np.float32, *reals)
        self._bucket = self._backend.xp.zeros(sum(a.size for a in self._like.values()) + 2, real)
        self._total = self._bucket[:1]
        self._views, start = [], 0
        for a in self._like.values():
            self._views.append(self._bucket[start : start + a.size].reshape(a.shape))
            start += a.size

    def reduce(self, grads: Any, weight: float) -> Any:
        """Replaces the gradients of this rank by the mean over all ranks, which all call it together.

        Args:
            grads: in the structure of `like`; overwritten.
            weight: the number of samples whose mean they are, at least 0 and below 2**36. A rank whose weight is 0
                takes part; what its gradients held is not read.

        Returns:
            `grads`; zeros if all weights are 0. What is not finite on one rank is not finite on all.

        Raises:
            KilterError: an argument does not fit; nothing was exchanged or changed.
        """
        weight = _check.number("weight", weight, 0.0, math.nextafter(_TOO_HEAVY, 0.0))
        given = structure.matched("grads", grads, self._like)
        self._check_grads(dict(zip(self._like, given, strict=True)))
        means, digits = self._bucket[:-2], self._bucket[-2:]
        with np.errstate(over="ignore", invalid="ignore"):  # the step looks for what overflowed
            if weight == 0.0:
                means[...] = 0.0
            else:
                for view, g in zip(self._views, given, strict=True):
                    view[...] = g
                means *= weight
            digits[0], digits[1] = divmod(weight, _BASE)
            self._comm.all_reduce(self._bucket)
            self._total = total = digits[:1].astype("float64") * _BASE + digits[1:]
            means /= self._backend.xp.where(total > 0.0, total, 1.0).astype(means.dtype)
            for view, g in zip(self._views, given, strict=True):
                g[...] = view
        return grads

    @property
    def total(self) -> float:
        """The sum of the weights in the last `reduce`, exact for whole ones; reading it waits for a GPU."""
        return float(self._total[0])

    def _check_grads(self, grads: dict[str, Any]) -> None:
        """Refuses gradients of another library, wider ones than the bucket, and those that cannot be written to."""
        if grads and structure.backend("grads", grads) is not self._backend:
            fail("grads", f"arrays of {self._backend.xp.__name__}", "others")
        for name, g in grads.items():
            if _check.arithmetic(f"grads[{name}]", g.dtype).itemsize > self._bucket.itemsize:
                fail(f"grads[{name}]", "at most float32, as in like", f"dtype {g.dtype}")
        structure.check_writable("grads", grads)
