"""Statistics per channel: moments that merge, and running averages of them."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter._channels import open_call, position_weights
from kilter._check import fail

__all__ = ["Moments", "RunningStats", "merge", "moments"]


class Moments(NamedTuple):
    """Count (or sum of weights), mean, and sum of squared differences from the mean, in float64.

    `count` has no axes, `mean` and `m2` have shape (channels,). The biased variance is m2 / count.
    """

    count: Any
    mean: Any
    m2: Any


def moments(x: Any, axis: int = 1, weights: Any = None) -> Moments:
    """Count, mean and centred second moment of every channel.

    Args:
        x: data of at least two axes, float64, float32, float16 or bfloat16.
        axis: the channel axis.
        weights: counts or a 0/1 mask, shape (N,) or (N, *positions).

    Returns:
        Moments in float64. Of no values at all, they are zero.

    Raises:
        KilterError: an argument does not fit.

    Notes:
        Blocks of about 4,096 elements are summed in the arithmetic type about their own mean, and merge in float64.
    """
    backend = backend_of(x, weights, names=("x", "weights"))
    _check.array("x", x)
    call = open_call(backend, x, axis)
    w = position_weights(call, weights)
    rows = backend.xp.empty(1 + 2 * call.channels)
    count, mean, m2 = rows[:1], rows[1 : 1 + call.channels], rows[1 + call.channels :]
    backend.ops.bn_stats(call.x, call.axis, w, count, mean, m2)
    return Moments(count[0], mean, m2)


def merge(*parts: Moments) -> Moments:
    """The moments of all parts together, merged in the order given.

    count = n₁ + n₂, mean = mean₁ + δ n₂ / count, m2 = m2₁ + m2₂ + δ² n₁ n₂ / count with δ = mean₂ - mean₁.
    Counts may be unequal. A part without values (count 0) changes nothing.

    Raises:
        KilterError: there is no part, or their channels differ.

    References:
        Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    if not parts:
        fail("parts", "at least one Moments", "none")
    for part in parts:
        if not isinstance(part, Moments):
            fail("parts", "Moments", type(part).__name__)
    count, mean, m2 = parts[0]
    for part in parts[1:]:
        if part.mean.shape != mean.shape:
            fail("parts", f"{mean.shape[0]} channels", f"{part.mean.shape[0]}")
        if not part.count:
            continue
        if not count:
            count, mean, m2 = part
            continue
        total = count + part.count
        share = part.count / total
        delta = part.mean - mean
        mean = mean + delta * share
        m2 = m2 + part.m2 + delta * delta * (count * share)
        count = total
    return Moments(count, mean, m2)


class RunningStats:
    """Running mean and variance of every feature, moved towards each batch's.

    new = (1 - momentum) * old + momentum * batch. `mean` starts at 0 and `var` at 1; both are arrays that may be
    written to. `count` is how many values have been seen per feature (or their weights), `updates` how many batches.

    Args:
        features: how many.
        momentum: the weight of the NEW batch. None averages all batches, each weighted by its count. A function of the
            number of updates so far is called at each update.
        unbiased: whether the running variance is n / (n - 1) times the batch's biased one.
        dtype: float32 or float64, that of the statistics of the data: float64 for float64 data, else float32.
        xp: the array module.

    Raises:
        KilterError: an argument does not fit.

    Notes:
        Where the weight is that of the old value, as in Keras and flax, 0.9 or 0.99 there is 0.1 or 0.01 here; a number
        above 0.5 gives a UserWarning.
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float | Callable[[int], float] | None = 0.1,
        unbiased: bool = True,
        dtype: Any = "float32",
        xp: Any = np,
    ) -> None:
        if not isinstance(features, (int, np.integer)) or features < 0:
            fail("features", "a whole number of at least 0", repr(features))
        real = _check.dtype_of("dtype", dtype)
        if real.name not in ("float32", "float64"):
            fail("dtype", "float32 or float64", f"{real}")
        if momentum is not None and not callable(momentum):
            momentum = _check.number("momentum", momentum, 0.0, 1.0)
            if momentum > 0.5:
                warnings.warn(
                    f"momentum={momentum:g} is the weight of the new batch; a weight of the old value is "
                    f"momentum={1 - momentum:g} here",
                    UserWarning,
                    stacklevel=2,
                )
        self.momentum = momentum
        self.unbiased = bool(unbiased)
        self.mean = xp.zeros(features, real)
        self.var = xp.ones(features, real)
        self.count = 0.0
        self.updates = 0

    def weight(self, n: float) -> float:
        """Returns the weight that a batch of `n` values gets now."""
        if self.momentum is None:
            return n / (self.count + n)
        if callable(self.momentum):
            return _check.number("momentum", self.momentum(self.updates), 0.0, 1.0)
        return self.momentum

    def advance(self, n: float) -> None:
        """Counts a batch of `n` values whose statistics are already in `mean` and `var`."""
        self.count += n
        self.updates += 1

    def update(self, mean: Any, var: Any, n: float) -> None:
        """Moves towards a batch.

        Args:
            mean: the batch's mean, shape (features,).
            var: the batch's biased variance, shape (features,).
            n: how many values the batch has per feature.

        Raises:
            KilterError: an argument does not fit.
        """
        backend = backend_of(self.mean, mean, var, names=("running", "mean", "var"))
        for argument, array in (("mean", mean), ("var", var)):
            _check.array(argument, array)
            if array.shape != self.mean.shape:
                fail(argument, f"shape {self.mean.shape}", f"shape {array.shape}")
            _check.arithmetic(argument, array.dtype)
        n = _check.number("n", n, 1.0 if self.unbiased else 0.0, sys.float_info.max, open_low=True)
        correction = n / (n - 1) if self.unbiased else 1.0
        h = np.array([self.weight(n)])
        new_mean = mean.astype(self.mean.dtype)
        new_var = (var.astype("float64") * correction).astype(self.var.dtype)
        backend.ops.ema(self.mean, new_mean, h)
        backend.ops.ema(self.var, new_var, h)
        self.advance(n)

    def reset(self) -> None:
        """Starts again: mean 0, variance 1, nothing counted."""
        self.mean[...] = 0
        self.var[...] = 1
        self.count, self.updates = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of the arrays, and the counts."""
        return {"mean": self.mean.copy(), "var": self.var.copy(), "count": self.count, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            KilterError: an entry is missing or does not fit; nothing has changed then.
        """
        _check.entries(state, {"mean", "var", "count", "updates"})
        for key in ("mean", "var"):
            if np.shape(state[key]) != self.mean.shape:
                fail(f"state[{key}]", f"shape {self.mean.shape}", f"shape {np.shape(state[key])}")
        count = _check.number("state[count]", state["count"], 0.0)
        updates = int(_check.number("state[updates]", state["updates"], 0.0, math.inf))
        here = backend_of(self.mean).xp.asarray
        self.mean[...] = here(state["mean"])
        self.var[...] = here(state["var"])
        self.count, self.updates = count, updates
