"""Newton's method along the diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kilter import _check
from kilter._check import fail
from kilter.optim import arrays
from kilter.optim.arrays import Pass, Rule, Slot
from kilter.optim.base import Optimizer, StepReport
from kilter.optim.options import Number, check_numbers
from kilter.optim.scaler import LossScaler

__all__ = ["DiagonalNewton"]


class DiagonalNewton(Optimizer):
    """Newton's method with a diagonal of the Hessian that is given, or estimated.

    A curvature c, when a step comes with one, moves the average: h <- beta h + (1 - beta) |c|. Each step is

    p <- p - clamp(lr g / (h / (1 - beta^k) + damping), -clip, clip),

    where k is the number of curvatures so far. The absolute value keeps the steps downhill where the Hessian is
    indefinite. On a diagonal quadratic the exact curvature, without damping, reaches the minimum in one step.

    Args:
        params: a list, a dict name -> array, or a list of group dicts with "params" and options of their own.
        lr: learning rate, a number or a function of the number of calls so far.
        damping: added to the curvature.
        beta: decay of the average.
        clip: the largest step of an element, or None.

    The other arguments are those of `SGD`.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 20 bytes per float32 parameter, and 12 more at a step that comes with a curvature. `hutchinson` and
        `gauss_newton_bartlett` estimate curvatures.

    References:
        Becker, Le Cun 1988, "Improving the convergence of back-propagation learning with second order methods"; Liu et
        al. 2023, arXiv:2305.14342.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1.0,
        *,
        damping: float = 1e-4,
        beta: float = 0.99,
        clip: float | None = None,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "damping": damping, "beta": beta, "clip": clip}
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_numbers(options, "lr", "damping")
        check_numbers(options, "beta", below=1.0)
        if options["clip"] is not None:
            _check.number("clip", options["clip"], 0.0, open_low=True)

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        return (Slot("curvature"),)

    def _start(self) -> dict[str, float]:
        return {"t": 0, "product": 1.0}

    def _advance(self, options: Mapping[str, Any], clock: dict[str, float]) -> dict[str, float]:
        return {"t": clock["t"] + 1, "product": clock["product"]}

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        limit = math.inf if options["clip"] is None else options["clip"]
        seen = 1.0 - clock["product"]
        return Rule("newton", (options["lr"], options["damping"], 1.0 / seen if seen else 0.0, limit))

    def step(self, grads: Any, curvature: Any = None, *, scaler: LossScaler | None = None) -> StepReport:
        """Updates every parameter that is not frozen.

        Args:
            grads: gradients in the structure of the parameters; see `SGD.step`.
            curvature: what stands on the diagonal of the Hessian, in the same structure; None goes on with the last.
                It is neither scaled nor clipped, and a step that is skipped does not take it over. A value that is not
                finite skips the step as one in a gradient would.
            scaler: gradients are divided by its scale, the step is skipped if any is not finite, and it is advanced.

        Returns:
            StepReport(calls, applied, grad_norm, skipped).

        Raises:
            KilterError: as `SGD.step`; or a curvature does not fit, or there was none yet; nothing has changed then.
        """
        plan = self._plan(grads)
        if curvature is None:
            self._check_curved(plan)
        else:
            plan = self._curved(plan, curvature)
        return self._run(plan, scaler)

    def _check_curved(self, plan: list[Pass]) -> None:
        """Refuses to go on with a curvature that has never come."""
        if any(one.bucket.clock["product"] == 1.0 for one in plan):
            self._pull()  # a step that the host has not heard of may have brought it
        for one in plan:
            if one.bucket.clock["product"] == 1.0:
                fail("curvature", f"one for params[{one.bucket.names[0]}], which has had none yet", "None")

    def _renew(self, one: Pass) -> None:
        super()._renew(one)
        if not one.of_gradients:
            one.rule = _curvature(one.options)

    def _curved(self, plan: list[Pass], curvature: Any) -> list[Pass]:
        """Returns the plan with the averages of the curvature moved first."""
        buckets = [one.bucket for one in plan]
        given = arrays.match(curvature, self._structure, self.groups, buckets, self._frozen, "curvature")
        both = []
        for one, some in zip(plan, given, strict=True):
            bucket, options = one.bucket, self._options(one.bucket)
            for name, p, c in zip(bucket.names, bucket.params, some, strict=True):
                arrays.check_like(f"curvature[{name}]", c, p)
            one.clock["product"] *= options["beta"]
            one.rule = self._rule(options, one.clock, bucket.slots)
            first = Pass(bucket, some, _curvature(options), one.clock, options)
            first.params = [part["arrays"]["curvature"] for _, part in bucket.parts()]
            first.state, first.masters, first.of_gradients = [], None, False
            both += [first, one]
        return both


def _curvature(options: Mapping[str, Any]) -> Rule:
    return Rule("curvature", (1.0 - options["beta"],))
