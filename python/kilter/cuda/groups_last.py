"""Group norm with channels last: a sample is a matrix of positions and channels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from kilter.cuda import rows
from kilter.cuda.launch import Launcher, blocks
from kilter.cuda.rows import SUMS, Forward, Rows, aligned, merging, power, real, spaces, vector, vectors, written
from kilter.cuda.rows_backward import Backward, sum_rows
from kilter.cuda.source import Limits

_THREADS, _TILE = 256, 256  # of a block; channels of a tile
_HELD, _TURNS = 8, 16  # positions that a thread holds, and that it goes through without holding them
_STATIC = 48 << 10  # bytes of shared memory that kernels use beside what they are given
_RUN = 64  # bytes of a row of a tile, at least
_PARTS = 64  # parts of a sample's positions in the backward, at most

ONCE = rows.family(
    "groups_once",
    {
        "backward_shared": Limits(64, True, 2, newer=96),
        "forward_last": Limits(80, True, 2),
        "backward_last": Limits(112, True, 2),
    },
)
TWICE = rows.family(
    "groups",
    {
        "moments_last": Limits(88, True, 3, reduces=True, newer=120),
        "apply_last": Limits(72, True),
        "sums_last": Limits(80, True, 2, reduces=True),
        "gradient_last": Limits(88, True),
    },
)


class Shape(NamedTuple):
    """Samples of channels in groups; `inner` is the number of positions."""

    samples: int
    channels: int
    inner: int
    groups: int
    last: bool

    @staticmethod
    def of(x: Any, axis: int, groups: int) -> Shape:
        """Returns the shape of x; with one position it does not matter where channels are."""
        inner = x.size // (x.shape[0] * x.shape[axis])
        return Shape(x.shape[0], x.shape[axis], inner, groups, axis == x.ndim - 1 and inner > 1)

    @property
    def width(self) -> int:
        """How many channels a group has."""
        return self.channels // self.groups

    @property
    def rows(self) -> Rows:
        """The groups as rows, with channels first."""
        return Rows(self.samples * self.groups, self.width * self.inner, self.groups, self.inner)


class _Tiles(NamedTuple):
    """How blocks share samples: each has `held` positions of one of `number` tiles of channels."""

    v: int
    tile: int  # channels
    pieces: int  # of a group that is wider than a tile
    number: int
    threads: int
    held: int

    @staticmethod
    def of_groups(shape: Shape, allowed: list[int]) -> _Tiles:
        """Returns tiles of whole groups, or of a piece of one, that begin where vectors of an allowed width do."""
        width = shape.width
        v = next(v for v in allowed if (math.lcm(width, v) <= _TILE if width <= _TILE else width % v == 0))
        if width <= _TILE:
            return _Tiles._even(shape, math.lcm(width, v), v, _TILE, _HELD)
        tile = blocks(blocks(width, blocks(width, _TILE)), v) * v
        pieces = blocks(width, tile)
        return _Tiles._shared(shape, v, tile, pieces, shape.groups * pieces, _HELD)

    @staticmethod
    def of_channels(shape: Shape, v: int) -> _Tiles:
        """Returns tiles of any channels."""
        return _Tiles._even(shape, v, v, _TILE, _TURNS)

    @staticmethod
    def of_samples(shape: Shape, allowed: list[int], size: int, arrays: int, room: int) -> _Tiles | None:
        """Returns tiles of whole groups at all positions that `room` bytes hold of `arrays`; None if there are none.

        Two blocks share a multiprocessor, where rows of a tile do not become shorter than _RUN by that.
        """
        if shape.width > _TILE:
            return None
        v = next(v for v in allowed if math.lcm(shape.width, v) <= _TILE)
        unit, least = math.lcm(shape.width, v), min(_RUN, shape.channels * size)
        for space in (room // 2, room):
            most = min(_TILE, space // (shape.inner * size * arrays)) // unit * unit
            if most * size >= least:
                found = _Tiles._even(shape, unit, v, most, 1)
                wanted = max(blocks(shape.inner * found.tile // v, 4), found.tile)
                return found._replace(threads=min(rows.MOST // arrays, power(wanted, 32)), held=shape.inner)
        return None

    @staticmethod
    def _even(shape: Shape, unit: int, v: int, most: int, turns: int) -> _Tiles:
        number = blocks(shape.channels, most // unit * unit)
        tile = blocks(blocks(shape.channels, number), unit) * unit
        return _Tiles._shared(shape, v, tile, 1, blocks(shape.channels, tile), turns)

    @staticmethod
    def _shared(shape: Shape, v: int, tile: int, pieces: int, number: int, turns: int) -> _Tiles:
        threads = min(_THREADS, power(max(shape.inner * tile // v, tile), 32))  # one for each group too
        return _Tiles(v, tile, pieces, number, threads, threads * v // tile * turns)

    def blocks(self, shape: Shape) -> int:
        """Returns how many there are."""
        return shape.samples * blocks(shape.inner, self.held) * self.number

    def bytes(self, shape: Shape, size: int) -> int:
        """Returns what a block of tiles at all positions holds of an array."""
        return shape.inner * self.tile * size


# --------------------------------------------------------------------------- forward


def forward(cuda: Launcher, shape: Shape, work: Forward) -> None:
    """Normalises: once read if a block can hold what it reads."""
    size, allowed = work.x.dtype.itemsize, vectors(work.x, shape.channels)
    once = _Tiles.of_samples(shape, allowed, size, 1, cuda.shared(work.x) - _STATIC)
    tiles = once or _Tiles.of_groups(shape, allowed)
    (x,) = aligned(cuda, tiles.v, work.x)
    with written(cuda, tiles.v, work.y) as y:
        if not once:
            _forward_twice(cuda, shape, tiles, work._replace(x=x, y=y))
            return
        arrays = (x, work.gamma, work.beta, work.saved.mean, work.saved.m2, y)
        sizes, shared = (shape.inner, shape.channels, shape.width, tiles.tile), tiles.bytes(shape, size)
        module = cuda.module(ONCE, T=x.dtype, V=tiles.v)
        module.launch("forward_last", tiles.blocks(shape), tiles.threads, *arrays, *sizes, work.h, shared=shared)


def _forward_twice(cuda: Launcher, shape: Shape, tiles: _Tiles, work: Forward) -> None:
    x, saved, number, kind = work.x, work.saved, shape.rows.number, real(work.x)
    parts = blocks(shape.inner, tiles.held) * tiles.pieces
    sizes = (number * parts * 3, "float64"), (number, kind), (number, kind), (number, kind)
    partial, hi, lo, rstd = spaces(cuda, x, *sizes)
    places = (shape.inner, tiles.held, shape.channels, shape.width, tiles.tile, tiles.pieces)
    module = cuda.module(TWICE, T=x.dtype, V=tiles.v)
    module.launch("moments_last", tiles.blocks(shape), tiles.threads, x, partial, *places)
    merge, arrays = cuda.module(SUMS, T=kind), (partial, parts, hi, lo, rstd, saved.mean, saved.m2)
    merge.launch("merge_moments", number, merging(parts), *arrays, work.h)
    arrays = (x, work.gamma, work.beta, hi, lo, rstd, work.y)
    _launch(cuda, "apply_last", shape, _Tiles.of_channels(shape, tiles.v), *arrays)


def _launch(cuda: Launcher, kernel: str, shape: Shape, tiles: _Tiles, x: Any, *arrays: Any) -> None:
    """Launches a kernel on tiles of any channels."""
    sizes = (shape.inner, tiles.held, shape.channels, shape.width, tiles.tile)
    cuda.module(TWICE, T=x.dtype, V=tiles.v).launch(kernel, tiles.blocks(shape), tiles.threads, x, *arrays, *sizes)


# --------------------------------------------------------------------------- backward


def backward(cuda: Launcher, shape: Shape, work: Backward) -> None:
    """The gradients: dy and x are read once if a block can hold what it reads."""
    size, allowed = work.x.dtype.itemsize, vectors(work.x, shape.channels)
    once = _Tiles.of_samples(shape, allowed, size, 2, cuda.shared(work.x) - _STATIC)
    tiles = once or _Tiles.of_channels(shape, vector(work.x, shape.channels))
    dy, x = aligned(cuda, tiles.v, work.dy, work.x)
    with written(cuda, tiles.v, work.dx) as dx:
        if not once:
            _backward_twice(cuda, shape, tiles, work._replace(dy=dy, x=x, dx=dx))
            return
        totals = cuda.workspace(x, shape.samples * 2 * shape.channels, real(x))
        arrays = (dy, x, work.gamma, work.saved.mean, work.saved.m2, totals, dx)
        sizes, shared = (shape.inner, shape.channels, shape.width, tiles.tile), 2 * tiles.bytes(shape, size)
        module = cuda.module(ONCE, T=x.dtype, V=tiles.v)
        module.launch("backward_last", tiles.blocks(shape), tiles.threads, *arrays, *sizes, work.h, shared=shared)
        sum_rows(cuda, x, totals, shape.samples, shape.channels, work.sums)


def _backward_twice(cuda: Launcher, shape: Shape, tiles: _Tiles, work: Backward) -> None:
    """Sums over parts of the positions, what follows from them for groups, dx."""
    x, mean, kind, channels = work.x, work.saved.mean, real(work.x), shape.samples * 2 * shape.channels
    few = tiles._replace(held=max(tiles.held, blocks(shape.inner, _PARTS)))
    parts = blocks(shape.inner, few.held)
    sizes = (channels * parts, "float64"), (shape.rows.number * 3, kind), (channels, kind)
    partial, means, totals = spaces(cuda, x, *sizes)
    _launch(cuda, "sums_last", shape, few, work.dy, x, mean, partial)
    merge_groups(cuda, shape, work, parts, partial, totals, means)
    _launch(cuda, "gradient_last", shape, tiles, work.dy, x, work.gamma, mean, means, work.dx)
    sum_rows(cuda, x, totals, shape.samples, shape.channels, work.sums)


def merge_groups(
    cuda: Launcher, shape: Shape, work: Backward, parts: int, partial: Any, totals: Any, means: Any
) -> None:
    """From the sums of parts those of samples, and what `gradient_*` reads of groups."""
    about = (work.gamma, None, work.saved.m2, float(shape.rows.width), 1, totals, means, work.h)
    grid, threads, sizes = shape.rows.number, merging(shape.width), (parts, shape.channels, shape.groups)
    cuda.module(SUMS, T=real(work.x)).launch("merge_sums", grid, threads, partial, *sizes, *about)
