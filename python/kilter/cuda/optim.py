"""Steps of optimizers: one launch for all tensors.

Bytes per float32 parameter, p and g included: 12 without state, 8 more for each number of state (4 in bfloat16); of a
window every row is read and one is written. With masters, 16-bit parameters are written and not read: 28 for Adam.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

from kilter._kilter import CHECK_ONLY, KilterError
from kilter.cuda import tensors
from kilter.cuda.launch import Launcher, Module
from kilter.cuda.source import DTYPES, Family, Limits
from kilter.cuda.tensors import TENSOR, THREADS, UNIT, Table


class Rule(NamedTuple):
    """A rule: its name in optim.cu, how many scalars it is given, and the state it changes."""

    struct: str
    scalars: int
    windows: int = 0
    slots: int = 0


RULES = {
    "sgd": Rule("Sgd", 2),
    "momentum": Rule("Momentum", 5, slots=1),
    "rmsprop": Rule("Squares", 7, slots=1),
    "rmsprop_momentum": Rule("SquaresMomentum", 7, slots=2),
    "rmsprop_centered": Rule("Centered", 7, slots=2),
    "rmsprop_centered_momentum": Rule("CenteredMomentum", 7, slots=3),
    "rmsprop_window": Rule("Windowed", 6, windows=1),
    "rmsprop_window_momentum": Rule("WindowedMomentum", 6, windows=1, slots=1),
    "adadelta": Rule("Adadelta", 4, slots=2),
    "adadelta_window": Rule("WindowedDelta", 7, windows=2, slots=1),
    "adam": Rule("Adam", 8, slots=2),
    "nadam": Rule("NAdam", 8, slots=2),
    "amsgrad": Rule("AmsGrad", 8, slots=3),
    "adamax": Rule("Adamax", 5, slots=2),
    "lion": Rule("Lion", 4, slots=1),
    "newton": Rule("Newton", 4, slots=1),
    "curvature": Rule("Curvature", 1),
    "average": Rule("Average", 1),
}
_GROUPS = 64  # with scalars of their own, in a launch
_BY_STRUCT = {rule.struct: rule for rule in RULES.values()}
_WIDTHS = {name: {"float64": 8, "float32": 4}.get(name, 2) for name in DTYPES}


def _built(variant: dict[str, Any]) -> bool:
    """Says whether a set of macros is one of those that steps ask for."""
    p, g, s, masters = variant["T"], variant["G"], variant["S"], variant["MASTERS"]
    rule = _BY_STRUCT[variant["RULE"]]
    if variant["H"] != 3 + rule.scalars:
        return False
    if p == "float64":
        return g == s == "float64" and not masters
    if "float64" in (g, s) or (p == "float32" and masters) or s == "float16":
        return False
    stateless = rule.windows + rule.slots == 0
    return not (stateless and s != "float32") and not (_WIDTHS[p] == _WIDTHS[g] == 2 and p != g)


def _rare(variant: dict[str, Any]) -> bool:
    """Says whether a set of macros is none of the usual ones: all rules in those, and Adam in every one."""
    p, g, s = variant["T"], variant["G"], variant["S"]
    usual = p == g and s == ("float64" if p == "float64" else "float32") and variant["MASTERS"] == (p == "bfloat16")
    return variant["RULE"] != "Adam" and not (usual and p != "float16")


def _scalar_stores(variant: dict[str, Any]) -> int:
    """Returns how many stores are smaller than 16 bytes: all of the elements at the end, and 16-bit ones by fours."""
    rule, masters = _BY_STRUCT[variant["RULE"]], int(variant["MASTERS"])
    state, p, s = rule.windows + rule.slots, _WIDTHS[variant["T"]], _WIDTHS[variant["S"]]
    ends = 1 + masters + state
    return ends if _narrow(p, s if state else 0, bool(masters)) else ends + int(p == 2) + state * int(s == 2)


def _narrow(p: Any, state: int, masters: bool) -> Any:
    """Says whether all that is written has 16 bits, by the bytes of parameters and state."""
    return (p == 2) & (state in (0, 2) and not masters)


FAMILY = Family(
    "optim",
    {"step": Limits(128, vectorised=True, scalar_stores=_scalar_stores)},
    types={"RULE": tuple(_BY_STRUCT), "T": DTYPES, "G": DTYPES, "S": DTYPES},
    macros={"MASTERS": (0, 1), "H": tuple(sorted({3 + rule.scalars for rule in RULES.values()}))},
    options=("-fmad=false",),
    built=_built,
    rare=_rare,
)


class Part(NamedTuple):
    """Tensors that have scalars of their own."""

    names: Sequence[str]
    params: Sequence[Any]
    grads: Sequence[Any]
    state: Sequence[Any]
    masters: Any


class Launch(NamedTuple):
    """The tensors of a step that have the same dtypes, and which rows of scalars they take."""

    module: Module
    table: Table
    resident: int
    groups: slice
    dtype: Any  # of the gradients


class Prepared:
    """A rule on parts, checked, with its tables on the device: it can be launched as long as the arrays stay there."""

    def __init__(self, cuda: Launcher, rule: str, parts: Sequence[Part]) -> None:
        if rule not in RULES:
            raise KilterError(f'rule: expected the name of a rule, got "{rule}"')
        self.cuda, self.rule = cuda, RULES[rule]
        self.name, self.rows = rule, max([a.shape[0] for part in parts for a in part.state if a.ndim == 2], default=1)
        grads = [g for part in parts for g in part.grads]
        found = [_rows(cuda, self.rule, part) for part in parts]
        self._looks = self._looked(grads)
        self._refs = [ref(g) for g in grads]
        self.launches: list[Launch] = []
        for first in range(0, len(parts), _GROUPS):
            groups = slice(first, min(first + _GROUPS, len(parts)))
            self.launches += _launches(cuda, self.rule, parts[groups], found[groups], groups)

    def fits(self, grads: Sequence[Any]) -> bool:
        """Says whether these are still the gradients: the same arrays, or others of their kind in their place."""
        if len(grads) != len(self._refs):
            return False
        if all(kept() is g for kept, g in zip(self._refs, grads, strict=True)):
            return True
        if not all(map(self.cuda.runtime.owns, grads)) or self._looked(grads) != self._looks:
            return False
        self._refs = [ref(g) for g in grads]
        return True

    def _looked(self, grads: Sequence[Any]) -> list[Any]:
        address = self.cuda.runtime.address
        return [(address(g), g.dtype, g.shape, g.flags.c_contiguous) for g in grads]

    def launch(self, h: Any) -> None:
        """Takes the step; h has a row of scalars for each part, or is that of the only one."""
        for one in self.launches:
            own = h[one.groups] if h.ndim == 2 else h
            groups = one.groups.stop - one.groups.start
            table, grid = one.table, one.table.grid(self.cuda, one.resident)
            arguments = (table.tensors, table.chunks, table.work, groups, own)
            one.module.launch("step", grid, THREADS, *arguments)


def _rows(cuda: Launcher, rule: Rule, part: Part) -> Any:
    """Returns the rows of a part's tensors in a table.

    Raises:
        KilterError: an array does not fit.
    """
    if not len(part.names) == len(part.params) == len(part.grads):
        raise KilterError(f"grads: expected {len(part.params)} arrays, got {len(part.grads)}")
    rows = np.zeros(len(part.params), TENSOR)
    like = next(iter(part.params), None)
    rows["p"] = tensors.checked(cuda, "params", part.names, part.params, like)
    rows["g"] = tensors.checked(cuda, "grads", part.names, part.grads, like)
    rows["n"] = [p.size for p in part.params]
    for name, p, g in zip(part.names, part.params, part.grads, strict=True):
        if p.shape != g.shape:
            raise KilterError(f"grads[{name}]: expected shape {p.shape}, got {g.shape}")
    windows, slots, masters = _state_of(cuda, rule, part)
    _check_dtypes(part)
    starts = _starts(part, rows["n"])
    for column, flats in (("windows", windows), ("slots", slots)):
        for k, flat in enumerate(flats):
            rows[column][:, k] = cuda.runtime.address(flat) + starts * flat.dtype.itemsize
    for flat in masters:
        rows["masters"] = cuda.runtime.address(flat) + starts * flat.dtype.itemsize
    if windows:
        rows["rows"], rows["stride"] = windows[0].shape
    _check_apart(cuda, part, rows)
    _align(rows, part, windows)
    return rows


def _state_of(cuda: Launcher, rule: Rule, part: Part) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the windows, the slots and the masters of a part."""
    masters = [] if part.masters is None else [part.masters]
    like = next(iter(part.params), None)
    tensors.checked(cuda, "state", [""] * len(part.state), part.state, like)
    tensors.checked(cuda, "masters", [""] * len(masters), masters, like)
    windows, slots = [a for a in part.state if a.ndim == 2], [a for a in part.state if a.ndim != 2]
    if (len(windows), len(slots)) != (rule.windows, rule.slots):
        wanted = f"{rule.windows} windows and {rule.slots} slots"
        raise KilterError(f"state: expected {wanted}, got {len(windows)} and {len(slots)}")
    if windows and (windows[0].shape[0] == 0 or any(a.shape != windows[0].shape for a in windows)):
        raise KilterError("state: expected windows of at least one row, and of as many, got others")
    return windows, slots, masters


def _check_dtypes(part: Part) -> None:
    """Refuses arrays of another arithmetic than the first parameter's."""
    if not part.params:
        return
    wide = part.params[0].dtype.itemsize == 8
    real = "float64" if wide else "float32"
    for role, arrays in (("params", part.params), ("grads", part.grads), ("state", part.state)):
        for i, array in enumerate(arrays):
            if (array.dtype.itemsize == 8) != wide:
                name = tensors.called(role, "" if role == "state" else part.names[i])
                raise KilterError(f"{name}: expected {real}, got {array.dtype.name}")
    if part.masters is not None and part.masters.dtype.name != real:
        raise KilterError(f"masters: expected {real}, got {part.masters.dtype.name}")
    if len({array.dtype for array in part.state}) > 1:
        raise KilterError(f"state: expected one dtype, got {', '.join(array.dtype.name for array in part.state)}")


def _starts(part: Part, sizes: Any) -> Any:
    """Returns where in flat state each tensor's begins: one after the other, or each at a multiple of a unit."""
    units = -(-sizes // UNIT) * UNIT
    flat = [("state", a) for a in part.state] + ([] if part.masters is None else [("masters", part.masters)])
    length = flat[0][1].shape[-1] if flat else 0
    for name, array in flat:
        if array.shape[-1] != length or length not in (sizes.sum(), units.sum()):
            raise KilterError(f"{name}: expected {sizes.sum()} elements, got {array.shape[-1]}")
    taken = sizes if length == sizes.sum() else units
    return (np.cumsum(taken) - taken).astype(np.uint64)


def _check_apart(cuda: Launcher, part: Part, rows: Any) -> None:
    flat = [*part.state, *([] if part.masters is None else [part.masters])]
    names = [tensors.called(role, name) for role in ("params", "grads") for name in part.names]
    names += ["state"] * len(part.state) + ["masters"] * (part.masters is not None)
    places = np.concatenate([rows["p"], rows["g"], np.array([cuda.runtime.address(a) for a in flat], np.uint64)])
    sizes = np.array([a.nbytes for a in (*part.params, *part.grads, *flat)], np.int64)
    written = np.ones(len(names), bool)
    written[len(rows) : 2 * len(rows)] = False
    tensors.apart(names, places, sizes, written)


def _align(rows: Any, part: Part, windows: Sequence[Any]) -> None:
    """Notes which tensors are aligned for vectors: of 16 bytes in the type of the arithmetic."""
    p, g = (np.array([a.dtype.itemsize for a in arrays], np.uint64) for arrays in (part.params, part.grads))
    state = np.uint64(part.state[0].dtype.itemsize if part.state else 0)
    narrow = _narrow(p, int(state), part.masters is not None)
    width = np.where(narrow, np.uint64(8), np.where(p == 8, np.uint64(2), np.uint64(4)))
    own = rows["slots"].copy() if not windows else np.hstack([rows["slots"], rows["windows"]])
    own = np.bitwise_or.reduce(own, axis=1) | (rows["stride"].astype(np.uint64) * state)
    words = [np.minimum(width * size, np.uint64(16)) for size in (p, g)]
    misaligned = rows["p"] % words[0] + rows["g"] % words[1] + rows["masters"] % np.uint64(16)
    rows["wide"] = misaligned + (own % (width * state) if state else np.uint64(0)) == 0
    rows["wide_g"] = rows["g"] % np.uint64(16) == 0


def _launches(
    cuda: Launcher, rule: Rule, parts: Sequence[Part], rows: Sequence[Any], groups: slice
) -> Iterator[Launch]:
    """Yields a launch for each combination of dtypes."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for group, (part, some) in enumerate(zip(parts, rows, strict=True)):
        some["group"] = group
        kinds = [(p.dtype, g.dtype) for p, g in zip(part.params, part.grads, strict=True)]
        for p, g in dict.fromkeys(kinds):
            state = part.state[0].dtype if part.state else np.dtype(f"f{max(p.itemsize, 4)}")
            chosen = some[[kind == (p, g) for kind in kinds]]
            found.setdefault((p, g, state, int(part.masters is not None)), []).append(chosen)
    like = next((p for part in parts for p in part.params), None)
    for (p, g, state, masters), chosen in found.items():
        module = cuda.module(FAMILY, RULE=rule.struct, T=p, G=g, S=state, MASTERS=masters, H=3 + rule.scalars)
        table = tensors.table(cuda, like, np.concatenate(chosen))
        yield Launch(module, table, _resident(rule, p, state, masters), groups, g)


def _resident(rule: Rule, p: Any, state: Any, masters: int) -> int:
    """Returns how many blocks a multiprocessor has registers for, as optim.cu says."""
    arrays = 2 * rule.windows + rule.slots
    narrow = arrays > 1 and _narrow(p.itemsize, state.itemsize, bool(masters))
    return 2 if p.itemsize == 8 else 4 - int(arrays + masters > 2) - int(narrow)


def prepare(cuda: Launcher, rule: str, parts: Sequence[Sequence[Any]]) -> Prepared:
    """Returns a rule on parts (names, params, grads, state, masters), checked; `prepared.launch(h)` takes steps.

    Raises:
        LayoutError: an array is not C-contiguous.
        KilterError: an array does not fit.
    """
    return Prepared(cuda, rule, [Part(*part) for part in parts])


def step(
    cuda: Launcher,
    rule: str,
    names: Sequence[str],
    params: Sequence[Any],
    grads: Sequence[Any],
    state: Sequence[Any],
    masters: Any,
    h: Any,
    flags: int,
) -> None:
    """Updates params, state and masters by a rule; h = (scale and limit of gradients, oldest, scalars of the rule).

    A negative `oldest` on the device says that nothing is to be changed.
    """
    prepared = prepare(cuda, rule, [(names, params, grads, state, masters)])
    if h.size < 3:
        raise KilterError(f"h: expected at least three numbers, got {h.size}")
    if h.shape != (3 + prepared.rule.scalars,):
        raise KilterError(f"h: expected {prepared.rule.scalars} scalars for {rule}, got {h.size - 3}")
    if not cuda.runtime.owns(h) and not 0 <= h[2] < prepared.rows:
        raise KilterError(f"h: expected the number of one of {prepared.rows} rows, got {h[2]:g}")
    if not flags & CHECK_ONLY:
        prepared.launch(h)


def average(
    cuda: Launcher, averages: Sequence[Any], values: Sequence[Any], momentum: float, prepared: Prepared | None = None
) -> Prepared:
    """Moves every s of `averages` to s + momentum * (x - s), x in `values`; a momentum of 1 copies.

    Returns:
        What the next call on the same averages may be given, so that arrays which stay where they are are not checked
        again.
    """
    if prepared is None or not prepared.fits(values):
        names = [str(i) for i in range(len(averages))]
        prepared = prepare(cuda, "average", [(names, averages, values, [], None)])
    prepared.launch(np.array((1.0, np.inf, 0.0, momentum)))
    return prepared


FAMILIES = (FAMILY,)
OPS = {"prepare": prepare, "step": step, "average": average}
