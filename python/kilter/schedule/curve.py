"""What schedules are made of: the base class, the ways from one value to another, and the checks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import NDArray

from kilter._check import fail

# The arguments that are lengths, counts, factors or exponents; other numbers may have any sign.
POSITIVE = frozenset({"every", "first", "gamma", "half_period", "mult", "period", "power", "steps", "warmup"})

Schedule: TypeAlias = Callable[[float], float]
Array: TypeAlias = NDArray[np.float64]
Anneal: TypeAlias = Literal["linear", "cos"]


@dataclass(frozen=True)
class Curve:
    """A schedule that also takes an array of steps; a subclass gives the formula as `_at`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is float:
                check_number(field.name, getattr(self, field.name), positive=field.name in POSITIVE)

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


def mix(a: float | Array, b: float | Array, part: Array) -> Array:
    """Go the way from a to b by `part` in 0..1, exact at both ends and where a equals b."""
    return np.where(part < 0.5, a + (b - a) * part, b - (b - a) * (1.0 - part))


def ease(part: Array) -> Array:
    """Map 0..1 to 0..1 along half a wave of the cosine."""
    return (1.0 - np.cos(np.pi * part)) / 2.0


def follow(schedule: Schedule, s: Array) -> Array:
    """Evaluate any schedule at an array of steps; a callable of the user may know scalars only."""
    if isinstance(schedule, Curve):
        return schedule._at(s)
    values: Array = np.vectorize(schedule, otypes=[np.float64])(s)
    return values


def check_number(name: str, value: object, *, positive: bool = False) -> None:
    """Refuse what is no finite number (above 0)."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or (positive and value <= 0):
        fail(name, f"a finite number{' above 0' if positive else ''}", repr(value))


def check_rising(name: str, steps: Sequence[float], *, jumps: bool = False) -> None:
    """Refuse steps that do not rise; with `jumps` two may be equal."""
    if not all(isinstance(s, Real) and not math.isnan(s) for s in steps) or not all(
        a < b or (jumps and a == b) for a, b in pairwise(steps)
    ):
        fail(name, "rising steps", repr(list(steps)))


def check_choice(name: str, value: object, choices: object) -> None:
    """Refuse what a Literal does not list."""
    if value not in get_args(choices):
        fail(name, f"one of {', '.join(map(repr, get_args(choices)))}", repr(value))


def check_callable(name: str, value: object) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        fail(name, "a schedule (step -> float)", repr(value))


def pairs(name: str, form: str, pairs: Sequence[tuple[Any, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split a sequence of at least one pair into first and second entries."""
    try:
        first, second = zip(*((a, b) for a, b in pairs), strict=True)
    except (TypeError, ValueError):
        fail(name, f"pairs {form}", repr(pairs))
    return first, second
