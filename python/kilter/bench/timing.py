"""Timing by turns, and the lines that it gives.

The machine's bandwidth changes from minute to minute: a row is timed in turn with its yardstick and its
peers, medians are compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from kilter import _kilter

Work = Callable[[], object]

COPY_BYTES = 256 << 20  # of the array that the yardstick copies: far more than any cache
SAMPLE_SECONDS = 20e-3  # short work is repeated until a sample takes this long
REST_SECONDS = 20e-3  # other libraries' threads spin for a moment after their work, on the core of the next
LEAST, MOST = 7, 101  # rounds


@dataclass(frozen=True)
class Case:
    """Work that moves known bytes, its yardstick, and peers that do the same work."""

    name: str
    work: Work
    path_bytes: int  # pass between memory and core
    min_bytes: int  # would, if each input were read once and each output written once
    yard: Work
    yard_bytes: int
    peers: Mapping[str, Work] = field(default_factory=dict)


class Row(NamedTuple):
    """A measured case; all times are medians in milliseconds, bandwidths are in GB/s."""

    name: str
    ms: float
    path_bytes: int
    min_bytes: int
    yardstick: float
    peers: dict[str, float]
    repeat: int  # calls in a sample

    @property
    def rate(self) -> float:
        """Path bytes over time."""
        return self.path_bytes / self.ms / 1e6

    @property
    def share(self) -> float:
        """The rate over that of the yardstick."""
        return self.rate / self.yardstick

    def numbers(self) -> dict[str, Any]:
        """Everything under the names of a JSON file."""
        return {**self._asdict(), "rate": self.rate, "share": self.share}


def timed(work: Work, repeat: int = 1) -> float:
    """Returns the seconds that one call takes, as a mean over `repeat` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - start) / repeat


def repeats(work: Work, sample: float = SAMPLE_SECONDS) -> int:
    """Calls once to warm up, then returns how many calls fill `sample` seconds."""
    work()
    return max(1, math.ceil(sample / timed(work))) if sample else 1


def by_turns(
    works: Sequence[Work], seconds: float, least: int, sample: float = SAMPLE_SECONDS, rest: float = 0.0
) -> tuple[list[float], list[int]]:
    """Returns the median time of a call of each work in seconds, and the number of calls in a sample.

    Args:
        works: called one after the other, round for round.
        seconds: how long to go on.
        least: rounds, however long they take.
        sample: seconds that a sample takes at least; 0 is one call.
        rest: seconds to wait before each sample.
    """
    counts = [repeats(work, sample) for work in works]
    rounds: list[list[float]] = []
    until = time.perf_counter() + seconds
    while len(rounds) < least or (time.perf_counter() < until and len(rounds) < MOST):
        rounds.append([])
        for work, count in zip(works, counts, strict=True):
            time.sleep(rest)
            if sample:
                work()  # not timed: what the work before left in the caches is not this one's
            rounds[-1].append(timed(work, count))
    return [median(times) for times in zip(*rounds, strict=True)], counts


def measure(case: Case, seconds: float = 1.0, least: int = LEAST) -> Row:
    """Times a case by turns with its yardstick and its peers."""
    works = [case.work, case.yard, *case.peers.values()]
    # NumPy's threads do not spin.
    rest = REST_SECONDS if set(case.peers) - {"numpy"} else 0.0
    (own, yard, *others), counts = by_turns(works, seconds, least, rest=rest)
    peers = {name: 1e3 * taken for name, taken in zip(case.peers, others, strict=True)}
    yardstick = case.yard_bytes / yard / 1e9
    return Row(case.name, 1e3 * own, case.path_bytes, case.min_bytes, yardstick, peers, counts[0])


def copy_yard() -> tuple[Work, int]:
    """Returns the yardstick of everything that writes a new array, a copy past the caches, and its bytes."""
    size = COPY_BYTES
    return lambda: _kilter.probe_copy(*_copied(size)), 2 * size


@cache
def _copied(size: int) -> tuple[Any, Any]:
    return np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)


def update_yard(size: int, arrays: int, inputs: int = 1) -> tuple[Work, int]:
    """Returns the yardstick of an optimizer on float32 arrays of that size, and its bytes.

    Args:
        size: of each array.
        arrays: that are read and written.
        inputs: that are read only.
    """
    reads, writes = ([np.full(size, 1e-3, np.float32) for _ in range(n)] for n in (inputs, arrays))
    return lambda: _kilter.probe_update(reads, writes), 4 * size * (inputs + 2 * arrays)


HEADING = f"{'':<46}{'ms':>9}{'path MB':>9}{'min MB':>8}{'GB/s':>7}{'yard':>6}{'share':>7}   peers: ms, times ours"


def line(row: Row) -> str:
    """One row of the table under `HEADING`."""
    peers = "   ".join(f"{name} {ms:.4g} {ms / row.ms:.1f}x" for name, ms in row.peers.items())
    return (
        f"{row.name:<46}{row.ms:>9.3f}{row.path_bytes / 1e6:>9.1f}{row.min_bytes / 1e6:>8.1f}"
        f"{row.rate:>7.1f}{row.yardstick:>6.1f}{row.share:>7.0%}   {peers}"
    ).rstrip()
