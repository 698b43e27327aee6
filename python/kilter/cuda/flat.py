"""Elementwise operations on flat arrays: averages, and the yardsticks of memory speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kilter.cuda.launch import Launcher, blocks, index_bits
from kilter.cuda.source import Family, Limits

_THREADS = 256

FAMILY = Family(
    "flat",
    {
        "ema": Limits(40, vectorised=True, scalar_stores=1),
        "copy": Limits(24, vectorised=True, scalar_stores=1),
        "update": Limits(64),
    },
    macros={"V": (1, 2, 4, 8), "INDEX": (32, 64)},
)


def ema(cuda: Launcher, s: Any, x: Any, h: Any) -> None:
    """Moves s to s + momentum * (x - s); h = (momentum,)."""
    width = cuda.width(x, s)
    module = cuda.module(FAMILY, T=x.dtype, V=width, INDEX=index_bits(s.size))
    module.launch("ema", blocks(s.size, _THREADS * width), _THREADS, s, x, s.size, h)


def probe_copy(cuda: Launcher, source: Any, target: Any) -> None:
    """Fills target with source, float32: the yardstick of what writes a new array."""
    width = cuda.width(source, target)
    module = cuda.module(FAMILY, T=source.dtype, V=width, INDEX=index_bits(source.size))
    module.launch("copy", blocks(source.size, _THREADS * width), _THREADS, source, target, source.size)


def probe_update(cuda: Launcher, inputs: Sequence[Any], arrays: Sequence[Any]) -> None:
    """Adds the sum of inputs to each of the arrays, float32: the yardstick of an optimizer with as many."""
    width, size = cuda.width(*inputs, *arrays), arrays[0].size
    module = cuda.module(FAMILY, T=arrays[0].dtype, V=width, INDEX=index_bits(size))
    places = [np.array([cuda.runtime.address(a) for a in some], np.uint64) for some in (inputs, arrays)]
    with cuda.runtime.on(cuda.runtime.device_of(arrays[0])):
        tables = [cuda.xp.asarray(some) for some in places]
    grid = blocks(size, _THREADS * width)
    module.launch("update", grid, _THREADS, tables[0], len(inputs), tables[1], len(arrays), size)


FAMILIES = (FAMILY,)
OPS = {"ema": ema, "probe_copy": probe_copy, "probe_update": probe_update}
