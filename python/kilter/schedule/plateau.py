"""The schedule that follows a metric."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from kilter import _check
from kilter._check import fail
from kilter.schedule.curve import check_choice, check_number
from kilter.schedule.decays import constant

Mode: TypeAlias = Literal["min", "max"]


class Plateau:
    """Lower a learning rate when a metric stops improving.

    After more than `patience` updates in a row without an improvement: value <- max(factor * value, min_lr). An
    improvement is a metric below best - threshold * abs(best), with `mode="max"` one above best + threshold *
    abs(best). Called with a step or an array of steps it returns the present value, so that it can be an
    optimizer's `lr`.

    Parameters
    ----------
    base
        The first value, above 0.
    factor
        Between 0 and 1.
    patience
        How many updates without improvement are let pass, a whole number of at least 0.
    threshold
        The smallest relative improvement that counts, at least 0.
    mode
        "min": lower is better, as for a loss. "max": higher is better, as for an accuracy.
    min_lr
        The value never falls below this.

    Attributes
    ----------
    value
        The present value.
    best
        The best metric so far, infinite before the first.
    bad
        How many updates in a row brought no improvement.

    Raises
    ------
    KilterError
        An argument is out of range.

    Notes
    -----
    As PyTorch's ReduceLROnPlateau for metrics that are positive; for others its threshold has the wrong sign.
    """

    def __init__(
        self,
        base: float,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        mode: Mode = "min",
        min_lr: float = 0.0,
    ) -> None:
        check_number("base", base, positive=True)
        check_number("factor", factor, positive=True)
        if factor >= 1:
            fail("factor", "a number between 0 and 1", repr(factor))
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 0:
            fail("patience", "a whole number of at least 0", repr(patience))
        for name, number in (("threshold", threshold), ("min_lr", min_lr)):
            check_number(name, number)
            if number < 0:
                fail(name, "a number of at least 0", repr(number))
        check_choice("mode", mode, Mode)
        self.factor, self.patience, self.threshold, self.mode, self.min_lr = factor, patience, threshold, mode, min_lr
        self.value = float(base)
        self.best = math.inf if mode == "min" else -math.inf
        self.bad = 0

    def __repr__(self) -> str:
        return f"Plateau(value={self.value:g}, best={self.best:g}, bad={self.bad})"

    def __call__(self, step: Any) -> Any:
        """Return the present value, for an array of steps once per step.

        Raises
        ------
        KilterError
            A step is negative, not finite or not a number.
        """
        return constant(self.value)(step)

    def update(self, metric: float) -> None:
        """Take in the metric of an epoch, or of whatever is the unit of `patience`; NaN is no improvement.

        Raises
        ------
        KilterError
            `metric` is not a number.
        """
        try:
            found = float(metric)
        except (TypeError, ValueError):
            fail("metric", "a number", repr(metric))
        # inf - inf is NaN: every number is an improvement on an infinite best
        margin = self.threshold * abs(self.best) if math.isfinite(self.best) else 0.0
        better = found < self.best - margin if self.mode == "min" else found > self.best + margin
        if better:
            self.best, self.bad = found, 0
            return
        self.bad += 1
        if self.bad > self.patience:
            self.value, self.bad = max(self.value * self.factor, min(self.min_lr, self.value)), 0

    def state_dict(self) -> dict[str, float]:
        """Return the present value, the best metric, and the updates since it was found."""
        return {"value": self.value, "best": self.best, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises
        ------
        KilterError
            An entry is missing or does not fit; nothing has changed then.
        """
        _check.entries(state, {"value", "best", "bad"})
        value = _check.number("state[value]", state["value"], 0.0)
        best = _check.number("state[best]", state["best"])
        bad = _check.number("state[bad]", state["bad"], 0.0, self.patience)
        self.value, self.best, self.bad = value, best, int(bad)
