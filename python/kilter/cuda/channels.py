"""How blocks share an array (outer, channels, inner) with one statistic per channel: for kernels on channels.cuh."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from kilter.cuda.launch import blocks

PLANES, COLUMNS = 256, 512  # threads of a block; of columns many, as each block leaves sums for all of its channels
MANY = 64  # positions of a thread: what sums of columns in float32 take
_FEW = 4  # positions of a thread, where there is enough for all blocks
_RESIDENT = 2048  # threads of a launch, for each multiprocessor
_SHORT = 512  # bytes of a plane, below which tiles of channels are read in longer runs


class Split(NamedTuple):
    """What each block has of an array, and how many there are; the last six are what kernels take."""

    columns: bool
    width: int  # elements of a vector
    tiles: int  # of channels
    threads: int  # of a block
    channels: int
    inner: int
    positions: int  # of a channel: vectors of planes, or rows
    per: int  # positions of a part
    parts: int  # of a tile, each of which is a block's
    lanes: int  # vectors of a row of a tile

    @property
    def at_once(self) -> int:
        """How many positions a block's threads take at a time."""
        return self.threads // self.lanes if self.columns else self.threads

    def into(self, parts: int) -> Split:
        """Returns the split into at most so many parts, of which none is empty."""
        per = max(1, blocks(self.positions, max(1, parts)))
        return self._replace(per=per, parts=max(1, blocks(self.positions, per)))


def around(x: Any, axis: int) -> tuple[int, int, int]:
    """Returns x's shape as (outer, channels, inner), with inner 1 where there is no value."""
    outer, channels, inner = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    return (outer, channels, inner) if inner else (0, channels, 1)


@lru_cache(maxsize=1024)
def split(shape: tuple[int, int, int], size: int, aligned: int, processors: int, weighted: bool = False) -> Split:
    """Returns the split of an array whose elements of `size` bytes may move `aligned` at a time.

    Channels with few values beside each other are columns of a matrix, where a tile of whole channels is a whole number
    of vectors and one block can have it; else each channel is planes. There are as many parts as leave every thread
    something to do, up to what fills the device twice.
    """
    found = tiling(shape, size, aligned, weighted)
    most = _RESIDENT * processors // (found.threads * max(found.tiles, 1))
    parts = min(most, blocks(found.positions, found.at_once * _FEW))
    if found.columns:
        parts = max(parts, blocks(found.positions, found.at_once * MANY))
    return found.into(parts)


def tiling(shape: tuple[int, int, int], size: int, aligned: int, weighted: bool) -> Split:
    """Returns the split of an array with one part for each tile."""
    outer, channels, inner = shape
    width = math.gcd(channels * inner, aligned)
    unit = width // math.gcd(inner, width)  # channels that are whole vectors together
    lanes = unit * inner // width
    short = inner * size < _SHORT or math.gcd(inner, aligned) < width
    if not channels or (inner > 1 and (weighted or not short or lanes > PLANES)):
        width = math.gcd(inner, aligned)
        positions = outer * inner // width
        return Split(False, width, channels, min(PLANES, warps(positions)), channels, inner, positions, positions, 1, 1)
    # Runs of 64 bytes, or 128 in long rows, and not shorter in the last tile: many channels in a block are many sums.
    run = 64 if channels * inner * size < 1024 else 128
    units = blocks(channels, unit)
    lanes *= blocks(units, blocks(units, max(1, run // (lanes * width * size))))
    tiles = blocks(channels * inner, lanes * width)
    threads = min(COLUMNS, warps(max(lanes * width // inner, lanes * max(outer, 1))))
    return Split(True, width, tiles, threads, channels, inner, outer, outer, 1, lanes)


def warps(threads: int) -> int:
    """Returns a number of threads that are whole warps."""
    return 32 * max(1, blocks(threads, 32))
