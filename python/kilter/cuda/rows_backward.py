"""Backward of layer norm and RMS norm, and of group norm with channels first and small planes.

Bytes moved, in sizes of the data: 3 where a row of both arrays fits into registers, else 5, and one more for dsum. A
block, of at least 8 rows where there are so many, leaves two sums in kt_real for each place of a row, which are read.
Sums over rows depend on the number of the device's processors; what is in a row does not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kilter.cuda.launch import Launcher, blocks
from kilter.cuda.rows import (
    LONG,
    MOST,
    PART,
    SUMS,
    Rows,
    Saved,
    aligned,
    beside,
    family,
    power,
    real,
    spaces,
    vector,
    written,
)
from kilter.cuda.source import Limits

BACKWARD = family("rows_backward", {"backward": Limits(128, True, 2)}, MANY=(0, 1))
_NO_EPS = np.zeros(1)  # in place of h, where it is not read


class Backward(NamedTuple):
    """What the forward had, and what is filled: dx, to which dsum is added, and the gradients of beta and gamma."""

    rows: Rows
    dy: Any
    x: Any
    gamma: Any
    saved: Saved
    h: Any
    dsum: Any
    sums: tuple[Any, Any]
    dx: Any


class _Walks(NamedTuple):
    """How blocks share the rows: each has `walks`, of `lanes` threads, each through the rows of a part of a group."""

    many: int  # whether a thread has more than one vector of a row
    lanes: int
    walks: int
    columns: int  # blocks beside each other, for one row
    tile: int  # places of a block
    parts: int  # of each group
    blocks: int

    @staticmethod
    def of(cuda: Launcher, x: Any, rows: Rows, v: int) -> _Walks:
        """Returns the walks: few, as each leaves sums behind, but for all processors where there are rows enough."""
        vectors, columns, tile, samples = rows.width // v, 1, rows.width, rows.number // rows.groups
        many = int(vectors > 32)
        lanes = power(blocks(vectors, _held(v) if many else 1))
        if not fits(rows, v):
            lanes, tile = 256, 256 * _held(v) * v
            columns = blocks(rows.width, tile)
        walks = beside(rows.number, lanes, 256)
        wanted = blocks(cuda.processors(x) * (1 if lanes == MOST else 2 if many else 4), columns)
        if rows.groups == 1:
            found = max(1, min(wanted, blocks(samples, max(8, walks))))
            return _Walks(many, lanes, walks, columns, tile, found * walks, found)
        parts = max(1, min(blocks(wanted * walks, rows.groups), blocks(samples, 8)))
        return _Walks(many, lanes, walks, columns, tile, parts, blocks(parts * rows.groups, walks))


def _held(v: int) -> int:
    """Returns how many vectors of a row, with sums for each place, a thread has at most."""
    return min(4, 16 // v)


def fits(rows: Rows, v: int) -> bool:
    """Says whether a block's registers hold a row of dy and of x."""
    return rows.width <= MOST * _held(v) * v


def backward(cuda: Launcher, work: Backward) -> None:
    """The gradients of rows."""
    rows, v = work.rows, vector(work.x, work.rows.width)
    dy, x, dsum = aligned(cuda, v, work.dy, work.x, work.dsum)
    (gamma,) = aligned(cuda, v if rows.inner == 1 else 1, work.gamma)
    with written(cuda, v, work.dx) as dx:
        _backward(cuda, v, work._replace(dy=dy, x=x, gamma=gamma, dsum=dsum, dx=dx))


def _backward(cuda: Launcher, v: int, work: Backward) -> None:
    rows, dy, x, gamma, saved, h, dsum, sums, dx = work
    walks, samples, kind = _Walks.of(cuda, x, rows, v), rows.number // rows.groups, real(x)
    kept, channels = walks.blocks if rows.groups == 1 else walks.parts, rows.groups * rows.channels
    parts = 0 if fits(rows, v) else blocks(rows.width, PART * v)
    partial, means, terms = spaces(
        cuda,
        x,
        (kept * 2 * channels, kind),
        (rows.number * 3 if parts else 0, kind),
        (rows.number * 2 * parts, "float64"),
    )
    if parts:
        _sum_parts(cuda, v, work, parts, terms, means)
    if samples:
        module = cuda.module(BACKWARD, T=x.dtype, V=v, MANY=walks.many)
        arrays = (dy, x, gamma, *saved, means if parts else None, dsum, dx, partial)
        shares = (samples, walks.parts, walks.columns)
        places = (rows.width, walks.tile, 1.0 / rows.width, rows.groups, rows.inner, *rows.divisor)
        grid, block = walks.blocks * walks.columns, (walks.lanes, walks.walks)
        module.launch("backward", grid, block, *arrays, *shares, *places, _NO_EPS if h is None else h)
    sum_rows(cuda, x, partial, kept if samples else 0, channels, sums)


def _sum_parts(cuda: Launcher, v: int, work: Backward, parts: int, terms: Any, means: Any) -> None:
    """Fills means with what the backward of rows that no block can hold takes from them; terms is room for parts."""
    rows, x, saved = work.rows, work.x, work.saved
    sizes = (rows.number, rows.width, parts, PART, 1, 1)
    arrays = (work.dy, x, work.gamma, saved.hi, saved.lo, None, terms)
    cuda.module(LONG, T=x.dtype, V=v).launch("sums", rows.number * parts, 256, *arrays, *sizes)
    about = (None, saved.rstd, None, float(rows.width), int(saved.centred), None, means, _NO_EPS)
    cuda.module(SUMS, T=real(x)).launch("merge_sums", rows.number, 32, terms, parts, 1, 1, *about)


def sum_rows(cuda: Launcher, x: Any, partial: Any, rows: int, width: int, sums: tuple[Any, Any]) -> None:
    """Fills sums = (of dy, of dy * x̂) with those over rows of both, `partial` of shape (rows, 2, width)."""
    cuda.module(SUMS, T=real(x)).launch("sum_rows", blocks(2 * width, 32), (32, 8), partial, rows, width, *sums)


def ln_backward(
    cuda: Launcher,
    dy: Any,
    x: Any,
    gamma: Any,
    hi: Any,
    lo: Any,
    rstd: Any,
    dsum: Any,
    sum_dy: Any,
    sum_dy_xhat: Any,
    dx: Any,
) -> None:
    """Fills the gradients of beta, gamma and x from what ln_forward filled; dsum is added to dx."""
    saved = Saved(hi, lo, rstd)
    backward(cuda, Backward(Rows(*x.shape), dy, x, gamma, saved, None, dsum, (sum_dy, sum_dy_xhat), dx))


FAMILIES = (BACKWARD,)
OPS = {"ln_backward": ln_backward}
