"""Group norm, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kilter import init
from kilter._check import dtype_of
from kilter.bench.peers import Peer
from kilter.bench.timing import Case, copy_yard
from kilter.norm import group_norm, group_norm_backward

Spec = tuple[tuple[int, ...], int, int, str]  # shape, groups, channel axis, dtype

SHAPES = (((8, 320, 64, 64), 1), ((8, 64, 64, 320), -1), ((8, 1280, 16, 16), 1), ((8, 16, 16, 1280), -1))
SPECS: tuple[Spec, ...] = tuple((shape, 32, axis, dtype) for shape, axis in SHAPES for dtype in ("float32", "bfloat16"))
WHATS = ("forward", "forward, new array", "backward")


def cases(peers: Sequence[Peer] = ()) -> Iterator[Case]:
    """Every case, one at a time: the arrays of some are large."""
    return (case(spec, what, peers) for spec in SPECS for what in WHATS)


def case(spec: Spec, what: str, peers: Sequence[Peer] = ()) -> Case:
    """One pass over an array; results go to `out=` unless `what` says "new array".

    A group, with channels last a sample, is read again from a cache: path bytes are the fewest.
    """
    shape, groups, axis, dtype = spec
    x, dy = (init.normal(shape, seed=1, stream=stream, dtype=dtype) for stream in (0, 1))
    gamma, beta = np.ones(shape[axis], np.float32), np.zeros(shape[axis], np.float32)
    forward = what != "backward"
    out = None if what == "forward, new array" else np.zeros(shape, dtype_of("dtype", dtype))

    def passing() -> Any:
        return group_norm(x, groups, gamma, beta, axis=axis, out=out)

    work: Callable[[], Any] = passing
    if not forward:
        _, saved = group_norm(x, groups, gamma, beta, axis=axis)

        def work() -> Any:
            return group_norm_backward(dy, saved, out=out)

    beside = {}
    for peer in peers:
        pair = peer.group_norm(x, dy, groups, axis, gamma, beta)
        if pair is not None:
            beside[peer.name] = pair[0 if forward else 1]
    path = x.nbytes * (2 if forward else 3)
    short = "bf16 " if dtype == "bfloat16" else ""
    name = f"{short}group norm {shape}{' axis -1' if axis == -1 else ''} {what}"
    return Case(name, work, path, path, *copy_yard(), beside)
