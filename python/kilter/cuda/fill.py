"""Random fills: the bits of the CPU's."""

from __future__ import annotations

from typing import Any

from kilter.cuda.launch import Launcher, blocks
from kilter.cuda.source import Family, Limits

_THREADS, _GROUP = 256, 64

FAMILY = Family(
    "fill",
    {
        "fill_uniform": Limits(64, vectorised=True),
        "fill_uniform_tail": Limits(32),
        "fill_normal": Limits(64, vectorised=True),
        "fill_normal_tail": Limits(40),
        "philox": Limits(32),
    },
    options=("-fmad=false",),
)


def philox(cuda: Launcher, out: Any, seed: int, stream: int, attempt: int = 0) -> None:
    """Fills a uint32 array with Philox4x32-10 words."""
    counters = blocks(out.size, _GROUP) * 16
    module = cuda.module(FAMILY, T="float32")
    module.launch("philox", blocks(counters, _THREADS), _THREADS, out, out.size, seed, stream, attempt)


def fill_uniform(cuda: Launcher, out: Any, seed: int, stream: int, h: Any) -> None:
    """Fills out with shift + scale * u, u uniform on [0, 1); h = (shift, scale)."""
    _fill(cuda, "fill_uniform", out, seed, stream, 0, h)


def fill_normal(cuda: Launcher, out: Any, seed: int, stream: int, h: Any, attempt: int = 0) -> None:
    """Fills out with shift + scale * z, z standard normal; h = (shift, scale)."""
    _fill(cuda, "fill_normal", out, seed, stream, attempt, h)


def _fill(cuda: Launcher, kernel: str, out: Any, seed: int, stream: int, attempt: int, h: Any) -> None:
    module = cuda.module(FAMILY, T=out.dtype)
    width = 16 // out.dtype.itemsize
    groups = out.size // _GROUP if cuda.width(out) == width else 0
    counters, all_counters = 16 * groups, 16 * blocks(out.size, _GROUP)
    vectors = blocks(counters, _THREADS * width)
    module.launch(kernel, vectors, _THREADS, out, groups * _GROUP, seed, stream, attempt, 0, h)
    rest = blocks(all_counters - counters, _THREADS)
    module.launch(f"{kernel}_tail", rest, _THREADS, out, out.size, seed, stream, attempt, counters, h)


FAMILIES = (FAMILY,)
OPS = {"philox": philox, "fill_uniform": fill_uniform, "fill_normal": fill_normal}
