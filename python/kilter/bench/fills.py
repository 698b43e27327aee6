"""Random fills."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kilter import init
from kilter.bench.peers import Peer
from kilter.bench.timing import Case, copy_yard

KINDS = ("normal", "uniform")
SIZE = 25_000_000


def cases(peers: Sequence[Peer] = ()) -> Iterator[Case]:
    """Every case, one at a time."""
    return (case(kind, SIZE, peers) for kind in KINDS)


def case(kind: str, size: int, peers: Sequence[Peer] = ()) -> Case:
    """Random float32 numbers, written over an array."""
    out = np.zeros(size, np.float32)
    fill = init.normal if kind == "normal" else init.uniform
    beside = {peer.name: peer.fill(kind, out) for peer in peers}
    name = f"{kind} fill of {size:,}"
    return Case(name, lambda: fill(size, seed=1, out=out), out.nbytes, out.nbytes, *copy_yard(), beside)
