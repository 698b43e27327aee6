"""What is read of all gradients before a step, and clipping outside of one: a launch for all tensors of a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kilter._kilter import KilterError
from kilter.cuda import tensors
from kilter.cuda.launch import Launcher
from kilter.cuda.optim import Prepared
from kilter.cuda.source import Family, Limits
from kilter.cuda.tensors import TENSOR, THREADS, Table

FAMILY = Family("grads", {"scan": Limits(64), "clip": Limits(64, vectorised=True, scalar_stores=1)})


def scan(cuda: Launcher, steps: Sequence[Prepared], out: Any) -> None:
    """Does what grad_scan does with the gradients of steps that were prepared: their tables are read."""
    _scan(cuda, [(one.dtype, one.table) for prepared in steps for one in prepared.launches], out)


def grad_scan(cuda: Launcher, names: Sequence[str], grads: Sequence[Any], out: Any) -> None:
    """Fills out with the sum of the squares of all gradients, and 1 or 0 for whether all are finite."""
    if out.shape != (2,) or out.dtype != np.float64:
        raise KilterError(f"out: expected two numbers, got {out.dtype} of shape {out.shape}")
    _scan(cuda, _tables(cuda, "g", names, grads), out)


def clip(cuda: Launcher, names: Sequence[str], grads: Sequence[Any], h: Any) -> None:
    """Changes every g to min(max(g * scale, -limit), limit), NaN stays NaN; h = (scale, limit)."""
    for dtype, table in _tables(cuda, "p", names, grads):
        module = cuda.module(FAMILY, T=dtype)
        module.launch("clip", table.grid(cuda), THREADS, table.tensors, table.chunks, table.work, h)


def _scan(cuda: Launcher, tables: Sequence[tuple[Any, Table]], out: Any) -> None:
    tables = [(dtype, table) for dtype, table in tables if table.work]
    if not tables:
        out.set(np.array([0.0, 1.0]))
    ticket = cuda.tickets(out, 1)
    for i, (dtype, table) in enumerate(tables):
        grid = table.grid(cuda)
        partial = cuda.workspace(out, 2 * grid)
        arguments = (table.tensors, table.chunks, table.work, partial, ticket, int(i == 0), out)
        cuda.module(FAMILY, T=dtype).launch("scan", grid, THREADS, *arguments)


def _tables(cuda: Launcher, column: str, names: Sequence[str], grads: Sequence[Any]) -> list[tuple[Any, Table]]:
    """Returns a table for each dtype."""
    rows = np.zeros(len(grads), TENSOR)
    rows[column] = tensors.checked(cuda, "grads", names, grads, next(iter(grads), None))
    rows["n"] = [g.size for g in grads]
    rows["wide_g"] = rows[column] % np.uint64(16) == 0
    dtypes = [g.dtype for g in grads]
    return [
        (dtype, tensors.table(cuda, grads[0], rows[[one == dtype for one in dtypes]]))
        for dtype in dict.fromkeys(dtypes)
    ]


FAMILIES = (FAMILY,)
OPS = {"scan": scan, "grad_scan": grad_scan, "clip": clip}
