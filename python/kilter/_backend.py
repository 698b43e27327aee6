"""Tells NumPy from CuPy: the only place that does.

A backend is an array module `xp` and a table of operations `ops` that work on its arrays: the Rust extension for NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter import _kilter

KilterError = _kilter.KilterError


class Backend(NamedTuple):
    """An array module and the operations on its arrays."""

    xp: Any
    ops: Any


NUMPY = Backend(np, _kilter)
_registered: dict[type, Backend] = {np.ndarray: NUMPY}


def register(array_type: type, xp: Any, ops: Any) -> None:
    """Makes `array_type` an array type whose module is `xp` and whose operations are `ops`."""
    _registered[array_type] = Backend(xp, ops)


def backend_of(*arrays: Any, names: Sequence[str] = ()) -> Backend:
    """Returns the backend of the arrays, which must all be of one library; None stands for a missing one.

    `names` are what messages call them.

    Raises:
        KilterError: an argument is no array, or the arrays come from two libraries.
    """
    found: Backend | None = None
    for index, array in enumerate(arrays):
        if array is None:
            continue
        backend = _registered.get(type(array)) or _look_up(array, names[index] if names else "array")
        if found is not None and backend is not found:
            raise KilterError(
                f"arrays: expected all from one library, got {found.xp.__name__} and {backend.xp.__name__}"
            )
        found = backend
    return found or NUMPY


def _look_up(array: Any, name: str) -> Backend:
    for array_type in type(array).__mro__:
        if array_type in _registered:
            return _registered[array_type]
    kind = type(array)
    got = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    hint = ""
    if kind.__module__.split(".")[0] == "torch":
        hint = "; np.asarray(t.detach()) shares the memory of a CPU tensor"
    elif kind.__module__.split(".")[0] == "cupy":
        hint = "; this version of kilter has no operations for it, cupy.asnumpy(a) copies it to the host"
    elif isinstance(array, (list, tuple, int, float)):
        hint = "; np.asarray(a) converts it"
    raise KilterError(f"{name}: expected a NumPy array, got {got}{hint}")
