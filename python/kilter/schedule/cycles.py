"""Schedules that rise and fall: once, or again and again."""

# ruff: noqa: N801  (a schedule's class is used as a function: `sawtooth(0.1, 0.0, 100)`)
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from kilter._check import fail
from kilter.schedule.compose import piecewise
from kilter.schedule.curve import Anneal, Array, Curve, check_choice, check_number, ease, mix, pairs

Cycle: TypeAlias = Literal["triangular", "triangular2", "exp_range"]


@dataclass(frozen=True)
class cosine_restarts(Curve):
    """Repeat `cosine` for ever: `first` steps at first, then each time `mult` (at least 1) times as many.

    References
    ----------
    I. Loshchilov, F. Hutter, SGDR: Stochastic gradient descent with warm restarts, 2017, arXiv:1608.03983.
    """

    base: float
    first: float
    mult: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mult < 1:
            fail("mult", "a number of at least 1", repr(self.mult))

    def _at(self, s: Array) -> Array:
        if self.mult == 1:
            return mix(self.base, self.end, ease(np.fmod(s, self.first) / self.first))
        growth = np.float64(self.mult)

        def begin(cycle: Array) -> Array:
            return self.first * (growth**cycle - 1.0) / (growth - 1.0)

        cycle = np.floor(np.log1p(s * (growth - 1.0) / self.first) / np.log(growth))
        # The logarithm may miss a boundary by one rounding.
        cycle = cycle + (begin(cycle + 1.0) <= s) - (begin(cycle) > s)
        return mix(self.base, self.end, ease((s - begin(cycle)) / (self.first * growth**cycle)))


@dataclass(frozen=True)
class sawtooth(Curve):
    """Fall in each period and jump back: start - (start - end) * (s mod period) / period.

    The value `end` is never reached.
    """

    start: float
    end: float
    period: float

    def _at(self, s: Array) -> Array:
        return mix(self.start, self.end, np.fmod(s, self.period) / self.period)


@dataclass(frozen=True)
class triangular(Curve):
    """Rise from `low` to `high` in `half_period` steps, fall back in as many, and repeat.

    The height of the rise is (high - low) times 1 ("triangular"), 1/2 per cycle done ("triangular2"), or
    gamma^s ("exp_range", the only mode that reads `gamma`). `inverse` starts from `high` and dips instead,
    for a momentum that moves against the learning rate.

    References
    ----------
    L. N. Smith, Cyclical learning rates for training neural networks, 2017, arXiv:1506.01186.
    """

    low: float
    high: float
    half_period: float
    mode: Cycle = "triangular"
    gamma: float = 1.0
    inverse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, Cycle)
        if self.gamma != 1 and self.mode != "exp_range":
            fail("gamma", '1 unless mode is "exp_range"', repr(self.gamma))

    def _at(self, s: Array) -> Array:
        t = s / self.half_period
        height = 1.0 - np.abs(np.fmod(t, 2.0) - 1.0)
        if self.mode == "triangular2":
            height = height * np.exp2(-np.floor(t / 2.0))
        elif self.mode == "exp_range":
            height = height * np.float64(self.gamma) ** s
        return mix(self.high, self.low, height) if self.inverse else mix(self.low, self.high, height)


class OneCycle(NamedTuple):
    """The two schedules of `one_cycle`."""

    lr: Curve
    momentum: Curve


def one_cycle(
    peak: float,
    steps: float,
    *,
    momentum: tuple[float, float] = (0.85, 0.95),
    warm: float = 0.3,
    start_div: float = 25,
    end_div: float = 1e4,
    anneal: Anneal = "cos",
    three_phase: bool = False,
) -> OneCycle:
    """Raise the learning rate to `peak` and lower it again in one run; momentum moves against it.

    From peak / start_div at step 0 to `peak` at step warm * steps - 1, then to peak / start_div / end_div at
    step steps - 1. With `three_phase` the way down meets peak / start_div at step 2 * warm * steps - 2.

    Parameters
    ----------
    peak
        The highest learning rate, above 0.
    steps
        The number of optimizer steps of the run: the last one is `steps - 1`, where the last value is
        reached.
    momentum
        (low, high): low where the learning rate is highest. For Adam this is beta1.
    warm
        The part of the run that rises: between 0 and 1, at most 1/2 with `three_phase`.
    start_div, end_div
        The first value is peak / start_div, the last one the first / end_div.
    anneal
        "cos": half waves of a cosine. "linear": straight lines.
    three_phase
        Come down as slowly as it rose, and use the rest of the run for the last value.

    Returns
    -------
    OneCycle
        `lr` and `momentum`, both functions of the step.

    Raises
    ------
    KilterError
        An argument is out of range.

    References
    ----------
    L. N. Smith, N. Topin, Super-convergence, 2017, arXiv:1708.07120. Break points as in PyTorch's OneCycleLR.
    """
    for name, value in {"peak": peak, "steps": steps, "start_div": start_div, "end_div": end_div}.items():
        check_number(name, value, positive=True)
    check_number("warm", warm, positive=True)
    if warm >= 1 or (three_phase and warm > 0.5):
        fail("warm", "a number below 1, at most 0.5 with three_phase", repr(warm))
    check_choice("anneal", anneal, Anneal)
    (low,), (high,) = pairs("momentum", "(low, high)", (momentum,))
    for number in (low, high):
        check_number("momentum", number)
    if not 0 <= low <= high < 1:
        fail("momentum", "0 <= low <= high < 1", repr(momentum))
    first = peak / start_div
    # Runs of a few steps have no time to rise: a break point before step 0 moves there.
    top, back, stop = (max(at, 0.0) for at in (warm * steps - 1, 2 * warm * steps - 2, steps - 1))
    points = [(0.0, first, high), (top, peak, low), (stop, first / end_div, high)]
    if three_phase:
        points.insert(2, (back, first, high))
    lr = piecewise(tuple((at, rate) for at, rate, _ in points), anneal)
    return OneCycle(lr, piecewise(tuple((at, value) for at, _, value in points), anneal))
