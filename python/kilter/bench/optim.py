"""Optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kilter import init
from kilter.bench.peers import Peer
from kilter.bench.timing import Case, Work, update_yard
from kilter.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    DiagonalNewton,
    Lion,
    LossScaler,
    NAdam,
    RMSprop,
    WeightEMA,
)


class Rule(NamedTuple):
    """An optimizer, how many float32 arrays it changes, and bytes that pass per float32 parameter."""

    make: Callable[..., Any]
    arrays: int
    path: int


def windowed(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the optimizer with a window of ten steps."""
    return lambda params: kind(params, window=10)


RULES: dict[str, Rule] = {
    "sgd": Rule(SGD, 1, 12),
    "momentum": Rule(lambda params: SGD(params, momentum=0.9), 2, 20),
    "nesterov": Rule(lambda params: SGD(params, momentum=0.9, nesterov=True), 2, 20),
    "adagrad": Rule(Adagrad, 2, 20),
    "rmsprop": Rule(RMSprop, 2, 20),
    "rmsprop centered, momentum": Rule(lambda params: RMSprop(params, centered=True, momentum=0.9), 4, 36),
    "rmsprop, window of 10": Rule(windowed(RMSprop), 2, 52),
    "adadelta": Rule(Adadelta, 3, 28),
    "adadelta, window of 10": Rule(windowed(Adadelta), 3, 100),
    "adam": Rule(Adam, 3, 28),
    "adamw": Rule(AdamW, 3, 28),
    "adamw, state in bfloat16": Rule(lambda params: AdamW(params, state_dtype="bfloat16"), 3, 20),
    "amsgrad": Rule(lambda params: Adam(params, amsgrad=True), 4, 36),
    "adamax": Rule(Adamax, 3, 28),
    "nadam": Rule(NAdam, 3, 28),
    "lion": Rule(Lion, 2, 20),
    "newton": Rule(DiagonalNewton, 2, 20),
}

MANY = ("ResNet-50", "200 x 1,000", "10,000 x 64", "1 x 1,000")


class Spec(NamedTuple):
    """A rule over tensors, "ResNet-50" or "count x size" of them, and what else belongs to the step."""

    rule: str
    tensors: str = "1 x 25,000,000"
    dtype: str = "float32"
    extra: str = ""  # "clip": by the norm; "scaler": that, and a loss scaler; "ema": both, and averaged weights

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.rule, self.tensors, self.dtype.replace("float32", ""), self.extra)))


SPECS: tuple[Spec, ...] = (
    *(Spec(rule) for rule in RULES),
    *(Spec(rule, tensors) for tensors in MANY for rule in ("adamw", "momentum")),
    *(Spec("adamw", extra=extra) for extra in ("clip", "scaler", "ema")),
    Spec("adamw", "200 x 1,000", extra="scaler"),
    *(Spec("adamw", dtype="bfloat16", extra=extra) for extra in ("", "scaler", "ema")),
    Spec("adamw", "ResNet-50", "bfloat16"),
)


def cases(peers: Sequence[Peer] = ()) -> Iterator[Case]:
    """Every case, one at a time: the arrays of some are large."""
    return (case(spec, peers) for spec in SPECS)


def case(spec: Spec, peers: Sequence[Peer] = ()) -> Case:
    """One step over all tensors."""
    sizes = sizes_of(spec.tensors)
    params, grads = ([init.normal(n, seed=i, stream=s, dtype=spec.dtype) for i, n in enumerate(sizes)] for s in (0, 1))
    # Peers have no other forms of the step, and no masters.
    bare = not spec.extra and spec.dtype == "float32"
    beside = {name: work for peer in peers if bare for name, work in peer.steps(spec.rule, params, grads).items()}
    rule = RULES[spec.rule]
    # As many arrays as the rule changes, and those that it only reads: the gradient, and the rest of a window.
    yard, yard_bytes = update_yard(sum(sizes), rule.arrays, max(1, rule.path // 4 - 2 * rule.arrays))
    path, least = (sum(sizes) * per for per in bytes_of(spec))
    return Case(str(spec), step_of(spec, params, grads), path, least, yard, yard_bytes, beside)


def bytes_of(spec: Spec) -> tuple[int, int]:
    """Returns the bytes per parameter that pass, and that would if each array were read or written once."""
    path, narrow = RULES[spec.rule].path, spec.dtype != "float32"
    if narrow:  # the gradient is half as wide, and so are the parameters, which are written from the masters
        path += 2 - 4 + 2
    least = path
    if spec.extra:  # the gradients are read twice
        path += 2 if narrow else 4
    if spec.extra == "ema":
        path, least = (found + 8 + (2 if narrow else 4) for found in (path, least))
    return path, least


def step_of(spec: Spec, params: list[Any], grads: list[Any]) -> Work:
    """Returns the step with what belongs to it."""
    optimizer = RULES[spec.rule].make(params)
    if spec.rule == "newton":
        optimizer.step(grads, grads)  # the first needs a curvature
    if not spec.extra:
        return lambda: optimizer.step(grads)
    optimizer.clip_norm = 1.0
    scaler = None if spec.extra == "clip" else LossScaler()
    if spec.extra != "ema":
        return lambda: optimizer.step(grads, scaler=scaler)
    ema = WeightEMA(params)

    def work() -> None:
        optimizer.step(grads, scaler=scaler)
        ema.update()

    return work


def sizes_of(tensors: str) -> list[int]:
    """Returns the number of parameters in each tensor."""
    if tensors == "ResNet-50":
        return resnet50()
    count, size = (int(number.replace(",", "")) for number in tensors.split(" x "))
    return [size] * count


def resnet50() -> list[int]:
    """Returns the sizes of the 161 tensors of ResNet-50 (He et al. 2015, arXiv:1512.03385)."""
    sizes, width = [64 * 3 * 49, 64, 64], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for filters, channels in ((width * planes, planes), (9 * planes**2, planes), (4 * planes**2, 4 * planes)):
                sizes += [filters, channels, channels]
            if block == 0:
                sizes += [width * 4 * planes, 4 * planes, 4 * planes]
            width = 4 * planes
    return [*sizes, 1000 * width, 1000]
