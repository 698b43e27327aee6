"""Initialisation: random arrays that are a pure function of (seed, stream, index).

The same seed and stream give the same bits for any number of threads, on every device and in every release; those of
`orthogonal`, which LAPACK makes, only on one machine.
"""

from kilter.init.fills import normal, truncated_normal, uniform
from kilter.init.qr import orthogonal
from kilter.init.scale import fans, gain
from kilter.init.schemes import (
    he_normal,
    he_uniform,
    lecun_normal,
    lecun_uniform,
    torch_default,
    xavier_normal,
    xavier_uniform,
)

__all__ = [
    "fans",
    "gain",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "orthogonal",
    "torch_default",
    "truncated_normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
]
