"""Batch norm that reads its data from memory once: 2 sizes of the data forward instead of 3, 3 backward instead of 5.

Off until it has been measured on a device. KILTER_CUDA_READ_ONCE, which is read when the table of operations is made,
turns it on:

cluster: clusters of 1, 2, 4 or 8 blocks hold the values of a tile of channels in shared memory (sm_90 and later);
resident: groups of resident blocks take tiles in turn, so few at a time that the second look finds them in L2;
auto: the former where the values fit, else the latter where the data are larger than L2.

A residual is read twice backward. Where the way that is asked for cannot be gone, there are two launches. Sums are cut
into other parts than there: as accurate, but not the same bits.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from kilter.cuda.channels import COLUMNS, MANY, PLANES, Split, around, tiling, warps
from kilter.cuda.launch import Launcher, blocks
from kilter.cuda.source import Family, Limits, widest

WAYS = ("", "cluster", "resident", "auto")
_CLUSTERS = (1, 2, 4, 8)
_THREADS = 512
_SUMS = (23 << 10, 30 << 10)  # bytes of shared memory for the sums of a block of a cluster: of planes, of columns
_L2 = 20 << 20  # bytes that the L2 cache keeps between two looks
_LARGE = 32 << 20  # bytes of what is written, above which it does not stay in the cache


def _full(variant: dict[str, Any]) -> bool:
    return bool(variant["V"] == widest(variant["T"]))


def _blocks_of(variant: dict[str, Any]) -> bool:
    return _full(variant) and variant["THREADS"] == (COLUMNS if variant["COLUMNS"] else PLANES)


_WIDTHS, _LAYOUTS = (2, 4, 8), (0, 1)
CLUSTER = Family(
    "batch_cluster",
    {
        "bn_train_cluster": Limits(128, vectorised=True, scalar_stores=8),
        "bn_backward_cluster": Limits(128, vectorised=True, scalar_stores=2),
    },
    macros={"V": _WIDTHS, "COLUMNS": _LAYOUTS, "K": _CLUSTERS, "THREADS": (_THREADS,)},
    built=_full,
    rare=lambda v: v["K"] not in (1, 8),
    least=90,
)
RESIDENT = Family(
    "batch_resident",
    {
        "bn_train_resident": Limits(128, vectorised=True, scalar_stores=13),
        "bn_backward_resident": Limits(128, vectorised=True, scalar_stores=6),
    },
    macros={"V": _WIDTHS, "COLUMNS": _LAYOUTS, "THREADS": (PLANES, COLUMNS)},
    built=_blocks_of,
)


class Once(NamedTuple):
    """A split whose blocks work together: as a cluster, or as `groups` groups of a cooperative launch."""

    split: Split
    groups: int = 0
    shared: int = 0  # bytes that a block of a cluster holds of each array
    turns: int = 0  # positions of a thread, at most


@lru_cache(maxsize=1024)
def in_cluster(shape: tuple[int, int, int], size: int, held: int, weighted: bool, room: int) -> Once | None:
    """Returns the smallest cluster whose blocks can hold `held` arrays, or None.

    `room` is the shared memory that a block may have; a cluster of one has half of it, so that a second block of the
    multiprocessor reads while the first one adds up.
    """
    tiles = tiling(shape, size, 16 // size, weighted)
    if tiles.width * size != 16 or not tiles.tiles:
        return None
    least = tiles.lanes * tiles.width // tiles.inner if tiles.columns else 1
    for k in _CLUSTERS:
        per = max(1, blocks(tiles.positions, k))
        # The registers of a multiprocessor are enough for 512 threads: those of one block, or of two.
        threads = min(_THREADS // 2 if k == 1 else _THREADS, warps(per * tiles.lanes))
        tiles = tiles._replace(threads=max(threads, warps(max(tiles.lanes, least))))
        turns = blocks(per, tiles.at_once)
        shared = turns * tiles.threads * 16
        most = (room // 2 if k == 1 else room) - _SUMS[tiles.columns]
        if shared * held <= most and not (tiles.columns and turns > MANY):
            return Once(tiles._replace(per=per, parts=k), 0, shared, turns)
    return None


@lru_cache(maxsize=1024)
def in_l2(shape: tuple[int, int, int], size: int, held: int, weighted: bool, processors: int) -> Once | None:
    """Returns groups of so many blocks that what `held` arrays of their tiles need stays in L2, or None."""
    tiles = tiling(shape, size, 16 // size, weighted)
    if tiles.width * size != 16 or not tiles.tiles:
        return None
    resident = processors * (1 if tiles.columns else 2)
    slice_ = tiles.positions * tiles.lanes * 16 * held
    parts = max(1, blocks(resident * slice_, _L2))
    if tiles.columns:
        parts = max(parts, blocks(tiles.positions, tiles.at_once * MANY))
    if parts > resident:
        return None
    found = tiles.into(parts)
    return Once(found, min(resident // found.parts, found.tiles))


def _way(cuda: Launcher, x: Any, axis: int, held: int, weights: Any, *arrays: Any) -> Once | None:
    """Returns how x is read once, or None for two launches."""
    if not cuda.read_once or cuda.width(x, weights, *arrays) * x.dtype.itemsize != 16:
        return None
    shape, size, weighted, found = around(x, axis), x.dtype.itemsize, weights is not None, None
    if cuda.read_once != "resident" and cuda.runtime.capability(cuda.runtime.device_of(x)) >= CLUSTER.least:
        found = in_cluster(shape, size, held, weighted, cuda.shared(x))
    if found is None and (cuda.read_once == "resident" or (cuda.read_once == "auto" and x.nbytes * held > _L2)):
        found = in_l2(shape, size, held, weighted, cuda.processors(x))
    return found


def train(
    cuda: Launcher,
    x: Any,
    axis: int,
    weights: Any,
    statistics: tuple[Any, ...],
    affine: tuple[Any, Any, Any],
    relu: bool,
    y: Any,
) -> bool:
    """Does what bn_train does, where x can be read once; says whether it has."""
    way = _way(cuda, x, axis, 1, weights, affine[2], y)
    if way is None:
        return False
    data = (x, weights, *way.split[4:])
    _launch(cuda, way, x.dtype, "bn_train", 1, 3, data, *statistics, *affine, *ending(relu, y), y)
    return True


def backward(
    cuda: Launcher,
    dy: Any,
    x: Any,
    axis: int,
    weights: Any,
    count: Any,
    how: tuple[Any, ...],
    dx: Any,
    dresidual: Any,
) -> bool:
    """Does what bn_backward does, where dy and x can be read once; says whether it has."""
    hi, lo, rstd, gamma, beta, residual, relu, sum_dy, sum_dy_xhat = how
    residual = residual if relu else None
    way = _way(cuda, x, axis, 2, weights, dy, residual, dx, dresidual)
    if way is None:
        return False
    data = (dy, x, weights, *way.split[4:], *(() if way.groups else (way.turns,)))
    how = (count, hi, lo, rstd, gamma, beta, residual, limit(relu), sum_dy, sum_dy_xhat, large(dx))
    _launch(cuda, way, x.dtype, "bn_backward", 2, 2, data, *how, dx, dresidual)
    return True


def _launch(
    cuda: Launcher, way: Once, dtype: Any, kernel: str, held: int, numbers: int, data: tuple[Any, ...], *rest: Any
) -> None:
    """Launches a cluster's kernel, which holds so many arrays, or a resident one, whose parts leave so many numbers."""
    found = way.split
    macros = {"T": dtype, "V": found.width, "COLUMNS": int(found.columns)}
    if not way.groups:
        module = cuda.module(CLUSTER, **macros, K=found.parts, THREADS=_THREADS)
        module.launch(
            f"{kernel}_cluster", found.tiles * found.parts, found.threads, *data, *rest, shared=held * way.shared
        )
        return
    module = cuda.module(RESIDENT, **macros, THREADS=COLUMNS if found.columns else PLANES)
    x = data[0]
    partial, tickets = cuda.workspace(x, numbers * found.parts * found.channels), cuda.tickets(x, way.groups + 1)
    grid = way.groups * found.parts
    arguments = (*data, found.tiles, partial, tickets, *rest)
    module.launch(f"{kernel}_resident", grid, found.threads, *arguments, cooperative=True)


def ending(relu: bool, y: Any) -> tuple[float, bool]:
    """Returns below what y is cut off, and whether it is large."""
    return (0.0 if relu else -math.inf), large(y)


def limit(relu: bool) -> float:
    """Returns the pre-activation below which, or at which, there is no gradient."""
    return 0.0 if relu else math.nan


def large(y: Any) -> bool:
    """Says whether an array is too large to be read from the cache after it was written."""
    return bool(y.nbytes > _LARGE)


FAMILIES = (CLUSTER, RESIDENT)
