"""Batch norm: forward in training and in evaluation, and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kilter import init
from kilter._check import dtype_of
from kilter.bench.peers import Peer
from kilter.bench.timing import Case, copy_yard
from kilter.norm import batch_norm, batch_norm_backward
from kilter.stats import RunningStats

Spec = tuple[tuple[int, ...], int, str]  # shape, channel axis, dtype

IMAGES = ((64, 64, 56, 56), (64, 256, 56, 56), (32, 512, 28, 28), (64, 128, 28, 28), (256, 512, 7, 7))
MATRICES = ((8192, 1024), (65_536, 256), (1024, 256), (128, 784), (32, 64))
SPECS: tuple[Spec, ...] = tuple(
    spec
    for dtype in ("float32", "bfloat16")
    for spec in (
        *((shape, 1, dtype) for shape in IMAGES),
        *(((n, h, w, c), -1, dtype) for n, c, h, w in IMAGES),
        *((shape, 1, dtype) for shape in MATRICES),
    )
)
WHATS = ("forward", "forward, new array", "inference", "backward")


def cases(peers: Sequence[Peer] = ()) -> Iterator[Case]:
    """Every case, one at a time: the arrays of some are large."""
    return (case(spec, what, peers) for spec in SPECS for what in WHATS)


def case(spec: Spec, what: str, peers: Sequence[Peer] = ()) -> Case:
    """One pass over an array; results go to `out=` unless `what` says "new array"."""
    shape, axis, dtype = spec
    x, dy = (init.normal(shape, seed=1, stream=stream, dtype=dtype) for stream in (0, 1))
    gamma, beta = np.ones(shape[axis], np.float32), np.zeros(shape[axis], np.float32)
    forward = what != "backward"
    out = None if what == "forward, new array" else np.zeros(shape, dtype_of("dtype", dtype))

    def passing() -> Any:
        return batch_norm(x, gamma, beta, axis=axis, out=out)

    work: Callable[[], Any] = passing
    if what == "inference":
        running = RunningStats(shape[axis])

        def work() -> Any:
            return batch_norm(x, gamma, beta, axis=axis, running=running, training=False, out=out)

    elif not forward:
        _, saved = batch_norm(x, gamma, beta, axis=axis)

        def work() -> Any:
            return batch_norm_backward(dy, saved, out=out)

    beside = {}
    for peer in peers:
        works = peer.batch_norm(x, dy, axis, gamma, beta)
        if works:
            beside[peer.name] = works[what.partition(",")[0]]
    inputs = 1 if forward else 2
    once = what == "inference" or reads_once(shape, axis, x.itemsize, inputs)
    path = x.nbytes * (1 + inputs * (1 if once else 2))
    short = "bf16 " if dtype == "bfloat16" else ""
    name = f"{short}{shape}{' axis -1' if axis == -1 else ''} {what}"
    return Case(name, work, path, x.nbytes * (1 + inputs), *copy_yard(), beside)


# A channel's slice of the batch that is read again soon stays in the cache of a core up to about this size.
CORE_CACHE = 2 << 20
RUN_BYTES, TILE = 4096, 16  # memory is read in runs of about so many bytes: small planes by up to so many channels
SMALL_PLANE, MATRIX_ROWS = 64, 16  # planes of up to so many elements are summed as columns, if there are so many rows


def reads_once(shape: tuple[int, ...], axis: int, itemsize: int, inputs: int) -> bool:
    """Whether the second look at the data, which batch statistics need, finds it in a cache.

    Args:
        shape: of x.
        axis: of the channels.
        itemsize: bytes of an element.
        inputs: how many arrays of that shape are read.
    """
    axis %= len(shape)
    channels, inner, size = shape[axis], math.prod(shape[axis + 1 :]), inputs * itemsize
    total = math.prod(shape) * size
    tile = min(max(-(-RUN_BYTES // (inner * size)), 1), TILE)
    matrix = inner <= SMALL_PLANE and math.prod(shape[:axis]) >= MATRIX_ROWS
    by_channel = not matrix and channels >= 4 and total // channels * tile <= CORE_CACHE
    return by_channel or total < _shared_cache() * 3 // 4


@cache
def _shared_cache() -> int:
    """Bytes of the last-level cache, 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)
