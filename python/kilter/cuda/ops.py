"""The table of operations on CUDA arrays: the names and arguments of `kilter._kilter`, and what only a device needs."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from kilter.cuda import batch, fill, flat, grads, groups, loss, optim, rows, rows_backward, tensors, tick
from kilter.cuda.launch import Launcher, Runtime

MODULES = (batch, fill, flat, grads, groups, loss, optim, rows, rows_backward, tick)


def table(runtime: Runtime) -> SimpleNamespace:
    """Returns the operations on the arrays of a runtime."""
    launcher = Launcher(runtime)
    found = {name: partial(operation, launcher) for module in MODULES for name, operation in module.OPS.items()}
    return SimpleNamespace(STATE_UNIT=tensors.UNIT, **found)
