"""Tells NumPy from CuPy: the only place that does.

A backend is an array module `xp` and a table of operations `ops` that work on its arrays: the Rust extension for NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kilter import _kilter

KilterError = _kilter.KilterError


class Backend(NamedTuple):
    """An array module and the operations on its arrays."""

    xp: Any
    ops: Any


NUMPY = Backend(np, _kilter)
_registered: dict[type, Backend] = {np.ndarray: NUMPY}
_HOST = frozenset((np.ndarray, type(None)))


def place(array: Any) -> int:
    """Returns the address of an array's first element."""
    if type(array) is np.ndarray:
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.__array_interface__["data"][0])


def register(array_type: type, xp: Any, ops: Any) -> None:
    """Makes `array_type` an array type whose module is `xp` and whose operations are `ops`."""
    _registered[array_type] = Backend(xp, ops)


def backend_of(*arrays: Any, names: Sequence[str] = ()) -> Backend:
    """Returns the backend of the arrays, which must all be of one library; None stands for a missing one.

    `names` are what messages call them.

    Raises:
        KilterError: an argument is no array, or the arrays come from two libraries or lie on two devices.
    """
    if _HOST.issuperset(map(type, arrays)):
        return NUMPY
    found: Backend | None = None
    for index, array in enumerate(arrays):
        if array is None:
            continue
        backend = _registered.get(type(array)) or _look_up(array, names[index] if names else "array")
        if found is not None and backend is not found:
            _refuse(arrays, names, index, found.xp.__name__, backend.xp.__name__)
        found = backend
    if found is None or found is NUMPY:
        return NUMPY
    device = next(array.device for array in arrays if array is not None)
    for index, array in enumerate(arrays):
        if array is not None and array.device != device:
            _refuse(arrays, names, index, device, array.device)
    return found


def _refuse(arrays: Sequence[Any], names: Sequence[str], index: int, wanted: object, got: object) -> NoReturn:
    """Says that an array is not where the first one is."""
    first = next(i for i, array in enumerate(arrays) if array is not None)
    one, other = (names[i] if names else "array" for i in (first, index))
    raise KilterError(f"{other}: expected an array of {wanted}, as {one} is, got one of {got}")


def _connect_cupy(name: str) -> Backend:
    """Makes CuPy's arrays known when the first one comes; `import kilter` neither needs nor loads CuPy."""
    from kilter.cuda.ops import table
    from kilter.cuda.runtime import CupyRuntime

    try:
        runtime = CupyRuntime()
    except ImportError:
        raise KilterError(
            f"{name}: expected a NumPy array, got cupy.ndarray; pip install 'kilter[cuda13]' or 'kilter[cuda12]' "
            "brings what its kernels need, cupy.asnumpy(a) copies it to the host"
        ) from None
    register(runtime.xp.ndarray, runtime.xp, table(runtime))
    return _registered[runtime.xp.ndarray]


def _look_up(array: Any, name: str) -> Backend:
    for array_type in type(array).__mro__:
        if array_type in _registered:
            return _registered[array_type]
    kind = type(array)
    if kind.__module__.split(".")[0] == "cupy" and kind.__name__ == "ndarray":
        return _connect_cupy(name)
    got = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    hint = ""
    if kind.__module__.split(".")[0] == "torch":
        hint = "; np.asarray(t.detach()) shares the memory of a CPU tensor"
    elif isinstance(array, (list, tuple, int, float)):
        hint = "; np.asarray(a) converts it"
    raise KilterError(f"{name}: expected a NumPy array, got {got}{hint}")


def backend_named(device: str) -> Backend:
    """Returns the backend of a device, "cpu" or "cuda".

    Raises:
        KilterError: there is no such device, or what it needs is missing.
    """
    if device == "cpu":
        return NUMPY
    if device != "cuda":
        raise KilterError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    try:
        import cupy
    except ImportError:
        raise KilterError(
            "device: expected CuPy for 'cuda', got none; pip install 'kilter[cuda13]' or 'kilter[cuda12]' brings it"
        ) from None
    if not cupy.cuda.is_available():
        raise KilterError("device: expected a CUDA device and its driver for 'cuda', found none")
    return backend_of(cupy.empty(0))


def beside(array: Any) -> AbstractContextManager[Any]:
    """Returns a context in which new arrays lie on the device of `array`."""
    device: Any = getattr(array, "device", None)
    found: AbstractContextManager[Any] = device if hasattr(device, "__enter__") else nullcontext()
    return found


def host(array: Any) -> Any:
    """Returns a NumPy array with the values of an array of any library: itself where it is one."""
    return array.get() if hasattr(array, "get") else np.asarray(array)
