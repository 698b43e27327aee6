"""Group norm; instance norm is that with one group per channel.

Bytes moved, in sizes of the data: forward 2 where a block holds a group (channels last: rows of 64 bytes of a sample
or more), else 3; backward 3 where it holds that of both arrays, else 5. Blocks hold groups in shared memory, and with
channels first in registers: forward short ones, backward those with small planes. What blocks leave for the next kernel
is less than a tenth of that.
"""

from __future__ import annotations

from typing import Any

from kilter.cuda import groups_last, rows, rows_backward
from kilter.cuda.groups_last import ONCE, TWICE, Shape
from kilter.cuda.launch import Launcher, blocks
from kilter.cuda.rows import LONG, PART, STATIC, Saved, aligned, power, real, spaces, vector
from kilter.cuda.rows_backward import Backward, sum_rows

_SMALL = 64  # planes up to this are summed place by place over the samples
_PARTS = 64  # parts of a plane in the backward, at most


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
    shape = Shape.of(x, axis, groups)
    work = rows.Forward(shape.rows, x, None, h, gamma, beta, Saved(mean=mean, m2=m2), None, y)
    if shape.last:
        groups_last.forward(cuda, shape, work)
    else:
        rows.forward(cuda, work)


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
    shape = Shape.of(x, axis, groups)
    work = Backward(shape.rows, dy, x, gamma, Saved(mean=mean, m2=m2), h, None, (sum_dy, sum_dy_xhat), dx)
    if shape.last:
        groups_last.backward(cuda, shape, work)
    elif shape.inner <= _SMALL and rows_backward.fits(shape.rows, vector(x, shape.rows.width)):
        rows_backward.backward(cuda, work)
    else:
        _backward(cuda, shape, work)


def _backward(cuda: Launcher, shape: Shape, work: Backward) -> None:
    """The backward with channels first, plane by plane."""
    v, size = vector(work.x, shape.inner), 2 * work.rows.width * work.x.dtype.itemsize
    dy, x = aligned(cuda, v, work.dy, work.x)
    with rows.written(cuda, v, work.dx) as dx:
        work = work._replace(dy=dy, x=x, dx=dx)
        if size <= cuda.shared(x) - 2 * STATIC:
            _backward_once(cuda, shape, v, work, size)
        else:
            _backward_twice(cuda, shape, v, work)


def _backward_once(cuda: Launcher, shape: Shape, v: int, work: Backward, shared: int) -> None:
    """A block keeps a group in shared memory."""
    x, saved = work.x, work.saved
    totals = cuda.workspace(x, shape.samples * 2 * shape.channels, real(x))
    arrays = (work.dy, x, work.gamma, saved.mean, saved.m2, totals, work.dx)
    sizes = (shape.inner, shape.width, 1.0 / work.rows.width, shape.groups)
    module = cuda.module(ONCE, T=x.dtype, V=v)
    module.launch("backward_shared", work.rows.number, _planes(shape, v), *arrays, *sizes, work.h, shared=shared)
    sum_rows(cuda, x, totals, shape.samples, shape.channels, work.sums)


def _planes(shape: Shape, v: int) -> tuple[int, int]:
    """Returns the threads of a plane, and planes at once, of the block that has a group: the fewest turns."""
    plane = shape.inner // v
    threads = min(rows.MOST, power(blocks(shape.width * plane, 4), 64))
    choices = [(1 << k, min(threads >> k, 64)) for k in range(3, threads.bit_length())]
    return min(choices, key=lambda block: (blocks(shape.width, block[1]) * blocks(plane, block[0]), block))


def _backward_twice(cuda: Launcher, shape: Shape, v: int, work: Backward) -> None:
    """Sums over parts of planes, what follows from them for groups, dx."""
    x, found, mean, kind = work.x, shape.rows, work.saved.mean, real(work.x)
    planes, plane = shape.samples * shape.channels, shape.inner // v
    per = blocks(plane, min(_PARTS, blocks(plane, 1024)))
    parts = blocks(plane, per)
    partial, means, totals = spaces(
        cuda, x, (planes * 2 * parts, "float64"), (found.number * 3, kind), (planes * 2, kind)
    )
    long, lanes = cuda.module(LONG, T=x.dtype, V=v), min(256, power(blocks(per, 4)))
    sizes = (planes, shape.inner, parts, per, shape.channels, shape.width)
    grid, block = blocks(planes * parts, 256 // lanes), (lanes, 256 // lanes)
    long.launch("sums", grid, block, work.dy, x, None, None, None, mean, partial, *sizes)
    groups_last.merge_groups(cuda, shape, work, parts, partial, totals, means)
    pieces = blocks(found.width, PART * v)
    places = (found.width, pieces, found.groups, found.channels, found.inner, *found.divisor)
    arrays = (work.dy, x, work.gamma, mean, means, work.dx)
    long.launch("gradient_long", found.number * pieces, 256, *arrays, *places)
    sum_rows(cuda, x, totals, shape.samples, shape.channels, work.sums)


FAMILIES = (ONCE, TWICE)
OPS = {"gn_forward": gn_forward, "gn_backward": gn_backward}
