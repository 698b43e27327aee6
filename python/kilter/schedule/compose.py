"""Schedules made of points and of other schedules, and the rule that scales a rate with the batch."""

# ruff: noqa: N801  (a schedule's class is used as a function: `warmup(curve, 100)`)
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kilter._check import fail
from kilter.schedule.curve import (
    Anneal,
    Array,
    Curve,
    Schedule,
    check_callable,
    check_choice,
    check_number,
    check_rising,
    ease,
    follow,
    mix,
    pairs,
)


@dataclass(frozen=True)
class piecewise(Curve):
    """Join points (step, value): by straight lines, or by half waves of a cosine with `anneal="cos"`.

    The first and the last value hold outside. Steps must not fall from point to point; two points at one step
    are a jump, and the later one gives the value there.
    """

    points: Sequence[tuple[float, float]]
    anneal: Anneal = "linear"

    def __post_init__(self) -> None:
        steps, values = pairs("points", "(step, value)", self.points)
        for number in (*steps, *values):
            check_number("points", number)
        check_rising("points", steps, jumps=True)
        check_choice("anneal", self.anneal, Anneal)
        object.__setattr__(self, "points", tuple(zip(steps, values, strict=True)))

    def _at(self, s: Array) -> Array:
        steps, values = np.array(self.points, np.float64).T
        place = np.interp(s, steps, np.arange(len(steps)))
        left = np.floor(place).astype(np.intp)
        right = np.minimum(left + 1, len(steps) - 1)
        part = place - left
        return mix(values[left], values[right], ease(part) if self.anneal == "cos" else part)


def hold_linear_hold(start: float, end: float, steps: float, hold: float = 0.2) -> Curve:
    """Hold `start` for a part `hold` of the steps, go to `end` in a straight line, and hold it for the rest.

    The first part has int(hold * steps) steps, the line int((1 - 2 * hold) * steps).

    Raises
    ------
    KilterError
        `steps` is not positive, `hold` not in 0..0.5, or a value not finite.
    """
    for name, value in {"start": start, "end": end, "hold": hold}.items():
        check_number(name, value)
    check_number("steps", steps, positive=True)
    if not 0 <= hold <= 0.5:
        fail("hold", "a number from 0 to 0.5", repr(hold))
    first = int(hold * steps)
    return piecewise(((first, start), (first + int((1 - 2 * hold) * steps), end)))


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
        check_callable("schedule", self.schedule)

    def _at(self, s: Array) -> Array:
        rise = mix(self.start, self.schedule(0), np.minimum(s / self.steps, 1.0))
        return np.where(s < self.steps, rise, follow(self.schedule, np.maximum(s - self.steps, 0.0)))


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
        schedules, ends = pairs("parts", "(schedule, until)", parts)
        for schedule in schedules:
            check_callable("parts", schedule)
        check_rising("parts", (0.0, *ends))
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        return f"join({', '.join(map(repr, self.parts))})"

    def _at(self, s: Array) -> Array:
        value, begin = np.zeros_like(s), 0.0
        for schedule, until in self.parts:
            clock = np.clip(s, begin, until) - begin
            value = np.where(s >= begin, follow(schedule, clock), value)
            begin = until
        return value


def scale_lr(base_lr: float, batch: float, base_batch: float) -> float:
    """Scale a learning rate in proportion to the batch: base_lr * batch / base_batch.

    References
    ----------
    P. Goyal et al., Accurate, large minibatch SGD: training ImageNet in 1 hour, 2017, arXiv:1706.02677.
    """
    for name, value in {"base_lr": base_lr, "batch": batch, "base_batch": base_batch}.items():
        check_number(name, value, positive=True)
    return base_lr * (batch / base_batch)
