"""Schedules that go one way: from a value to a lower or higher one."""

# ruff: noqa: N801  (a schedule's class is used as a function: `linear(0.1, 0.0, 100)`)
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kilter.schedule.curve import Array, Curve, check_rising, ease, mix


@dataclass(frozen=True)
class constant(Curve):
    """The same value at every step."""

    value: float

    def _at(self, s: Array) -> Array:
        return np.full_like(s, self.value)


@dataclass(frozen=True)
class step(Curve):
    """Multiply by `gamma` every `every` steps: base * gamma^floor(s / every)."""

    base: float
    every: float
    gamma: float

    def _at(self, s: Array) -> Array:
        return self.base * np.float64(self.gamma) ** np.floor(s / self.every)


@dataclass(frozen=True)
class multistep(Curve):
    """Multiply by `gamma` at each milestone: base * gamma^(number of milestones <= s)."""

    base: float
    milestones: Sequence[float]
    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "milestones", tuple(self.milestones))
        check_rising("milestones", self.milestones)

    def _at(self, s: Array) -> Array:
        return self.base * np.float64(self.gamma) ** np.searchsorted(self.milestones, s, side="right")


@dataclass(frozen=True)
class exponential(Curve):
    """Multiply by `gamma` at every step: base * gamma^s."""

    base: float
    gamma: float

    def _at(self, s: Array) -> Array:
        return self.base * np.float64(self.gamma) ** s


@dataclass(frozen=True)
class linear(Curve):
    """Go from `start` to `end` in a straight line over `steps` steps, and stay there."""

    start: float
    end: float
    steps: float

    def _at(self, s: Array) -> Array:
        return mix(self.start, self.end, np.minimum(s / self.steps, 1.0))


@dataclass(frozen=True)
class polynomial(Curve):
    """Go to `end` over `steps` steps, and stay: end + (start - end) * (1 - s / steps)^power."""

    start: float
    end: float
    steps: float
    power: float = 1.0

    def _at(self, s: Array) -> Array:
        return mix(self.end, self.start, (1.0 - np.minimum(s / self.steps, 1.0)) ** self.power)


@dataclass(frozen=True)
class cosine(Curve):
    """Go to `end` over `steps` steps, and stay: end + (base - end) * (1 + cos(pi s / steps)) / 2.

    References
    ----------
    I. Loshchilov, F. Hutter, SGDR: Stochastic gradient descent with warm restarts, 2017, arXiv:1608.03983.
    """

    base: float
    steps: float
    end: float = 0.0

    def _at(self, s: Array) -> Array:
        return mix(self.base, self.end, ease(np.minimum(s / self.steps, 1.0)))


@dataclass(frozen=True)
class inverse_sqrt(Curve):
    """Rise from 0 to `base` in `warmup` steps, then fall: base * min(s / warmup, sqrt(warmup / s)).

    References
    ----------
    A. Vaswani et al., Attention is all you need, 2017, arXiv:1706.03762, section 5.3.
    """

    base: float
    warmup: float

    def _at(self, s: Array) -> Array:
        t = s / self.warmup
        return self.base * np.minimum(t, 1.0) / np.sqrt(np.maximum(t, 1.0))
