"""Averages over steps: of the gradients of several micro-batches, and of the weights along a run."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import Backend, beside, host
from kilter._check import fail
from kilter.optim import arrays, structure

__all__ = ["GradAccumulator", "WeightEMA"]


class GradAccumulator:
    """The weighted mean of the gradients of several micro-batches, as if they were one batch.

    With g_i the mean gradient of micro-batch i and w_i its number of samples (or any other weight):

    sum(w_i g_i) / sum(w_i).

    The sum of the weights is that of the micro-batches which were added: a last window with fewer of them, or with a
    smaller one, needs nothing special.

    Args:
        like: arrays that have the structure and shapes of the gradients: a list, a dict name -> array, or a list of
            groups of these. They are not read.

    Raises:
        KilterError: an argument does not fit; the message names the gradient.

    Notes:
        Sums are float32 for 16-bit and float32 arrays, float64 for float64 ones. The mean is moved towards each
        micro-batch, m <- m + w / (sum of w so far) (g - m), so that it never leaves the range of the gradients. With a
        LossScaler, add gradients of one scale and hand the scaler to the step.
    """

    def __init__(self, like: Any) -> None:
        self._like = structure.named("like", like)
        self._backend = structure.backend("like", self._like)
        self._means = _Averages(self._backend, self._like)
        self._tree = structure.rebuilt(like, self._means.views)
        self.weight = 0.0

    def add(self, grads: Any, weight: float = 1.0) -> None:
        """Takes in the gradients of one micro-batch.

        Args:
            grads: in the structure of `like`; 16 bit and float32 where the sums are float32, else float64.
            weight: the number of samples whose mean they are, at least 0; 0 adds nothing.

        Raises:
            KilterError: an argument does not fit, or lies in the arrays that `finish` returned; nothing has changed.
        """
        weight = _check.number("weight", weight, 0.0, sys.float_info.max)
        given = structure.matched("grads", grads, self._like)
        self._check_readable(dict(zip(self._like, given, strict=True)))
        if weight == 0.0:
            return
        if self.weight == 0.0:
            self._means.take(given)
        else:
            self._means.move(given, weight / (self.weight + weight))
        self.weight += weight

    def finish(self) -> Any:
        """Returns the mean gradients, in the structure of `like`, and starts anew.

        The arrays are the accumulator's own, of the dtype of its sums: the next `add` overwrites them.

        Raises:
            KilterError: nothing of a positive weight has been added.
        """
        if self.weight == 0.0:
            fail("weight", "gradients of a positive weight", "none since the last finish")
        self.weight = 0.0
        return self._tree

    def _check_readable(self, grads: dict[str, Any]) -> None:
        """Refuses gradients of another library or arithmetic, and those that lie in the sums."""
        xp = self._backend.xp
        if grads and structure.backend("grads", grads) is not self._backend:
            fail("grads", f"arrays of {xp.__name__}", "others")
        for (name, g), mean in zip(grads.items(), self._means.views, strict=True):
            if _check.arithmetic(f"grads[{name}]", g.dtype) != mean.dtype:
                fail(f"grads[{name}]", f"a dtype whose arithmetic is {mean.dtype}", f"dtype {g.dtype}")
            if any(xp.may_share_memory(g, memory) for memory in self._means.memory):
                fail(f"grads[{name}]", "memory of its own", "that of the sums")


class WeightEMA:
    """An exponential moving average of the weights, which often predicts better than the last weights.

    average <- d average + (1 - d) p with d = decay; with `warmup`, d = min(decay, (1 + n) / (10 + n)) after n updates,
    so that the first weights are soon forgotten. The average starts as a copy of the weights.

    Args:
        params: what the optimizer updates: a list, a dict name -> array, or a list of groups of these. The same arrays
            are read at each update.
        decay: weight of the old average, in [0, 1).
        warmup: start with a smaller decay.

    Attributes:
        updates: how many there have been.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Averages are float32 for 16-bit parameters, whose steps they would lose otherwise. Moves 12 bytes per float32
        parameter.

    References:
        Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Tan, Le 2019, arXiv:1905.11946
        (decay in training); the warm-up is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, params: Any, decay: float = 0.999, warmup: bool = False) -> None:
        self.decay = _check.number("decay", decay, 0.0, 1.0)
        if self.decay == 1.0:
            fail("decay", "a number below 1", repr(decay))
        self.warmup = bool(warmup)
        self._params = structure.named("params", params)
        self._backend = structure.backend("params", self._params)
        for name, p in self._params.items():
            arrays.check_param(name, p)
        arrays.check_apart(self._params)
        self._averages = _Averages(self._backend, self._params)
        self._averages.take(list(self._params.values()))
        self._weights: list[Any] | None = None
        self.updates = 0

    @property
    def swapped(self) -> bool:
        """Whether the parameters hold the averages at present."""
        return self._weights is not None

    def update(self) -> None:
        """Moves the averages towards the parameters; to be called after each step.

        Raises:
            KilterError: the parameters hold the averages.
        """
        if self.swapped:
            fail("params", "the weights in the parameters (call swap first)", "the averages")
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        self._averages.move(list(self._params.values()), 1.0 - decay)
        self.updates += 1

    def swap(self) -> None:
        """Puts the averages into the parameters, in place, or the weights back: `swap(); evaluate(...); swap()`.

        16-bit parameters take rounded averages; the averages themselves, and the weights, come back bit for bit.
        """
        params = list(self._params.values())
        source, self._weights = (
            (self._averages.views, [p.copy() for p in params]) if self._weights is None else (self._weights, None)
        )
        for p, new in zip(params, source, strict=True):
            p[...] = new

    def state_dict(self) -> dict[str, Any]:
        """Returns a flat dict of copies on the host: the updates, and each average as `average.` and its name."""
        averages = zip(self._params, self._averages.views, strict=True)
        return {"updates": self.updates, **{f"average.{name}": host(average.copy()) for name, average in averages}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            KilterError: an entry is missing or does not fit, or the parameters hold the averages; nothing has changed.
        """
        if self.swapped:
            fail("params", "the weights in the parameters (call swap first)", "the averages")
        own = dict(zip((f"average.{name}" for name in self._params), self._averages.views, strict=True))
        _check.entries(state, {"updates", *own})
        updates = _check.number("state[updates]", state["updates"], 0.0, math.inf)
        if updates % 1 != 0:
            fail("state[updates]", "a whole number", repr(state["updates"]))
        for name, average in own.items():
            given = _check.array(f"state[{name}]", state[name])
            if given.shape != average.shape or given.dtype != average.dtype:
                wanted = f"{average.dtype} of shape {average.shape}"
                fail(f"state[{name}]", wanted, f"{given.dtype} of shape {given.shape}")
        for name, average in own.items():
            average[...] = self._backend.xp.asarray(host(state[name]))
        self.updates = int(updates)


class _Averages:
    """Arrays of the arithmetic's dtype that averages lie in: views of one array per dtype."""

    def __init__(self, backend: Backend, like: Mapping[str, Any]) -> None:
        self._backend, self._prepared = backend, None
        reals = [_check.arithmetic(name, a.dtype) for name, a in like.items()]
        unit = getattr(backend.ops, "STATE_UNIT", 1)  # at whose multiples vectors are aligned
        self.views: list[Any] = [None] * len(reals)
        self.memory = []
        for real in dict.fromkeys(reals):
            chosen = [(i, a) for i, a in enumerate(like.values()) if reals[i] == real]
            taken = [-(-a.size // unit) * unit for _, a in chosen]
            with beside(chosen[0][1]):
                flat = backend.xp.empty(sum(taken), real)
            self.memory.append(flat)
            start = 0
            for (i, a), size in zip(chosen, taken, strict=True):
                self.views[i] = flat[start : start + a.size].reshape(a.shape)
                start += size

    def take(self, values: Sequence[Any]) -> None:
        """Copies each value into an average."""
        if hasattr(self._backend.ops, "average"):
            self.move(values, 1.0)
            return
        for average, value in zip(self.views, values, strict=True):
            self._backend.xp.copyto(average, value)

    def move(self, values: Sequence[Any], weight: float) -> None:
        """Moves each average towards a value, whose weight is given; on a device by one launch for all."""
        xp, ops = self._backend
        values = [_check.contiguous(xp, value) for value in values]
        if hasattr(ops, "average"):
            self._prepared = ops.average(self.views, values, weight, self._prepared)
            return
        h = np.array([weight], "float64")
        for average, value in zip(self.views, values, strict=True):
            ops.ema(average, value, h)
