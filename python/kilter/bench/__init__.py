"""How fast kilter is on this machine, beside the machine's own bandwidth and beside other libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from kilter import __version__, _kilter
from kilter.bench import fills, groups, norms, optim, rows, training
from kilter.bench.peers import Peer, installed
from kilter.bench.timing import HEADING, Case, line, measure

__all__ = ["main"]

TITLES = {
    "norms": ("norms in training, batch norm unless named, float32 unless bf16", "yard: copy past the caches"),
    "optim": ("optimizer steps, float32", "yard: the same streams with one addition"),
    "init": ("random numbers, float32", "yard: copy past the caches"),
}


def _norms(peers: Sequence[Peer]) -> Iterator[Case]:
    return chain(norms.cases(peers), rows.cases(peers), groups.cases(peers))


CASES = {"norms": _norms, "optim": optim.cases, "init": fills.cases}


def main(part: str, peers: Sequence[str] = ("numpy", "torch")) -> list[dict[str, Any]]:
    """Measures a part, prints its table and returns its rows.

    Args:
        part: "norms", "optim", "init" or "train".
        peers: names of libraries to measure beside kilter, where they are installed: "numpy", "torch", "jax".
    """
    found = installed(peers)
    machine = (
        f"kilter {__version__}, {_kilter.num_threads()} threads, {_kilter.simd_level()}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    return _train(machine, found) if part == "train" else _table(part, machine, found)


def _table(part: str, machine: str, peers: Sequence[Peer]) -> list[dict[str, Any]]:
    title, yard = TITLES[part]
    print(f"{part}: {title}; {machine}; {yard}; share = GB/s on path bytes over yard")
    print(HEADING, flush=True)
    found: list[dict[str, Any]] = []
    for case in CASES[part](peers):
        row = measure(case)
        print(line(row), flush=True)
        found.append(row.numbers())
        del case  # its arrays make room for those of the next
    print()
    return found


def _train(machine: str, peers: Sequence[Peer]) -> list[dict[str, Any]]:
    print(f"train: an epoch of the MLP {'-'.join(map(str, training.SIZES))} with batch norm, AdamW; {machine}")
    found: list[dict[str, Any]] = []
    for row in training.rows(peers):
        if not found:
            print(f"data: {training.SAMPLES:,} samples of {row['data']}")
        print(*training.lines(row), sep="\n", flush=True)
        found.append(row)
    print()
    return found
