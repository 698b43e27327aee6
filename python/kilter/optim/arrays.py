"""Parameters, gradients and state as arrays: structures, checks, and the flat layout that kernels work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from kilter import _check, _kilter
from kilter._backend import Backend, backend_of, host, place
from kilter._check import fail


class Slot(NamedTuple):
    """A number of state per parameter, or with `rows` a window of several."""

    name: str
    rows: int | None = None
    start: float = 0.0

    def __str__(self) -> str:
        rows = "" if self.rows is None else f" of {self.rows} rows"
        return f"{self.name}{rows}" + (f" from {self.start:g}" if self.start else "")

    def shape(self, *shape: int) -> tuple[int, ...]:
        """Returns the shape of the state of parameters of that shape."""
        return shape if self.rows is None else (self.rows, *shape)


class Bucket:
    """Parameters that share options, dtype and clock, with one flat array per slot of state.

    On a device each parameter's state begins at a multiple of the unit of its operations, so that vectors are aligned.
    """

    def __init__(
        self,
        backend: Backend,
        group: int,
        slots: tuple[Slot, ...],
        masters: bool,
        clock: dict[str, float],
        frozen: bool,
    ) -> None:
        self.xp, self.unit = backend.xp, getattr(backend.ops, "STATE_UNIT", 1)
        self.group, self.slots, self.frozen = group, slots, frozen
        self.has_masters = masters
        self.clock = clock
        self.names: list[str] = []
        self.params: list[Any] = []
        self.state: list[Any] = []
        self.masters: Any = None
        self.checked: tuple[Any, ...] | None = None  # what the group held when `options` were read, but for schedules
        self.options: dict[str, Any] = {}

    def fill(self, old: Mapping[str, Mapping[str, Any]], state_dtype: Any) -> None:
        """Allocates the state and takes over that of the parameters that had some."""
        real = _check.arithmetic("params", self.params[0].dtype)
        size = sum(self._taken(p) for p in self.params)
        self.state = [self.xp.full(slot.shape(size), slot.start, state_dtype or real) for slot in self.slots]
        self.masters = self.xp.empty(size, real) if self.has_masters else None
        for (name, part), p in zip(self.parts(), self.params, strict=True):
            kept = old[name]["arrays"] if name in old else {}
            for slot, array in part["arrays"].items():
                if slot in kept:
                    array[...] = self._here(kept[slot])
                elif slot == "master":
                    array[...] = p

    def parts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields each parameter's name, state (views in the parameter's shape) and clock."""
        flat = list(zip(self.slots, self.state, strict=True))
        if self.masters is not None:
            flat.append((Slot("master"), self.masters))
        start = 0
        for name, p in zip(self.names, self.params, strict=True):
            views = {slot.name: a[..., start : start + p.size].reshape(slot.shape(*p.shape)) for slot, a in flat}
            yield name, {"arrays": views, "clock": dict(self.clock)}
            start += self._taken(p)

    def _taken(self, p: Any) -> int:
        """Returns how many elements of flat state a parameter takes."""
        return int(-(-p.size // self.unit) * self.unit)

    def _here(self, array: Any) -> Any:
        """Returns an array of this library with the values of one of any."""
        return array if backend_of(array).xp is self.xp else self.xp.asarray(host(array))

    def loaded(self, name: str, part: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a parameter's part with the values of `state`.

        Raises:
            KilterError: a shape differs.
        """
        arrays = {}
        for slot, own in part["arrays"].items():
            key = f"state.{name}.{slot}"
            given = _check.array(f"state[{key}]", state[key])
            if given.shape != own.shape or given.dtype != own.dtype:
                fail(f"state[{key}]", f"{own.dtype} of shape {own.shape}", f"{given.dtype} of shape {given.shape}")
            arrays[slot] = given
        clock = {
            key: _check.number(f"state[state.{name}.{key}]", state[f"state.{name}.{key}"]) for key in part["clock"]
        }
        return {"arrays": arrays, "clock": clock}


def groups_of(params: Any) -> tuple[list[dict[str, Any]], str]:
    """Returns parameters as groups of dicts, and what they came as: a list, a dict or groups."""
    if isinstance(params, Mapping):
        for name in params:
            if not isinstance(name, str):
                fail("params", "names that are strings", repr(name))
        return [{"params": dict(params)}], "dict"
    if not isinstance(params, (list, tuple)):
        fail("params", "a list, a dict or a list of groups", type(params).__name__)
    if not params or not any(isinstance(one, Mapping) for one in params):
        return [{"params": dict(enumerate(params))}], "list"
    groups = []
    for group in params:
        if not isinstance(group, Mapping) or "params" not in group:
            fail("params", "groups that are dicts with the key 'params'", type(group).__name__)
        inner = group["params"]
        if not isinstance(inner, (Mapping, list, tuple)):
            fail("params", "a list or a dict of arrays in each group", type(inner).__name__)
        groups.append({**group, "params": dict(inner) if isinstance(inner, Mapping) else dict(enumerate(inner))})
    return groups, "groups"


def state_dtype(dtype: Any) -> Any:
    """Returns the dtype that state has, None for that of the arithmetic."""
    if dtype is None:
        return None
    found = _check.dtype_of("state_dtype", dtype)
    if found.name not in ("float32", "bfloat16"):
        fail("state_dtype", "None, 'float32' or 'bfloat16'", repr(dtype))
    return found


def check_param(name: str, p: Any) -> None:
    """Refuses a parameter that kernels could not update in place."""
    argument = f"params[{name}]"
    _check.array(argument, p)
    _check.arithmetic(argument, p.dtype)
    if not _check.ready(p):
        fail(argument, "a C-contiguous, aligned array of native byte order", f"strides {p.strides}, dtype {p.dtype}")
    if not _check.writable(p):
        fail(argument, "a writable array", "a read-only one")


def check_like(argument: str, value: Any, p: Any) -> None:
    """Refuses what is no array of a parameter's shape and arithmetic."""
    _check.array(argument, value)
    if value.shape != p.shape:
        fail(argument, f"shape {p.shape}", f"shape {value.shape}")
    if _check.arithmetic(argument, value.dtype) != _check.arithmetic("params", p.dtype):
        fail(argument, f"dtype {_check.arithmetic('params', p.dtype)}", f"dtype {value.dtype}")


def check_apart(params: Mapping[str, Any]) -> None:
    """Refuses parameters that share memory."""
    ranges = []
    for name, p in params.items():
        if p.size:
            start = place(p)
            ranges.append((start, start + p.nbytes, name))
    ranges.sort()
    for (_, end, first), (start, _, second) in pairwise(ranges):
        if start < end:
            fail(f"params[{second}]", "memory of its own", f"memory shared with params[{first}]")


class Rule(NamedTuple):
    """An update rule at a step: the kernel's name for it, its scalars, and the row of windows that it replaces."""

    name: str
    scalars: tuple[float, ...]
    oldest: int = 0


class Pass:
    """One call of the kernel: a rule on a bucket's parameters, or on arrays that take their place."""

    def __init__(
        self, bucket: Bucket, grads: list[Any], rule: Rule, clock: dict[str, float], options: Mapping[str, Any]
    ) -> None:
        self.bucket, self.grads, self.rule, self.options = bucket, grads, rule, options
        self.clock = clock  # of the bucket, once this has run
        self.params, self.state, self.masters = bucket.params, bucket.state, bucket.masters
        self.of_gradients = True  # which are scaled and clipped

    def scan(self, ops: Any, found: Any) -> None:
        """Fills `found` with the sum of the squares of the gradients, and whether all are finite."""
        self._retried(lambda grads: ops.grad_scan(self.bucket.names, grads, found))

    def launch(self, ops: Any, scale: float, limit: float, flags: int) -> None:
        """Takes the step, or only checks every argument."""
        scaled = (scale, limit) if self.of_gradients else (1.0, math.inf)
        h = np.array((*scaled, self.rule.oldest, *self.rule.scalars), "float64")
        self._retried(
            lambda grads: ops.step(
                self.rule.name, self.bucket.names, self.params, grads, self.state, self.masters, h, flags
            )
        )

    def _retried(self, call: Callable[[list[Any]], None]) -> None:
        """Calls with the gradients, or with copies in C order where their layout needs it; keeps what was used."""
        try:
            call(self.grads)
        except _kilter.LayoutError:
            self.straighten()
            call(self.grads)
        except _check.KilterError:
            self.blame()
            raise

    def straighten(self) -> None:
        """Puts copies in C order in the place of gradients whose layout needs it."""
        self.grads = [_check.contiguous(self.bucket.xp, g) for g in self.grads]

    def blame(self) -> None:
        """Refuses gradients from elsewhere, of which the backend says more than the kernel."""
        names = [f"grads[{name}]" for name in self.bucket.names]
        backend_of(self.bucket.params[0], *self.grads, names=("params", *names))


def match(
    grads: Any,
    structure: str,
    groups: list[dict[str, Any]],
    buckets: list[Bucket],
    frozen: set[str],
    argument: str = "grads",
) -> list[list[Any]]:
    """Returns the gradients of each bucket's parameters, in their order."""
    if structure == "groups" and isinstance(grads, Mapping):
        structure = "dict"
    if structure == "dict":
        if not isinstance(grads, (dict, Mapping)):  # a dict is known at once
            fail(argument, "a dict name -> array", type(grads).__name__)
        named = grads
    else:
        if not isinstance(grads, (list, tuple)):
            fail(argument, f"a list, as the {structure} of parameters", type(grads).__name__)
        if structure == "groups":
            grads = _of_groups(argument, grads, groups)
        if len(buckets) == 1 and not frozen and len(grads) == len(buckets[0].names):
            return [list(grads)]
        names = [name for group in groups for name in group["params"]]
        if len(grads) != len(names):
            fail(argument, f"{len(names)} gradients", len(grads))
        named = dict(zip(names, grads, strict=True))
    try:
        found = [[named[name] for name in bucket.names] for bucket in buckets]
    except KeyError:
        found = []
    if not found or len(named) != sum(map(len, found)):
        wanted = {name for bucket in buckets for name in bucket.names}
        missing, extra = wanted - set(named), set(named) - wanted - frozen
        if missing or extra:
            fail(argument, "one for each parameter", differences(missing, extra))
    return found


def _of_groups(argument: str, grads: Any, groups: list[dict[str, Any]]) -> list[Any]:
    """Returns the gradients of all groups in one list."""
    if len(grads) != len(groups):
        fail(argument, f"{len(groups)} groups", len(grads))
    flat: list[Any] = []
    for index, (given, group) in enumerate(zip(grads, groups, strict=True)):
        inner = given["params"] if isinstance(given, Mapping) and "params" in given else given
        if isinstance(inner, Mapping):
            missing, extra = set(group["params"]) - set(inner), set(inner) - set(group["params"])
            if missing or extra:
                fail(f"{argument}[{index}]", "one for each parameter", differences(missing, extra))
            inner = [inner[name] for name in group["params"]]
        if not isinstance(inner, (list, tuple)) or len(inner) != len(group["params"]):
            fail(f"{argument}[{index}]", f"{len(group['params'])} gradients", "another structure")
        flat.extend(inner)
    return flat


def differences(missing: set[str], extra: set[str]) -> str:
    """Says what is missing and what is too much."""
    parts = [f"{word} {', '.join(sorted(map(str, some)))}" for word, some in (("no", missing), ("also", extra)) if some]
    return " and ".join(parts)
