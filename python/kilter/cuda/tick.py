"""What changes from step to step on the device: whether a step is skipped, its scale, its clocks and its scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter.cuda.launch import Launcher
from kilter.cuda.optim import RULES
from kilter.cuda.source import Family, Limits

FAMILY = Family("tick", {"tick": Limits(64)}, types={})

# How the scalars of a rule depend on its clock, by its number in tick.cu, and how many numbers the clock needs besides.
_KINDS = {
    "momentum": (1, 1),
    "rmsprop": (2, 1),
    "rmsprop_window": (3, 2),
    "rmsprop_window_momentum": (3, 2),
    "adadelta_window": (4, 2),
    "adam": (5, 0),
    "amsgrad": (5, 0),
    "adamax": (6, 0),
    "nadam": (7, 2),
    "newton": (8, 1),
}
_PASS = np.dtype(
    [
        ("options", "u8"),
        ("clock", "u8"),
        ("h", "u8"),
        ("kind", "i4"),
        ("scalars", "i4"),
        ("of_gradients", "i4"),
        ("unused", "i4"),
    ]
)


class Pass(NamedTuple):
    """A rule on a group of parameters: where its options, clock and scalars lie on the device.

    The options are the scalars of the rule at the first step with products of zero, then what the clock needs: of
    momentum the dampening, of rmsprop the decay of the learning rate, of the windows rho and their length, of nadam the
    learning rate and the decay of mu, of newton the beta, which is 1 at a step without a curvature.
    """

    rule: str
    options: Any
    clock: Any  # applied steps, then products; None where another pass moves it
    h: Any
    of_gradients: bool


def passes(cuda: Launcher, found: Sequence[Sequence[Any]]) -> Any:
    """Returns the table of passes (see `Pass`) on the device."""
    address = cuda.runtime.address
    rows = np.zeros(len(found), _PASS)
    for row, one in zip(rows, map(Pass._make, found), strict=True):
        row["options"], row["h"] = address(one.options), address(one.h)
        row["clock"] = 0 if one.clock is None else address(one.clock)
        row["kind"], row["scalars"] = _KINDS.get(one.rule, (0, 0))[0], RULES[one.rule].scalars
        row["of_gradients"] = one.of_gradients
    return cuda.xp.asarray(rows.view(np.uint64))


def tick(
    cuda: Launcher,
    table: Any,
    found: Any,
    scans: int,
    scaler: Any,
    applied: Any,
    report: Any,
    run: Any,
) -> None:
    """Moves the clocks by a step, or says in h that it is skipped; fills h of every pass, and report.

    Args:
        table: of the passes.
        found: what `scans` calls of grad_scan filled, that of the gradients first.
        scaler: (scale, clean steps), which is advanced; or None.
        applied: the number of applied steps so far, which is advanced.
        report: filled with (applied, norm of the gradients, skipped).
        run: (clip_norm, clip_value, sign of the step, skip or not; growth, backoff, interval, minimum of the scaler).
    """
    count = table.nbytes // _PASS.itemsize
    cuda.module(FAMILY).launch("tick", 1, 256, table, count, found, scans, scaler, applied, report, run)


def capturing(cuda: Launcher) -> bool:
    """Says whether the current stream records a CUDA graph."""
    return cuda.runtime.capturing()


FAMILIES = (FAMILY,)
OPS = {"passes": passes, "tick": tick, "capturing": capturing}
