"""Batch norm: statistics per channel, the normalised array, and gradients.

Bytes moved, in sizes of the data: training forward 3, inference 2, backward 5; with a residual one more forward, and
three more backward (it is read twice, its gradient written). What the second launch reads, it reads from the end: so
much of it as the L2 cache keeps comes from there. Besides, each block of sums writes 24 bytes (backward 16) for each of
its channels, which one block of each tile reads.

Two launches each way. The values of a channel are split into parts by the shape of the array and the number of
multiprocessors alone; those of a part are summed about the mean of the first ones, a few in the arithmetic type (of
columns at most 64), then in float64; parts are merged in float64, in their order, by the block that ends last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter.cuda import batch_once, channels
from kilter.cuda.channels import Split, around, split
from kilter.cuda.launch import Launcher, Module, blocks
from kilter.cuda.source import Family, Limits, widest


def _family(columns: int, threads: int, stats: int, apply: int, sums: int, gradient: int) -> Family:
    """The kernels for planes or for columns, with the registers of each."""
    kernels = {
        "bn_stats": Limits(stats, vectorised=True, scalar_stores=12, reduces=True),
        "bn_finish": Limits(48),
        "bn_apply": Limits(apply, vectorised=True),
        "bn_sums": Limits(sums, vectorised=True, scalar_stores=5, reduces=True),
        "bn_gradient": Limits(gradient, vectorised=True),
    }
    macros = {"V": (1, 2, 4, 8), "COLUMNS": (columns,), "THREADS": (threads,)}
    return Family("batch", kernels, macros=macros, rare=lambda v: v["V"] not in (1, widest(v["T"])))


PLANES = _family(0, channels.PLANES, stats=80, apply=80, sums=80, gradient=80)
COLUMNS = _family(1, channels.COLUMNS, stats=128, apply=112, sums=128, gradient=128)
_NO_SCALARS = np.zeros(3)  # in place of h, where it is not read


def _split(cuda: Launcher, x: Any, axis: int, weights: Any, *arrays: Any) -> Split:
    aligned = cuda.width(x, weights, *arrays)
    return split(around(x, axis), x.dtype.itemsize, aligned, cuda.processors(x), weights is not None)


def _module(cuda: Launcher, dtype: Any, width: int, columns: bool) -> Module:
    if columns:
        return cuda.module(COLUMNS, T=dtype, V=width, COLUMNS=1, THREADS=channels.COLUMNS)
    return cuda.module(PLANES, T=dtype, V=width, COLUMNS=0, THREADS=channels.PLANES)


def _launch(cuda: Launcher, found: Split, dtype: Any, kernel: str, *arguments: Any) -> None:
    module = _module(cuda, dtype, found.width, found.columns)
    module.launch(kernel, found.tiles * found.parts, found.threads, *arguments)


def bn_stats(cuda: Launcher, x: Any, axis: int, weights: Any, count: Any, mean: Any, m2: Any) -> None:
    """Fills count, mean and centred second moment of each channel; weights has one value per position."""
    _stats(cuda, x, axis, weights, _NO_SCALARS, count, mean, m2, None, None, None, None, None)


def _stats(
    cuda: Launcher, x: Any, axis: int, weights: Any, h: Any, count: Any, mean: Any, m2: Any, *statistics: Any
) -> None:
    x, weights = _aligned(cuda, x), _aligned(cuda, weights)
    found = _split(cuda, x, axis, weights)
    partial, tickets = cuda.workspace(x, 3 * found.parts * found.channels), cuda.tickets(x, found.tiles)
    out = (partial, tickets, count, mean, m2, h, *statistics)
    _launch(cuda, found, x.dtype, "bn_stats", x, weights, *found[4:], *out)


def _aligned(cuda: Launcher, x: Any) -> Any:
    """Returns x, or a copy where vectors can be read: what is added to what must not depend on where an array lies."""
    if x is None or cuda.runtime.address(x) % 16 == 0:
        return x
    copy = cuda.xp.empty(x.shape, x.dtype)
    copy[...] = x
    return copy


def bn_finish(
    cuda: Launcher,
    count: Any,
    mean: Any,
    m2: Any,
    h: Any,
    hi: Any,
    lo: Any,
    rstd: Any,
    running_mean: Any,
    running_var: Any,
) -> None:
    """Fills mean = hi + lo and rstd, moves the running statistics; h = (eps, momentum, unbiased)."""
    module = _module(cuda, hi.dtype, 1, False)
    threads, statistics = channels.PLANES, (hi, lo, rstd, running_mean, running_var)
    module.launch("bn_finish", blocks(mean.size, threads), threads, mean.size, count, mean, m2, h, *statistics)


def bn_apply(
    cuda: Launcher,
    x: Any,
    axis: int,
    hi: Any,
    lo: Any,
    rstd: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    y: Any,
) -> None:
    """Fills y = ((x - hi) - lo) * (gamma * rstd) + beta (+ residual), cut off below zero with relu."""
    found = _split(cuda, x, axis, None, residual, y)
    how = (hi, lo, rstd, gamma, beta, residual, *batch_once.ending(relu, y))
    _launch(cuda, found, x.dtype, "bn_apply", x, *found[4:], *how, y)


def bn_infer(
    cuda: Launcher,
    x: Any,
    axis: int,
    eps: float,
    gamma: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    running_mean: Any,
    running_var: Any,
    mean: Any,
    hi: Any,
    lo: Any,
    rstd: Any,
    y: Any,
) -> None:
    """Fills y, mean = hi + lo and rstd from the running statistics, as bn_finish and bn_apply do."""
    mean[...] = running_mean
    count, h = cuda.xp.ones(1), np.array((eps, 0.0, 0.0))
    bn_finish(cuda, count, mean, running_var.astype("float64"), h, hi, lo, rstd, None, None)
    bn_apply(cuda, x, axis, hi, lo, rstd, gamma, beta, residual, relu, y)


def bn_train(
    cuda: Launcher,
    x: Any,
    axis: int,
    weights: Any,
    h: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    count: Any,
    mean: Any,
    m2: Any,
    hi: Any,
    lo: Any,
    rstd: Any,
    running_mean: Any,
    running_var: Any,
    y: Any,
) -> None:
    """Fills what bn_stats, bn_finish and bn_apply fill, same bits, in two launches."""
    statistics = (count, mean, m2, h, hi, lo, rstd, running_mean, running_var)
    if batch_once.train(cuda, x, axis, weights, statistics, (gamma, beta, residual), relu, y):
        return
    _stats(cuda, x, axis, weights, h, count, mean, m2, hi, lo, rstd, running_mean, running_var)
    bn_apply(cuda, x, axis, hi, lo, rstd, gamma, beta, residual, relu, y)


def bn_backward_reduce(
    cuda: Launcher,
    dy: Any,
    x: Any,
    axis: int,
    hi: Any,
    lo: Any,
    rstd: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    sum_dy: Any,
    sum_dy_xhat: Any,
) -> None:
    """Fills the gradients of beta and gamma: sums of dz and dz * x̂; dz is dy behind the ReLU's mask."""
    dy, x, residual = _aligned(cuda, dy), _aligned(cuda, x), _aligned(cuda, residual if relu else None)
    found = _split(cuda, x, axis, None)
    partial, tickets = cuda.workspace(x, 2 * found.parts * found.channels), cuda.tickets(x, found.tiles)
    how = (hi, lo, rstd, gamma, beta, residual, batch_once.limit(relu))
    _launch(cuda, found, x.dtype, "bn_sums", dy, x, *found[4:], partial, tickets, *how, sum_dy, sum_dy_xhat)


def bn_backward_apply(
    cuda: Launcher,
    dy: Any,
    x: Any,
    axis: int,
    weights: Any,
    count: Any,
    hi: Any,
    lo: Any,
    rstd: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    sum_dy: Any,
    sum_dy_xhat: Any,
    dx: Any,
    dresidual: Any,
) -> None:
    """Fills dx, and dz into dresidual, from the sums; sums of zero take the statistics as constant."""
    residual = residual if relu else None
    found = _split(cuda, x, axis, weights, dy, residual, dx, dresidual)
    how = (hi, lo, rstd, gamma, beta, residual, batch_once.limit(relu), sum_dy, sum_dy_xhat, batch_once.large(dx))
    _launch(cuda, found, x.dtype, "bn_gradient", dy, x, weights, *found[4:], count, *how, dx, dresidual)


def bn_backward(
    cuda: Launcher,
    dy: Any,
    x: Any,
    axis: int,
    weights: Any,
    count: Any,
    hi: Any,
    lo: Any,
    rstd: Any,
    gamma: Any,
    beta: Any,
    residual: Any,
    relu: bool,
    sum_dy: Any,
    sum_dy_xhat: Any,
    dx: Any,
    dresidual: Any,
) -> None:
    """Fills what bn_backward_reduce and bn_backward_apply fill, same bits."""
    how = (hi, lo, rstd, gamma, beta, residual, relu, sum_dy, sum_dy_xhat)
    if batch_once.backward(cuda, dy, x, axis, weights, count, how, dx, dresidual):
        return
    bn_backward_reduce(cuda, dy, x, axis, *how)
    bn_backward_apply(cuda, dy, x, axis, weights, count, *how, dx, dresidual)


FAMILIES = (PLANES, COLUMNS, *batch_once.FAMILIES)
OPS = {
    "bn_stats": bn_stats,
    "bn_finish": bn_finish,
    "bn_apply": bn_apply,
    "bn_infer": bn_infer,
    "bn_train": bn_train,
    "bn_backward_reduce": bn_backward_reduce,
    "bn_backward_apply": bn_backward_apply,
    "bn_backward": bn_backward,
}
