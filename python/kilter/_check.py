"""Checks of arguments, with one wording, and the layouts that arrays may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from kilter._backend import KilterError, backend_of, place

__all__ = ["KilterError", "dtype_of", "fail", "number", "same_memory", "seed_and_stream"]

# The numbers of NumPy's own floating-point types; comparing them costs a fraction of comparing names.
_FLOAT64 = np.dtype(np.float64)
_FLOAT32 = np.dtype(np.float32)
_REAL = {_FLOAT64.num: _FLOAT64, _FLOAT32.num: _FLOAT32, np.dtype(np.float16).num: _FLOAT32}


def fail(argument: str, wanted: str, got: object) -> NoReturn:
    """Raises the error that every wrong argument gets."""
    raise KilterError(f"{argument}: expected {wanted}, got {got}")


def arithmetic(argument: str, dtype: Any) -> Any:
    """Returns the dtype in which kernels compute on data of `dtype`: float32 for 16-bit and float32 data."""
    real = _REAL.get(dtype.num)
    if real is not None:
        return real
    if dtype.name == "bfloat16":
        _REAL[dtype.num] = _FLOAT32
        return _FLOAT32
    return fail(argument, "dtype float64, float32, float16 or bfloat16", f"dtype {dtype}")


def dtype_of(argument: str, dtype: Any) -> Any:
    """Returns `dtype`, which may be a name, as a dtype of data."""
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    try:
        found = np.dtype(dtype)
    except TypeError:
        fail(argument, "dtype float64, float32, float16 or bfloat16", repr(dtype))
    arithmetic(argument, found)
    return found


def number(
    argument: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """Returns `value` as a float in [low, high], or in (low, high] with `open_low`; never NaN."""
    if isinstance(value, str):
        fail(argument, "a number", repr(value))
    try:
        found = float(value)
    except (TypeError, ValueError):
        fail(argument, "a number", repr(value))
    if not (low < found if open_low else low <= found) or not found <= high:
        fail(argument, f"a number in {'(' if open_low else '['}{low:g}, {high:g}]", repr(value))
    return found


def array(argument: str, value: Any) -> Any:
    """Returns `value`, which must be an array of some library."""
    if value is None:
        fail(argument, "an array", "None")
    if type(value) is not np.ndarray:
        backend_of(value, names=(argument,))
    return value


def same_dtype(one: Any, other: Any) -> bool:
    """Says whether two dtypes are equal but for the byte order."""
    return one == other or one.newbyteorder("=") == other.newbyteorder("=")  # type: ignore[no-any-return]


def entries(state: Any, wanted: set[str]) -> None:
    """Refuses a state dict that has not exactly the wanted entries."""
    if not isinstance(state, Mapping):
        fail("state", "a dict", type(state).__name__)
    if set(state) != wanted:
        fail("state", f"the entries {', '.join(sorted(wanted))}", ", ".join(sorted(map(str, state))) or "none")


def ready(x: Any) -> bool:
    """Says whether kernels can read `x` where it lies: C order, aligned, native byte order."""
    flags = x.flags
    # Arrays on a device are always aligned and have no flag for it.
    return bool(flags.c_contiguous and getattr(flags, "aligned", True) and x.dtype.isnative)


def writable(x: Any) -> bool:
    """Says whether `x` may be written; arrays on a device have no flag for it."""
    return bool(getattr(x.flags, "writeable", True))


def contiguous(xp: Any, x: Any) -> Any:
    """Returns `x`, or a copy in C order, aligned and of native byte order."""
    if ready(x):
        return x
    return xp.array(x, dtype=x.dtype.newbyteorder("="), order="C", copy=True)


def vector(xp: Any, argument: str, values: Any, channels: int, real: Any, data: Any) -> Any:
    """Returns per-channel values as a contiguous vector of the arithmetic's dtype."""
    if values is None:
        return None
    if values.shape != (channels,):
        fail(argument, f"shape ({channels},)", f"shape {values.shape}")
    if values.dtype != real:
        if not same_dtype(values.dtype, data) and not same_dtype(values.dtype, real):
            allowed = f"dtype {real}" if same_dtype(data, real) else f"dtype {data} or {real}"
            fail(argument, allowed, f"dtype {values.dtype}")
        return values.astype(real)
    return contiguous(xp, values)


def same_memory(xp: Any, argument: str, out: Any, x: Any) -> bool:
    """Says whether `out` lies exactly where `x` lies.

    Raises:
        KilterError: the two share a part of their memory.
    """
    if out is x:
        return True
    if not xp.may_share_memory(out, x):
        return False
    if place(out) == place(x) and out.shape == x.shape and out.strides == x.strides:
        return True
    if xp.shares_memory(out, x):
        fail(argument, "memory of its own, or exactly that of the input", "a partial overlap")
    return False


def over_original(xp: Any, out: Any, x: Any, seen: Any) -> bool:
    """Returns whether `out` lies over x, of which `seen` is a copy; false where `seen` is x itself or a view of it."""
    return seen is not x and not xp.may_share_memory(seen, x) and bool(xp.shares_memory(out, x))


def apart(xp: Any, out: Any, *arguments: Any) -> None:
    """Refuses an output that lies over an argument."""
    if any(argument is not None and xp.shares_memory(out, argument) for argument in arguments):
        fail("out", "memory of its own", "memory of another argument")


def communicator(comm: Any) -> Any:
    """Returns `comm`, which must be None or have the calls of a communicator."""
    if comm is not None and not all(callable(getattr(comm, name, None)) for name in ("all_gather", "all_reduce")):
        fail("comm", "a communicator", type(comm).__name__)
    return comm


def seed_and_stream(seed: Any, stream: Any) -> tuple[int, int]:
    """Returns a 64-bit seed and a 32-bit stream."""
    for argument, value, bits in (("seed", seed, 64), ("stream", stream, 32)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 0 <= value < 1 << bits:
            fail(argument, f"a whole number from 0 to 2**{bits} - 1", repr(value))
    return int(seed), int(stream)
