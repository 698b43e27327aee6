"""kilter: normalisation, optimizers, initialisation and a training loop for NumPy arrays, at memory speed.

The modules are `norm`, `stats`, `optim`, `init`, `schedule`: functions and classes on plain arrays; and on top of them
`nn`, `data`, `dist`, `train`. `import kilter` loads the first five; the others load when they are first named.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from kilter import _kilter, init, norm, optim, schedule, stats
from kilter._check import KilterError
from kilter._kilter import __version__

__all__ = [
    "KilterError",
    "__version__",
    "data",
    "dist",
    "init",
    "nn",
    "norm",
    "optim",
    "schedule",
    "stats",
    "train",
]

# Threads do not survive a fork; the child starts its own.
os.register_at_fork(after_in_child=_kilter.after_fork)


def __getattr__(name: str) -> ModuleType:
    if name in ("data", "dist", "nn", "train"):
        return importlib.import_module(f"kilter.{name}")
    raise AttributeError(f"module 'kilter' has no attribute {name!r}")
