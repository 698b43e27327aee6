"""Structures of arrays, as optimizers take them: a list, a dict name -> array, or a list of groups of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kilter import _check
from kilter._backend import Backend, backend_of
from kilter._check import fail
from kilter.optim.arrays import differences

HOLDERS = (Mapping, list, tuple)


def named(argument: str, tree: Any) -> dict[str, Any]:
    """Returns the arrays of a structure by name, in its order; those without a name are called by their number.

    Raises:
        KilterError: `tree` is no structure of arrays of a floating-point dtype, or a name stands twice.
    """
    found: dict[str, Any] = {}
    for holder in _holders(argument, tree):
        first = len(found)
        for key, array in holder.items() if isinstance(holder, Mapping) else enumerate(holder, first):
            if not isinstance(key, (int, str)):
                fail(argument, "names that are strings", repr(key))
            name = str(key)
            if name in found:
                fail(argument, "every name once", f"{name!r} twice")
            _check.array(f"{argument}[{name}]", array)
            _check.arithmetic(f"{argument}[{name}]", array.dtype)
            found[name] = array
    return found


def rebuilt(tree: Any, arrays: Iterable[Any]) -> Any:
    """Returns other arrays in the structure of `tree`; groups without their options."""
    following = iter(arrays)
    holders = [
        {name: next(following) for name in holder} if isinstance(holder, Mapping) else [next(following) for _ in holder]
        for holder in _holders("tree", tree)
    ]
    return holders if _grouped(tree) else holders[0]


def matched(argument: str, tree: Any, like: Mapping[str, Any]) -> list[Any]:
    """Returns the arrays of `tree` in the order of those in `like`, whose names and shapes they have.

    Raises:
        KilterError: an array is missing, is too much or has another shape.
    """
    given = named(argument, tree)
    missing, extra = like.keys() - given.keys(), given.keys() - like.keys()
    if missing or extra:
        fail(argument, "one array for each parameter", differences(missing, extra))
    for name, own in like.items():
        if given[name].shape != own.shape:
            fail(f"{argument}[{name}]", f"shape {own.shape}", f"shape {given[name].shape}")
    return [given[name] for name in like]


def backend(argument: str, arrays: Mapping[str, Any]) -> Backend:
    """Returns the backend of the arrays, which must be of one library."""
    return backend_of(*arrays.values(), names=[f"{argument}[{name}]" for name in arrays])


def check_writable(argument: str, arrays: Mapping[str, Any]) -> None:
    """Refuses arrays that cannot be changed in place, and one that stands twice."""
    seen: dict[int, str] = {}
    for name, array in arrays.items():
        if not _check.writable(array):
            fail(f"{argument}[{name}]", "a writable array", "a read-only one")
        other = seen.setdefault(id(array), name)
        if other != name:
            fail(f"{argument}[{name}]", "an array of its own", f"that of {argument}[{other}]")


def _grouped(tree: Any) -> bool:
    return isinstance(tree, (list, tuple)) and any(isinstance(one, HOLDERS) for one in tree)


def _holders(argument: str, tree: Any) -> list[Any]:
    """Returns the dicts and lists that hold the arrays: one, or one for each group."""
    if not isinstance(tree, HOLDERS):
        fail(argument, "a list or a dict of arrays", type(tree).__name__)
    if not _grouped(tree):
        return [tree]
    holders = [one["params"] if isinstance(one, Mapping) and "params" in one else one for one in tree]
    for index, holder in enumerate(holders):
        if not isinstance(holder, HOLDERS):
            fail(f"{argument}[{index}]", "a list or a dict of arrays", type(holder).__name__)
    return holders
