"""The optimizers and schedules that a run may name, with what they start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from kilter import optim, schedule

BETA2 = {"lion": 0.99}  # of all others 0.999


class Choice(NamedTuple):
    """An optimizer, its usual learning rate, and the option that is its momentum, if it has one."""

    make: Callable[..., optim.Optimizer]
    lr: float
    momentum: str | None


OPTIMIZERS = {
    "sgd": Choice(optim.SGD, 0.1, "momentum"),
    "nesterov": Choice(partial(optim.SGD, nesterov=True), 0.1, "momentum"),
    "adagrad": Choice(optim.Adagrad, 0.02, None),
    "rmsprop": Choice(optim.RMSprop, 1e-3, None),
    "adadelta": Choice(optim.Adadelta, 1.0, None),
    "adam": Choice(optim.Adam, 2e-3, "betas"),
    "adamw": Choice(optim.AdamW, 2e-3, "betas"),
    "amsgrad": Choice(partial(optim.Adam, amsgrad=True), 2e-3, "betas"),
    "adamax": Choice(optim.Adamax, 4e-3, "betas"),
    "nadam": Choice(optim.NAdam, 2e-3, "betas"),
    "lion": Choice(optim.Lion, 1e-3, "betas"),
}

# Of the peak and the number of steps after the warm-up; one_cycle rises by itself.
SCHEDULES: dict[str, Callable[[float, int], Any]] = {
    "constant": lambda lr, steps: schedule.constant(lr),
    "linear": lambda lr, steps: schedule.linear(lr, 0.0, steps),
    "cosine": schedule.cosine,
    "one_cycle": schedule.one_cycle,
    "step": lambda lr, steps: schedule.step(lr, steps / 3, 0.1),
    "exponential": lambda lr, steps: schedule.exponential(lr, 1e-2 ** (1 / steps)),
    "polynomial": lambda lr, steps: schedule.polynomial(lr, 0.0, steps, 2.0),
    "hold_linear_hold": lambda lr, steps: schedule.hold_linear_hold(lr, lr / 1000, steps),
    "cosine_restarts": lambda lr, steps: schedule.cosine_restarts(lr, steps / 7, 2),  # 1 + 2 + 4 parts
}


def schedules(name: str, lr: float, steps: int, warm: int) -> tuple[Any, Any]:
    """The learning rate, which reaches `lr` after `warm` of the steps, and the momentum."""
    curve = SCHEDULES[name](lr, max(steps - warm, 1))
    if isinstance(curve, schedule.OneCycle):
        return curve.lr, curve.momentum
    return (schedule.warmup(curve, warm) if warm else curve), 0.9


def optimizer(name: str, params: Mapping[str, Any], lr: Any, momentum: Any, weight_decay: float) -> optim.Optimizer:
    """The optimizer of that name; the momentum is left out where the rule has none."""
    choice = OPTIMIZERS[name]
    moving: dict[str, dict[str, Any]] = {
        "momentum": {"momentum": momentum},
        "betas": {"betas": (momentum, BETA2.get(name, 0.999))},
    }
    return choice.make(params, lr, weight_decay=weight_decay, **moving.get(choice.momentum or "", {}))
