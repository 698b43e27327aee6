"""Group norm; instance norm is that with one group per channel.

Bytes moved, in sizes of the data. Channels first: forward 2 where a group fits into registers or shared memory, else 3;
backward 3 where both arrays of a group fit (into shared memory, or into registers where planes are small), else 5.
Channels last: forward 3, backward 5. What blocks leave for the next kernel is less than a tenth of that.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from kilter.cuda import rows, rows_backward
from kilter.cuda.launch import Launcher, blocks
from kilter.cuda.rows import LONG, PART, STATIC, SUMS, Rows, Saved, aligned, merging, power, real, spaces, vector
from kilter.cuda.rows_backward import Backward, sum_rows
from kilter.cuda.source import Limits

_THREADS, _TILE = 256, 256  # of a block; channels of a tile
_HELD, _TURNS = 8, 16  # positions that a thread holds, and that it goes through without holding them
_SMALL = 64  # planes up to this are summed place by place over the samples
_PARTS = 64  # parts of a sample's positions in the backward, at most

GROUPS = rows.family(
    "groups",
    {
        "backward_shared": Limits(64, True, 2),
        "moments_last": Limits(88, True, 3, reduces=True),
        "apply_last": Limits(72, True),
        "sums_last": Limits(80, True, 2, reduces=True),
        "gradient_last": Limits(88, True),
    },
)


class _Shape(NamedTuple):
    """Samples of channels in groups; `inner` is the number of positions."""

    samples: int
    channels: int
    inner: int
    groups: int
    last: bool

    @staticmethod
    def of(x: Any, axis: int, groups: int) -> _Shape:
        """Returns the shape of x; with one position it does not matter where channels are."""
        inner = x.size // (x.shape[0] * x.shape[axis])
        return _Shape(x.shape[0], x.shape[axis], inner, groups, axis == x.ndim - 1 and inner > 1)

    @property
    def width(self) -> int:
        """How many channels a group has."""
        return self.channels // self.groups

    @property
    def rows(self) -> Rows:
        """The groups as rows, with channels first."""
        return Rows(self.samples * self.groups, self.width * self.inner, self.groups, self.inner)


class _Tiles(NamedTuple):
    """How blocks share samples with channels last: each has `held` positions of one of `number` tiles of channels."""

    v: int
    tile: int  # channels
    pieces: int  # of a group that is wider than a tile
    number: int
    threads: int
    held: int

    @staticmethod
    def of_groups(shape: _Shape, allowed: list[int]) -> _Tiles:
        """Returns tiles of whole groups, or of a piece of one, that begin where vectors of an allowed width do."""
        width = shape.width
        v = next(v for v in allowed if (math.lcm(width, v) <= _TILE if width <= _TILE else width % v == 0))
        if width <= _TILE:
            return _Tiles._even(shape, math.lcm(width, v), v, _HELD)
        tile = blocks(blocks(width, blocks(width, _TILE)), v) * v
        pieces = blocks(width, tile)
        return _Tiles._shared(shape, v, tile, pieces, shape.groups * pieces, _HELD)

    @staticmethod
    def of_channels(shape: _Shape, v: int) -> _Tiles:
        """Returns tiles of any channels."""
        return _Tiles._even(shape, v, v, _TURNS)

    @staticmethod
    def _even(shape: _Shape, unit: int, v: int, turns: int) -> _Tiles:
        number = blocks(shape.channels, _TILE // unit * unit)
        tile = blocks(blocks(shape.channels, number), unit) * unit
        return _Tiles._shared(shape, v, tile, 1, blocks(shape.channels, tile), turns)

    @staticmethod
    def _shared(shape: _Shape, v: int, tile: int, pieces: int, number: int, turns: int) -> _Tiles:
        threads = min(_THREADS, power(max(shape.inner * tile // v, tile), 32))  # one for each group too
        return _Tiles(v, tile, pieces, number, threads, threads * v // tile * turns)


# --------------------------------------------------------------------------- forward


def gn_forward(
    cuda: Launcher,
    x: Any,
    axis: int,
    groups: int,
    h: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    m2: Any,
    y: Any,
) -> None:
    """Fills mean and m2 of each group of each sample, and y; axis is 1 or the last; h = (eps,)."""
    if x.size == 0:
        mean.fill(0)
        m2.fill(0)
        return
    shape, saved = _Shape.of(x, axis, groups), Saved(mean=mean, m2=m2)
    if not shape.last:
        rows.forward(cuda, rows.Forward(shape.rows, x, None, h, gamma, beta, saved, None, y))
        return
    tiles = _Tiles.of_groups(shape, rows.vectors(x, shape.channels))
    (x,) = aligned(cuda, tiles.v, x)
    number, kind, parts = shape.rows.number, real(x), blocks(shape.inner, tiles.held)
    sizes = (number * parts * tiles.pieces * 3, "float64"), (number, kind), (number, kind), (number, kind)
    partial, hi, lo, rstd = spaces(cuda, x, *sizes)
    module, places = cuda.module(GROUPS, T=x.dtype, V=tiles.v), (shape.inner, tiles.held, shape.channels)
    grid, sharing = shape.samples * parts * tiles.number, (shape.width, tiles.tile, tiles.pieces)
    module.launch("moments_last", grid, tiles.threads, x, partial, *places, *sharing)
    merge, parts = cuda.module(SUMS, T=kind), parts * tiles.pieces
    merge.launch("merge_moments", number, merging(parts), partial, parts, hi, lo, rstd, mean, m2, h)
    tiles = _Tiles.of_channels(shape, tiles.v)
    with rows.written(cuda, tiles.v, y) as target:
        _launch_last(cuda, "apply_last", shape, tiles, x, gamma, beta, hi, lo, rstd, target)


def _launch_last(cuda: Launcher, kernel: str, shape: _Shape, tiles: _Tiles, x: Any, *arrays: Any) -> None:
    """Launches a kernel on tiles of any channels."""
    grid = shape.samples * blocks(shape.inner, tiles.held) * tiles.number
    sizes = (shape.inner, tiles.held, shape.channels, shape.width, tiles.tile)
    cuda.module(GROUPS, T=x.dtype, V=tiles.v).launch(kernel, grid, tiles.threads, x, *arrays, *sizes)


# --------------------------------------------------------------------------- backward


def gn_backward(
    cuda: Launcher,
    dy: Any,
    x: Any,
    axis: int,
    groups: int,
    h: Any,
    mean: Any,
    m2: Any,
    gamma: Any,
    sum_dy: Any,
    sum_dy_xhat: Any,
    dx: Any,
) -> None:
    """Fills the gradients of beta, gamma and x from what gn_forward filled; h = (eps,)."""
    if x.size == 0:
        sum_dy.fill(0)
        sum_dy_xhat.fill(0)
        return
    shape = _Shape.of(x, axis, groups)
    work = Backward(shape.rows, dy, x, gamma, Saved(mean=mean, m2=m2), h, None, (sum_dy, sum_dy_xhat), dx)
    if not shape.last and shape.inner <= _SMALL and rows_backward.fits(shape.rows, vector(x, shape.rows.width)):
        rows_backward.backward(cuda, work)
        return
    v = vector(x, shape.channels if shape.last else shape.inner)
    dy, x = aligned(cuda, v, dy, x)
    with rows.written(cuda, v, dx) as target:
        work = work._replace(dy=dy, x=x, dx=target)
        if not shape.last and _both(work) <= cuda.shared(x) - 2 * STATIC:
            _backward_shared(cuda, shape, v, work)
        else:
            _backward_twice(cuda, shape, v, work)


def _both(work: Backward) -> int:
    """Returns the bytes of a group of dy and x."""
    return 2 * work.rows.width * int(work.x.dtype.itemsize)


def _backward_shared(cuda: Launcher, shape: _Shape, v: int, work: Backward) -> None:
    """The backward with channels first: a block keeps a group in shared memory."""
    x, number, width = work.x, work.rows.number, work.rows.width
    totals = cuda.workspace(x, shape.samples * 2 * shape.channels, real(x))
    arrays = (work.dy, x, work.gamma, work.saved.mean, work.saved.m2, totals, work.dx)
    sizes, block = (shape.inner, shape.width, 1.0 / width, shape.groups), _planes(shape, v)
    module = cuda.module(GROUPS, T=x.dtype, V=v)
    module.launch("backward_shared", number, block, *arrays, *sizes, work.h, shared=_both(work))
    sum_rows(cuda, x, totals, shape.samples, shape.channels, work.sums)


def _planes(shape: _Shape, v: int) -> tuple[int, int]:
    """Returns the threads of a plane, and planes at once, of the block that has a group: the fewest turns."""
    plane = shape.inner // v
    threads = min(rows.MOST, power(blocks(shape.width * plane, 4), 64))
    choices = [(1 << k, min(threads >> k, 64)) for k in range(3, threads.bit_length())]
    return min(choices, key=lambda block: (blocks(shape.width, block[1]) * blocks(plane, block[0]), block))


def _backward_twice(cuda: Launcher, shape: _Shape, v: int, work: Backward) -> None:
    """The backward that reads dy and x twice: sums over parts of each channel, what follows from them, dx."""
    x, saved, kind, channels = work.x, work.saved, real(work.x), shape.samples * 2 * shape.channels
    tiles = _Tiles.of_channels(shape, v)
    per = max(tiles.held, blocks(shape.inner, _PARTS)) if shape.last else _per_part(shape, v)
    parts = blocks(shape.inner, per if shape.last else per * v)
    sizes = (channels * parts, "float64"), (shape.rows.number * 3, kind), (channels, kind)
    partial, means, totals = spaces(cuda, x, *sizes)
    if shape.last:
        few = tiles._replace(held=per)
        _launch_last(cuda, "sums_last", shape, few, work.dy, x, saved.mean, partial)
    else:
        _sum_planes(cuda, shape, v, work, parts, per, partial)
    about = (work.gamma, None, saved.m2, float(shape.rows.width), 1, totals, means, work.h)
    merge, threads = cuda.module(SUMS, T=kind), merging(shape.width)
    merge.launch("merge_sums", shape.rows.number, threads, partial, parts, shape.channels, shape.groups, *about)
    arrays = (work.dy, x, work.gamma, saved.mean, means, work.dx)
    if shape.last:
        _launch_last(cuda, "gradient_last", shape, tiles, *arrays)
    else:
        found = shape.rows
        pieces = blocks(found.width, PART * v)
        places = (found.width, pieces, found.groups, found.channels, found.inner, *found.divisor)
        cuda.module(LONG, T=x.dtype, V=v).launch("gradient_long", found.number * pieces, 256, *arrays, *places)
    sum_rows(cuda, x, totals, shape.samples, shape.channels, work.sums)


def _per_part(shape: _Shape, v: int) -> int:
    """Returns how many vectors of a plane are summed together."""
    vectors = shape.inner // v
    return blocks(vectors, min(_PARTS, blocks(vectors, 1024)))


def _sum_planes(cuda: Launcher, shape: _Shape, v: int, work: Backward, parts: int, per: int, partial: Any) -> None:
    """Sums of parts of planes, several parts in a block."""
    x, planes = work.x, shape.samples * shape.channels
    lanes = min(256, power(blocks(per, 4)))
    block = lanes, 256 // lanes
    arrays = (work.dy, x, None, None, None, work.saved.mean, partial)
    sizes = (planes, shape.inner, parts, per, shape.channels, shape.width)
    cuda.module(LONG, T=x.dtype, V=v).launch("sums", blocks(planes * parts, block[1]), block, *arrays, *sizes)


FAMILIES = (GROUPS,)
OPS = {"gn_forward": gn_forward, "gn_backward": gn_backward}
