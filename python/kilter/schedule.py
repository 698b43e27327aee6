"""Schedules: pure functions of the step, for learning rates, momentum and weight decay.

Every schedule is called with a step (0 is the first one) and returns a Python float, or with an array of
steps and returns a float64 array of its shape. Fractional steps are allowed. Any callable `step -> float`
serves where kilter takes a schedule; the ones here also compare, copy and pickle, and print as a call that
makes them.
"""

# ruff: noqa: N801  (a schedule's class is used as a function: `linear(0.1, 0.0, 100)`)
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import NDArray

from kilter._check import fail

# The arguments that are lengths, counts, factors or exponents; other numbers may have any sign.
POSITIVE = frozenset({"every", "first", "gamma", "half_period", "mult", "period", "power", "steps", "warmup"})

Schedule: TypeAlias = Callable[[float], float]
Array: TypeAlias = NDArray[np.float64]
Anneal: TypeAlias = Literal["linear", "cos"]
Cycle: TypeAlias = Literal["triangular", "triangular2", "exp_range"]


@dataclass(frozen=True)
class Curve:
    """A schedule that also takes an array of steps; a subclass gives the formula as `_at`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is float:
                _check_number(field.name, getattr(self, field.name), positive=field.name in POSITIVE)

    @overload
    def __call__(self, step: float) -> float: ...
    @overload
    def __call__(self, step: NDArray[Any] | Sequence[float]) -> Array: ...
    def __call__(self, step: Any) -> Any:
        """Evaluate the schedule at a step or an array of steps, none of them negative.

        Raises
        ------
        KilterError
            A step is negative, not finite or not a number.
        """
        try:
            steps = np.asarray(step)
        except (TypeError, ValueError):  # on a GPU, or nested unevenly
            steps = np.asarray(None)
        if steps.dtype.kind not in "iuf":
            fail("step", "a number or an array of numbers", type(step).__name__)
        # Contiguous and never 0-d: NumPy's loops for scalars and strides may round differently.
        s = np.ascontiguousarray(steps, np.float64)
        if not ((s >= 0.0) & (s < np.inf)).all():
            fail("step", "finite numbers of at least 0", repr(step))
        value = self._at(s)
        return float(value[0]) if steps.ndim == 0 else value

    def _at(self, s: Array) -> Array:
        """Evaluate the formula at the steps `s`, which have been checked."""
        raise NotImplementedError


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
        _check_rising("milestones", self.milestones)

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
        return _mix(self.start, self.end, np.minimum(s / self.steps, 1.0))


@dataclass(frozen=True)
class polynomial(Curve):
    """Go to `end` over `steps` steps, and stay: end + (start - end) * (1 - s / steps)^power."""

    start: float
    end: float
    steps: float
    power: float = 1.0

    def _at(self, s: Array) -> Array:
        return _mix(self.end, self.start, (1.0 - np.minimum(s / self.steps, 1.0)) ** self.power)


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
        return _mix(self.base, self.end, _ease(np.minimum(s / self.steps, 1.0)))


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
            return _mix(self.base, self.end, _ease(np.fmod(s, self.first) / self.first))
        growth = np.float64(self.mult)

        def begin(cycle: Array) -> Array:
            return self.first * (growth**cycle - 1.0) / (growth - 1.0)

        cycle = np.floor(np.log1p(s * (growth - 1.0) / self.first) / np.log(growth))
        # The logarithm may miss a boundary by one rounding.
        cycle = cycle + (begin(cycle + 1.0) <= s) - (begin(cycle) > s)
        return _mix(self.base, self.end, _ease((s - begin(cycle)) / (self.first * growth**cycle)))


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


@dataclass(frozen=True)
class sawtooth(Curve):
    """Fall in each period and jump back: start - (start - end) * (s mod period) / period.

    The value `end` is never reached.
    """

    start: float
    end: float
    period: float

    def _at(self, s: Array) -> Array:
        return _mix(self.start, self.end, np.fmod(s, self.period) / self.period)


@dataclass(frozen=True)
class piecewise(Curve):
    """Join points (step, value): by straight lines, or by half waves of a cosine with `anneal="cos"`.

    The first and the last value hold outside. Steps must not fall from point to point; two points at one step
    are a jump, and the later one gives the value there.
    """

    points: Sequence[tuple[float, float]]
    anneal: Anneal = "linear"

    def __post_init__(self) -> None:
        steps, values = _pairs("points", "(step, value)", self.points)
        for number in (*steps, *values):
            _check_number("points", number)
        _check_rising("points", steps, jumps=True)
        _check_choice("anneal", self.anneal, Anneal)
        object.__setattr__(self, "points", tuple(zip(steps, values, strict=True)))

    def _at(self, s: Array) -> Array:
        steps, values = np.array(self.points, np.float64).T
        place = np.interp(s, steps, np.arange(len(steps)))
        left = np.floor(place).astype(np.intp)
        right = np.minimum(left + 1, len(steps) - 1)
        part = place - left
        return _mix(values[left], values[right], _ease(part) if self.anneal == "cos" else part)


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
        _check_choice("mode", self.mode, Cycle)
        if self.gamma != 1 and self.mode != "exp_range":
            fail("gamma", '1 unless mode is "exp_range"', repr(self.gamma))

    def _at(self, s: Array) -> Array:
        t = s / self.half_period
        height = 1.0 - np.abs(np.fmod(t, 2.0) - 1.0)
        if self.mode == "triangular2":
            height = height * np.exp2(-np.floor(t / 2.0))
        elif self.mode == "exp_range":
            height = height * np.float64(self.gamma) ** s
        return _mix(self.high, self.low, height) if self.inverse else _mix(self.low, self.high, height)


@dataclass(frozen=True)
class warmup(Curve):
    """Go in a straight line from `start` to schedule(0), then follow `schedule` from its own step 0.

    start + (schedule(0) - start) * s / steps for s < steps, then schedule(s - steps).

    References
    ----------
    P. Goyal et al., Accurate, large minibatch SGD: training ImageNet in 1 hour, 2017, arXiv:1706.02677.
    """

    schedule: Schedule
    steps: float
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_callable("schedule", self.schedule)

    def _at(self, s: Array) -> Array:
        rise = _mix(self.start, self.schedule(0), np.minimum(s / self.steps, 1.0))
        return np.where(s < self.steps, rise, _follow(self.schedule, np.maximum(s - self.steps, 0.0)))


@dataclass(frozen=True, init=False)
class join(Curve):
    """Follow several schedules one after the other, each from its own step 0.

    Parameters
    ----------
    *parts
        Pairs (schedule, until): the schedule is followed up to, not including, the step `until`, which rises
        from part to part. The value that the last one has at its `until` holds from there on; math.inf lets
        it go on.
    """

    parts: tuple[tuple[Schedule, float], ...]

    def __init__(self, *parts: tuple[Schedule, float]) -> None:
        schedules, ends = _pairs("parts", "(schedule, until)", parts)
        for schedule in schedules:
            _check_callable("parts", schedule)
        _check_rising("parts", (0.0, *ends))
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"join({', '.join(map(repr, self.parts))})"

    def _at(self, s: Array) -> Array:
        value, begin = np.zeros_like(s), 0.0
        for schedule, until in self.parts:
            clock = np.clip(s, begin, until) - begin
            value = np.where(s >= begin, _follow(schedule, clock), value)
            begin = until
        return value


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
        _check_number(name, value, positive=True)
    _check_number("warm", warm, positive=True)
    if warm >= 1 or (three_phase and warm > 0.5):
        fail("warm", "a number below 1, at most 0.5 with three_phase", repr(warm))
    _check_choice("anneal", anneal, Anneal)
    (low,), (high,) = _pairs("momentum", "(low, high)", (momentum,))
    for number in (low, high):
        _check_number("momentum", number)
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


def hold_linear_hold(start: float, end: float, steps: float, hold: float = 0.2) -> Curve:
    """Hold `start` for a part `hold` of the steps, go to `end` in a straight line, and hold it for the rest.

    The first part has int(hold * steps) steps, the line int((1 - 2 * hold) * steps).

    Raises
    ------
    KilterError
        `steps` is not positive, `hold` not in 0..0.5, or a value not finite.
    """
    for name, value in {"start": start, "end": end, "hold": hold}.items():
        _check_number(name, value)
    _check_number("steps", steps, positive=True)
    if not 0 <= hold <= 0.5:
        fail("hold", "a number from 0 to 0.5", repr(hold))
    first = int(hold * steps)
    return piecewise(((first, start), (first + int((1 - 2 * hold) * steps), end)))


def scale_lr(base_lr: float, batch: float, base_batch: float) -> float:
    """Scale a learning rate in proportion to the batch: base_lr * batch / base_batch.

    References
    ----------
    P. Goyal et al., Accurate, large minibatch SGD: training ImageNet in 1 hour, 2017, arXiv:1706.02677.
    """
    for name, value in {"base_lr": base_lr, "batch": batch, "base_batch": base_batch}.items():
        _check_number(name, value, positive=True)
    return base_lr * (batch / base_batch)


def _mix(a: float | Array, b: float | Array, part: Array) -> Array:
    """Go the way from a to b by `part` in 0..1, exact at both ends and where a equals b."""
    return np.where(part < 0.5, a + (b - a) * part, b - (b - a) * (1.0 - part))


def _ease(part: Array) -> Array:
    """Map 0..1 to 0..1 along half a wave of the cosine."""
    return (1.0 - np.cos(np.pi * part)) / 2.0


def _follow(schedule: Schedule, s: Array) -> Array:
    """Evaluate any schedule at an array of steps; a callable of the user may know scalars only."""
    if isinstance(schedule, Curve):
        return schedule._at(s)
    values: Array = np.vectorize(schedule, otypes=[np.float64])(s)
    return values


def _check_number(name: str, value: object, *, positive: bool = False) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or (positive and value <= 0):
        fail(name, f"a finite number{' above 0' if positive else ''}", repr(value))


def _check_rising(name: str, steps: Sequence[float], *, jumps: bool = False) -> None:
    if not all(isinstance(s, Real) and not math.isnan(s) for s in steps) or not all(
        a < b or (jumps and a == b) for a, b in pairwise(steps)
    ):
        fail(name, "rising steps", repr(list(steps)))


def _check_choice(name: str, value: object, choices: object) -> None:
    if value not in get_args(choices):
        fail(name, f"one of {', '.join(map(repr, get_args(choices)))}", repr(value))


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        fail(name, "a schedule (step -> float)", repr(value))


def _pairs(name: str, form: str, pairs: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split a sequence of at least one pair into first and second entries."""
    try:
        first, second = zip(*((a, b) for a, b in pairs), strict=True)
    except (TypeError, ValueError):
        fail(name, f"pairs {form}", repr(pairs))
    return first, second
