"""Options of optimizers: how they are checked, read at a step, and saved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from kilter import _check
from kilter._check import fail

__all__ = ["Number", "at", "check_betas", "check_flags", "check_numbers", "numbers", "restored"]

Number = float | Callable[[int], float]

MOST = sys.float_info.max  # options are finite

SCHEDULED = frozenset(("lr", "weight_decay", "momentum"))  # and the first beta


def check_numbers(options: Mapping[str, Any], *keys: str, high: float = MOST, below: float | None = None) -> None:
    """Refuses options outside [0, high], or [0, below); those that may be schedules pass as functions."""
    for key in keys:
        if key in SCHEDULED and callable(options[key]):
            continue
        _number(key, options[key], high, below)


def _number(key: str, value: Any, high: float, below: float | None) -> None:
    _check.number(key, value, 0.0, high if below is None else below)
    if value == below:
        fail(key, f"a number below {below:g}", f"{value:g}")


def check_betas(options: Mapping[str, Any]) -> None:
    """Refuses betas that are not two numbers in [0, 1); the first may be a function."""
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        fail("betas", "two numbers", repr(betas))
    for index, beta in enumerate(betas):
        if not (index == 0 and callable(beta)):
            _number(f"betas[{index}]", beta, 1.0, 1.0)


def check_flags(options: Mapping[str, Any], *keys: str) -> None:
    """Refuses options that are neither True nor False."""
    for key in keys:
        if not isinstance(options[key], bool):
            fail(key, "True or False", repr(options[key]))


def check_window(options: Mapping[str, Any]) -> None:
    """Refuses a window that is neither None nor a number of steps."""
    window = options["window"]
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        fail("window", "None or a whole number of at least 1", repr(window))


def at(key: str, value: Any, call: int) -> Any:
    """Returns what an option is at a call: schedules read the number of calls before it."""
    if isinstance(value, (tuple, list)):
        return tuple(at(f"{key}[{index}]", one, call) for index, one in enumerate(value))
    if not callable(value):
        return value
    found = value(call)
    if callable(found):
        fail(key, "a number from the schedule", repr(found))
    return found


def numbers(key: str, value: Any) -> dict[str, Any]:
    """Returns the numbers in an option under flat keys."""
    if isinstance(value, (tuple, list)):
        return {k: v for i, one in enumerate(value) for k, v in numbers(f"{key}.{i}", one).items()}
    return {key: value} if isinstance(value, (bool, int, float)) else {}


def restored(group: Mapping[str, Any], prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group's options with the numbers of `state` in place of its own; schedules stay."""

    def value(key: str, own: Any) -> Any:
        if isinstance(own, (tuple, list)):
            return tuple(value(f"{key}.{i}", one) for i, one in enumerate(own))
        return type(own)(state[key]) if isinstance(own, (bool, int, float)) and key in state else own

    return {key: value(f"{prefix}.{key}", own) for key, own in group.items() if key != "params"}
