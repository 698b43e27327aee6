"""Layer norm and RMS norm, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from kilter import init
from kilter._check import dtype_of
from kilter.bench.peers import EPS, Peer
from kilter.bench.timing import Case, copy_yard
from kilter.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward

Spec = tuple[str, tuple[int, int], str]  # "layer" or "rms", shape, dtype

SHAPES = ((4096, 1024), (16384, 768), (512, 512), (131_072, 64), (64, 65_536))
SPECS: tuple[Spec, ...] = tuple(
    (op, shape, dtype) for op in ("layer", "rms") for shape in SHAPES for dtype in ("float32", "bfloat16")
)
WHATS = ("forward", "forward, new array", "backward")


def cases(peers: Sequence[Peer] = ()) -> Iterator[Case]:
    """Every case, one at a time: the arrays of some are large."""
    return (case(spec, what, peers) for spec in SPECS for what in WHATS)


def case(spec: Spec, what: str, peers: Sequence[Peer] = ()) -> Case:
    """One pass over an array; results go to `out=` unless `what` says "new array"."""
    op, shape, dtype = spec
    x, dy = (init.normal(shape, seed=1, stream=stream, dtype=dtype) for stream in (0, 1))
    gamma, beta = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
    forward = what != "backward"
    out = None if what == "forward, new array" else np.zeros(shape, dtype_of("dtype", dtype))

    def passing() -> Any:
        return layer_norm(x, gamma, beta, out=out) if op == "layer" else rms_norm(x, gamma, eps=EPS, out=out)

    work: Callable[[], Any] = passing
    if not forward and op == "layer":
        work = partial(layer_norm_backward, dy, layer_norm(x, gamma, beta)[1], out=out)
    elif not forward:
        work = partial(rms_norm_backward, dy, rms_norm(x, gamma, eps=EPS)[1], out=out)
    beside = {}
    for peer in peers:
        pair = peer.row_norm(x, dy, gamma, beta if op == "layer" else None)
        if pair is not None:
            beside[peer.name] = pair[0 if forward else 1]
    path = x.nbytes * (2 if forward else 3)
    name = f"{'bf16 ' if dtype == 'bfloat16' else ''}{op} norm {shape} {what}"
    return Case(name, work, path, path, *copy_yard(), beside)
