"""Tables of tensors on the device: what lets one launch work on all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter._kilter import KilterError, LayoutError
from kilter.cuda.launch import Launcher, blocks

THREADS = 256  # of a block
UNIT = 64  # elements: where the state of a tensor begins is a multiple, if state is laid out apart
CHUNK = 1024  # elements that a warp takes at once
_KEPT = 32  # tables that are remembered

TENSOR = np.dtype(
    [
        ("p", "u8"),
        ("g", "u8"),
        ("slots", "u8", 3),
        ("windows", "u8", 2),
        ("masters", "u8"),
        ("n", "i8"),
        ("stride", "i8"),
        ("rows", "i4"),
        ("group", "i4"),
        ("wide", "i4"),
        ("wide_g", "i4"),
    ]
)


class Table(NamedTuple):
    """Tensors of equal dtypes on the device, and the chunks that they are cut into."""

    tensors: Any
    chunks: Any
    work: int  # how many chunks

    def grid(self, cuda: Launcher, resident: int = 4) -> int:
        """Returns how many blocks to launch, where a multiprocessor holds so many."""
        return min(blocks(self.work, THREADS // 32), resident * cuda.processors(self.tensors))


def table(cuda: Launcher, like: Any, rows: Any) -> Table:
    """Returns the table of these rows on the device of `like`: one that was made before, where nothing has moved."""
    device = cuda.runtime.device_of(like)
    with cuda.runtime.on(device):
        return _kept(cuda, "tables", (device, rows.tobytes()), lambda: _uploaded(cuda, device, rows))  # type: ignore[no-any-return]


def _uploaded(cuda: Launcher, device: int, rows: Any) -> Table:
    sizes = rows["n"].copy()
    chunks = _kept(cuda, "chunks", (device, sizes.tobytes()), lambda: cuda.xp.asarray(_chunks(sizes)))
    return Table(cuda.xp.asarray(rows.view(np.uint64)), chunks, int((-(-sizes // CHUNK)).sum()))


def _chunks(sizes: Any) -> Any:
    """Returns (tensor, number) of every chunk."""
    counts = -(-sizes // CHUNK)
    total = int(counts.sum())
    found = np.empty((total, 2), np.int32)
    found[:, 0] = np.repeat(np.arange(len(sizes)), counts)
    found[:, 1] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


def _kept(cuda: Launcher, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
    """Returns what was made for a key before, or makes it; the least recently used is forgotten."""
    kept = cuda.kept.setdefault(kind, OrderedDict())
    if key not in kept:
        kept[key] = make()
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def checked(cuda: Launcher, role: str, names: Sequence[str], arrays: Sequence[Any], like: Any) -> Any:
    """Returns the addresses of arrays that kernels can work on where they lie, on the device of `like`.

    Raises:
        LayoutError: one is not C-contiguous.
        KilterError: one is no array on the device, or has another dtype.
    """
    places = np.empty(len(arrays), np.uint64)
    device = cuda.runtime.device_of(like) if cuda.runtime.owns(like) else None
    for i, (name, array) in enumerate(zip(names, arrays, strict=True)):
        if not cuda.runtime.owns(array):
            wanted = f"an array of {cuda.xp.__name__}"
            raise KilterError(f"{called(role, name)}: expected {wanted}, got {type(array).__name__}")
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            wanted = "dtype float64, float32, float16 or bfloat16"
            raise KilterError(f"{called(role, name)}: expected {wanted}, got {array.dtype}")
        if not array.flags.c_contiguous:
            wanted = "a C-contiguous, aligned array of native byte order, got another layout"
            raise LayoutError(f"{called(role, name)}: expected {wanted}")
        if device not in (None, own := cuda.runtime.device_of(array)):
            raise KilterError(f"{called(role, name)}: expected an array on device {device}, got one on device {own}")
        places[i] = cuda.runtime.address(array)
    return places


def called(role: str, name: str) -> str:
    """Returns what messages call an array."""
    return f"{role}[{name}]" if name else role


def apart(names: Sequence[str], places: Any, sizes: Any, written: Any) -> None:
    """Refuses written memory that shares a byte with any other; sizes are in bytes."""
    order = np.argsort(places, kind="stable")
    order = order[sizes[order] > 0]
    ends = places[order] + sizes[order].astype(np.uint64)
    # How far the memory before each one reaches: any, and the written one.
    everything, written_only = (np.maximum.accumulate(e) for e in (ends, np.where(written[order], ends, 0)))
    reached = np.where(written[order][1:], everything[:-1], written_only[:-1])
    for i in np.flatnonzero(places[order][1:] < reached)[:1] + 1:
        one = order[i]
        reach = places + sizes.astype(np.uint64)
        other = next(j for j in order[:i] if reach[j] > places[one] and (written[one] or written[j]))
        out, other = (one, other) if written[one] else (other, one)
        raise KilterError(f"{names[out]}: expected memory of its own, got memory shared with {names[other]}")
