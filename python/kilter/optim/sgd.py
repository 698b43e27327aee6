"""Stochastic gradient descent, with and without momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilter._check import fail
from kilter.optim.arrays import Rule, Slot
from kilter.optim.base import Optimizer
from kilter.optim.options import Number, check_flags, check_numbers

__all__ = ["SGD"]

VELOCITY = (Slot("velocity"),)


class SGD(Optimizer):
    """Gradient descent with momentum.

    With g the gradient plus `weight_decay` times the parameter, and v the velocity, undampened at the first step:

    v <- momentum v + (1 - dampening) g,  p <- p - lr v;

    with `nesterov`, p <- p - lr (g + momentum v). With `lr_inside`, the classical rule, the learning rate is part of
    the velocity: v <- momentum v + lr (1 - dampening) g, p <- p - v (with `nesterov`, p <- p - (lr g + momentum v)).
    The two differ once the learning rate changes.

    Args:
        params: a list, a dict name -> array, or a list of group dicts with "params" and options of their own. Float64,
            float32, float16 or bfloat16 arrays, C-contiguous; they are updated in place.
        lr: learning rate, a number or a function of the number of calls so far.
        momentum: weight of the old velocity, a number or a function of the number of calls so far.
        dampening: 1 minus the weight of the gradient in the velocity.
        weight_decay: L2 penalty, added to the gradient; a number or a function of the number of calls so far.
        nesterov: look ahead.
        lr_inside: the learning rate is part of the velocity.
        maximize: climb instead of descending.
        clip_norm: all gradients together are scaled to at most this Euclidean norm.
        clip_value: each element of a gradient is limited to ± this, after `clip_norm`.
        track_norm: report the norm of the gradients.
        skip_nonfinite: skip a step with a non-finite gradient; None means only with a scaler.
        master_dtype: "auto" keeps a float32 copy of 16-bit parameters, which is updated and rounded into them; None
            updates the 16-bit values themselves.
        state_dtype: "float32" or "bfloat16" for the state of parameters that are not float64; None means float32. State
            in bfloat16 is computed with in float32 and rounded to nearest even at each step.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 12 bytes per float32 parameter, 20 with momentum.

    References:
        Polyak 1964, "Some methods of speeding up the convergence of iteration methods"; Sutskever, Martens, Dahl,
        Hinton 2013, "On the importance of initialization and momentum in deep learning".
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        *,
        momentum: Number = 0.0,
        dampening: float = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        lr_inside: bool = False,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "lr_inside": lr_inside,
        }
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_numbers(options, "lr", "weight_decay")
        check_numbers(options, "momentum", "dampening", high=1.0)
        check_flags(options, "nesterov", "lr_inside")
        if options["nesterov"] and options["dampening"] != 0.0:
            fail("nesterov", "no dampening", options["dampening"])

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        if options["momentum"] != 0.0:
            return VELOCITY
        if options["nesterov"]:  # a schedule of the momentum may pass zero
            fail("nesterov", "a momentum", options["momentum"])
        return ()

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        lr, decay, momentum = options["lr"], options["weight_decay"], options["momentum"]
        if not slots:
            return Rule("sgd", (lr, decay))
        inside, size = (lr, 1.0) if options["lr_inside"] else (1.0, lr)
        rate = inside if clock["t"] == 1 else inside * (1.0 - options["dampening"])
        if options["nesterov"]:
            return Rule("momentum", (decay, momentum, rate, size * momentum, size * rate))
        return Rule("momentum", (decay, momentum, rate, size, 0.0))
