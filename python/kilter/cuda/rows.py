"""Layer norm and RMS norm, forward; and what group norm with channels first takes from them, whose groups are rows.

Bytes moved, in sizes of the data: 2 (4 with a residual) where a row fits into registers or shared memory, else 3 (5).

Rows begin at 64-bit offsets, and inside a row, or a part of one, places are counted from its beginning: nothing else is
done for large arrays. What a row gives depends on its width, its dtype and the device's shared memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from kilter.cuda.launch import Launcher, blocks
from kilter.cuda.source import Family, Limits, widest

MOST = 512  # threads of a block
STATIC = 1 << 10  # bytes of shared memory that kernels use beside what they are given
_HELD = 4  # vectors of a row that a thread holds in registers at most
PART = 256 * _HELD  # vectors of a part of a long row


def built(variant: dict[str, Any]) -> bool:
    """Says whether `vectors` gives such a V."""
    return variant["V"] * 16 // widest(variant["T"]) in (4, 16) or variant["V"] == 1


def family(name: str, kernels: dict[str, Limits], **macros: tuple[int, ...]) -> Family:
    """Returns the family of kernels with vectors as `vectors` gives them."""
    macros = {"V": (1, 2, 4, 8), **macros}
    return Family(name, kernels, macros=macros, built=built, rare=lambda v: v["V"] not in (1, widest(v["T"])))


FORWARD = family("rows", {"forward": Limits(88, True, 5)}, K=(0, 1, 4))
LONG = family(
    "rows_long",
    {
        "moments": Limits(64, True, 3),
        "apply": Limits(64, True, newer=80),
        "gradient_long": Limits(80, True, newer=112),
        "sums": Limits(56, True, 2, reduces=True),
    },
)
SUMS = Family(
    "sums",
    {"sum_rows": Limits(40), "merge_moments": Limits(56), "merge_sums": Limits(56)},
    types={"T": ("float64", "float32")},
)


class Rows(NamedTuple):
    """Rows of `width` places, of each of `groups` groups in turn; `inner` adjacent places are a channel."""

    number: int
    width: int
    groups: int = 1
    inner: int = 1

    @property
    def channels(self) -> int:
        """How many channels a row has."""
        return self.width // self.inner

    @property
    def divisor(self) -> tuple[int, int]:
        """Factor and shift: i / inner = i * factor >> shift for i below 2**31."""
        inner = min(self.inner, 2**31 - 1)
        shift = 31 + (inner - 1).bit_length()
        return -(-(1 << shift) // inner), shift


class Saved(NamedTuple):
    """Where the statistics of rows are: hi + lo is the mean, or there are the moments; RMS norm has rstd alone."""

    hi: Any = None
    lo: Any = None
    rstd: Any = None
    mean: Any = None
    m2: Any = None

    @property
    def centred(self) -> bool:
        """Whether there is a mean."""
        return self.hi is not None or self.mean is not None


class Forward(NamedTuple):
    """What is normalised, x or total = x + residual, and what is filled; h = (eps,)."""

    rows: Rows
    x: Any
    residual: Any
    h: Any
    gamma: Any
    beta: Any
    saved: Saved
    total: Any
    y: Any


# --------------------------------------------------------------------------- arrays and blocks


def real(x: Any) -> str:
    """Returns the dtype of the arithmetic."""
    return "float64" if x.dtype == "float64" else "float32"


def vectors(x: Any, length: int) -> list[int]:
    """Returns how many elements may move together, the most first: words of 16 or 4 bytes, or one element."""
    size = x.dtype.itemsize
    return [v for v in (16 // size, 4 // size, 1) if v and not length % v]


def vector(x: Any, length: int) -> int:
    """Returns how many elements move together."""
    return vectors(x, length)[0]


def _lies_well(cuda: Launcher, v: int, array: Any) -> bool:
    return array is None or cuda.runtime.address(array) % min(16, v * array.dtype.itemsize) == 0


def aligned(cuda: Launcher, v: int, *arrays: Any) -> list[Any]:
    """Returns arrays that are read, copied where no vectors are: what is added to what does not depend on the place."""
    return [array if _lies_well(cuda, v, array) else array.copy() for array in arrays]


@contextmanager
def written(cuda: Launcher, v: int, array: Any) -> Iterator[Any]:
    """Gives where to write an array's values: itself, or where no vectors are, a new one that is copied into it."""
    if _lies_well(cuda, v, array):
        yield array
    else:
        room = cuda.xp.empty(array.shape, array.dtype)
        yield room
        array[...] = room


def spaces(cuda: Launcher, like: Any, *wanted: tuple[int, str]) -> list[Any]:
    """Returns vectors of these sizes and dtypes, cut from one workspace."""
    sizes = [-(-size * (8 if dtype == "float64" else 4) // 16) * 16 for size, dtype in wanted]
    space, found, start = cuda.workspace(like, sum(sizes), "uint8"), [], 0
    for (size, dtype), room in zip(wanted, sizes, strict=True):
        found.append(space[start : start + room].view(dtype)[:size])
        start += room
    return found


def power(n: int, least: int = 8) -> int:
    """Returns the smallest power of two that is not below either."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def beside(rows: int, lanes: int, threads: int) -> int:
    """Returns how many rows of `lanes` threads a block of about `threads` has: whole warps, no more than there are."""
    return max(1, 32 // lanes, min(threads // lanes, power(rows, 1)))


def merging(parts: int) -> int:
    """Returns the threads of a block that merges so many parts."""
    return 32 if parts <= 32 else 128


# --------------------------------------------------------------------------- forward


def forward(cuda: Launcher, work: Forward) -> None:
    """Normalises rows."""
    rows, v = work.rows, vector(work.x, work.rows.width)
    x, residual = aligned(cuda, v, work.x, work.residual)
    gamma, beta = aligned(cuda, v if rows.inner == 1 else 1, work.gamma, work.beta)
    with written(cuda, v, work.y) as y:
        here = work._replace(x=x, residual=residual, gamma=gamma, beta=beta, y=y)
        count, size = rows.width // v, rows.width * x.dtype.itemsize
        if count <= MOST * _HELD:
            held = 1 if count <= 32 else _HELD
            _forward(cuda, here, v, held, power(blocks(count, held)), 0)
        elif size <= cuda.shared(x) - STATIC:
            _forward(cuda, here, v, 0, MOST, size)
        else:
            _forward_in_parts(cuda, here, v)


def _forward(cuda: Launcher, work: Forward, v: int, held: int, lanes: int, shared: int) -> None:
    """Normalises rows that the chip holds: a thread `held` vectors, or a block's shared memory a row."""
    rows, x, residual, h, gamma, beta, saved, total, y = work
    block = lanes, beside(rows.number, lanes, 128)
    places = (rows.width, 1.0 / rows.width, rows.groups, rows.channels, rows.inner, *rows.divisor)
    arguments = (x, residual, gamma, beta, *saved, total, y, rows.number, *places, h)
    module = cuda.module(FORWARD, T=x.dtype, V=v, K=held)
    module.launch("forward", blocks(rows.number, block[1]), block, *arguments, shared=shared)


def _forward_in_parts(cuda: Launcher, work: Forward, v: int) -> None:
    """Normalises longer rows: x is read twice."""
    rows, x, residual, h, gamma, beta, saved, total, y = work
    parts = blocks(rows.width, PART * v)
    module, sums, grid = cuda.module(LONG, T=x.dtype, V=v), cuda.module(SUMS, T=real(x)), rows.number * parts
    partial = cuda.workspace(x, grid * 3)
    module.launch("moments", grid, 256, x, residual, total, partial, rows.width, parts, int(saved.centred))
    sums.launch("merge_moments", rows.number, merging(parts), partial, parts, *saved, h)
    places = (rows.width, parts, rows.groups, rows.channels, rows.inner, *rows.divisor)
    module.launch("apply", grid, 256, x if residual is None else total, gamma, beta, *saved, y, *places, h)


def ln_forward(
    cuda: Launcher,
    x: Any,
    residual: Any,
    h: Any,
    gamma: Any,
    beta: Any,
    hi: Any,
    lo: Any,
    rstd: Any,
    sum: Any,
    y: Any,
) -> None:
    """Fills mean = hi + lo and rstd of each row of a matrix (h = (eps,)), y, and sum = x + residual.

    Without hi and lo: y = x * rstd * gamma + beta, where rstd is that of the mean square.
    """
    forward(cuda, Forward(Rows(*x.shape), x, residual, h, gamma, beta, Saved(hi, lo, rstd), sum, y))


FAMILIES = (FORWARD, LONG, SUMS)
OPS = {"ln_forward": ln_forward}
