"""The optimizers, schedules, augmentations and precisions that a run may name, with what they start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from kilter import data, optim, schedule
from kilter._check import fail

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
    "plateau": lambda lr, steps: schedule.Plateau(lr, patience=2),
}

# Of the sides of an image: none of these moves it by more than an eighth.
AUGMENTS: dict[str, Callable[[int], Callable[..., Any]]] = {
    "flip": lambda side: data.flip,
    "crop": lambda side: partial(data.crop, padding=max(side // 8, 1)),
    "noise": lambda side: partial(data.noise, std=0.1),
}

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Rates(NamedTuple):
    """What changes from step to step."""

    lr: Any
    momentum: Any
    plateau: schedule.Plateau | None  # in lr, if it is one; to be told a metric after each epoch


def schedules(name: str, lr: float, steps: int, warm: int) -> Rates:
    """The learning rate, which reaches `lr` after `warm` of the steps, and the momentum."""
    curve = SCHEDULES[name](lr, max(steps - warm, 1))
    if isinstance(curve, schedule.OneCycle):
        return Rates(curve.lr, curve.momentum, None)
    plateau = curve if isinstance(curve, schedule.Plateau) else None
    return Rates(schedule.warmup(curve, warm) if warm else curve, 0.9, plateau)


def optimizer(
    name: str, params: Mapping[str, Any], lr: Any, momentum: Any, weight_decay: float, clip_norm: float | None = None
) -> optim.Optimizer:
    """The optimizer of that name; the momentum is left out where the rule has none."""
    choice = OPTIMIZERS[name]
    moving: dict[str, dict[str, Any]] = {
        "momentum": {"momentum": momentum},
        "betas": {"betas": (momentum, BETA2.get(name, 0.999))},
    }
    more = moving.get(choice.momentum or "", {})
    return choice.make(params, lr, weight_decay=weight_decay, clip_norm=clip_norm, **more)


def transforms(
    augment: Sequence[str], mixup: float, cutmix: float, shape: Sequence[int], classes: int
) -> tuple[Callable[..., Any], ...]:
    """What happens to a batch, in this order: each sample by itself, then samples and labels with others'.

    Raises
    ------
    KilterError
        Samples of this shape are no images, and only images can be treated so.
    """
    for name in (*augment, *(["cutmix"] if cutmix else [])):
        if name != "noise" and len(shape) not in (2, 3):
            fail(name, "images", f"samples of shape {tuple(shape)}")
    found = [AUGMENTS[name](min(shape[-2:])) for name in augment]
    if cutmix:
        found.append(partial(data.cutmix, alpha=cutmix, classes=classes))
    if mixup:
        found.append(partial(data.mixup, alpha=mixup, classes=classes))
    return tuple(found)
