"""Batch norm in training over arrays that stay where they are: checked once, then only launched."""

from __future__ import annotations

import math
from operator import is_
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import NUMPY, backend_of
from kilter.norm.batch import BatchNormCache, BatchNormGrads
from kilter.stats import RunningStats

__all__ = ["Backward", "Forward"]


class Forward:
    """A `batch_norm` that was done into `out`, to be done again from and into the same arrays.

    Args:
        given: what has to stay for that, compared by identity.
        y, cache: what was returned; a call overwrites their arrays.
        running, eps: arguments.
    """

    def __init__(self, given: tuple[Any, ...], y: Any, cache: BatchNormCache, running: RunningStats, eps: float):
        self._given, self.cache, self._y, self._running = given, cache, y, running
        xp, ops = backend_of(cache.x)
        c, (_, mean, m2) = cache, cache.moments
        self._count = math.prod(c.x.shape) // max(len(c.hi), 1)
        self._scalars, self._launch = np.array((eps, 0.0, 0.0)), ops.bn_train
        found = (xp.empty(1), mean, m2, c.hi, c.lo, c.rstd, running.mean, running.var)
        self._arguments = (c.x, c.axis, None, self._scalars, c.gamma, c.beta, c.residual, c.relu, *found, y)

    @staticmethod
    def possible(cache: BatchNormCache) -> bool:
        """Says whether the kernel read every argument where it lies, and nothing else was asked for."""
        c = cache
        plain = c.training and c.weights is None and c.comm is None and not c.overwritten
        vectors = all(v is None or v.dtype == c.hi.dtype for v in (c.gamma, c.beta))
        return plain and vectors and all(a is None or _check.ready(a) for a in (c.x, c.gamma, c.beta, c.residual))

    def fits(self, given: tuple[Any, ...]) -> bool:
        """Says whether everything is what it was."""
        return all(map(is_, given, self._given))

    def __call__(self) -> Any:
        """Fills y, the statistics of the cache and the running ones; returns y."""
        running = self._running
        self._scalars[1], self._scalars[2] = running.weight(self._count), running.unbiased
        self._launch(*self._arguments)
        running.advance(self._count)
        return self._y


class Backward:
    """A `batch_norm_backward` that was done into `out`, to be done again after its `Forward` was.

    Args:
        dy, cache: arguments, dy in C order.
        grads: what was returned; a call overwrites dx and dresidual.
        dgamma, dbeta: where their gradients go to, None for none.
    """

    def __init__(self, dy: Any, cache: BatchNormCache, grads: BatchNormGrads, dgamma: Any, dbeta: Any) -> None:
        self._dy, self._cache = dy, cache
        self._found = grads.dx, grads.dresidual
        xp, ops = backend_of(dy)
        c, self._launch, gradients = cache, ops.bn_backward, (dbeta, dgamma)
        # The CPU's kernel rounds the sums itself; an array that it could not open is filled from here.
        direct = ops is NUMPY.ops and all(
            g is not None and _check.ready(g) and g.dtype == c.hi.dtype for g in gradients
        )
        sums = gradients if direct else tuple(xp.empty((2, len(c.hi))))
        self._gradients = () if direct or dgamma is None else tuple(zip(gradients, sums, strict=True))
        how = (xp.reshape(c.moments.count, 1), c.hi, c.lo, c.rstd, c.gamma, c.beta, c.residual if c.relu else None)
        out = (grads.dx, grads.dresidual if c.relu else None)
        self._arguments = (dy, c.x, c.axis, None, *how, c.relu, *sums, *out)

    def fits(self, dy: Any, cache: BatchNormCache) -> bool:
        """Says whether both are what they were."""
        return dy is self._dy and cache is self._cache

    def __call__(self) -> tuple[Any, Any]:
        """Fills the gradients; returns dx and dresidual."""
        self._launch(*self._arguments)
        if self._gradients:
            with np.errstate(over="ignore"):  # a sum past the largest number is infinite, as in dx
                for gradient, total in self._gradients:
                    gradient[...] = total
        return self._found
