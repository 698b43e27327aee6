"""Softmax with cross-entropy: one launch, and one number that the host waits for.

Bytes moved, in sizes of the logits: 2, as a block reads a sample's logits three times, but from memory once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from kilter._kilter import KilterError
from kilter.cuda.launch import Launcher
from kilter.cuda.rows import power
from kilter.cuda.source import Family, Limits

_GRID = 1024  # blocks at most: as many sums as the last block adds up

FAMILY = Family("loss", {"softmax_cross_entropy": Limits(80)}, types={"T": ("float64", "float32")})


def softmax_cross_entropy(
    cuda: Launcher, logits: Any, targets: Any, weights: Any, on: float, off: float, dlogits: Any
) -> Any:
    """Returns the loss and fills dlogits (N, K), as on the CPU but in the arithmetic of the logits; sums in float64.

    dlogits is filled even where targets are refused. While a CUDA graph is captured nothing can be waited for: targets
    are not looked at, and the loss is an array without axes that every replay fills, as it does dlogits.
    """
    samples, classes = logits.shape
    soft = targets.ndim == 2
    if targets.shape != (logits.shape if soft else (samples,)):
        raise KilterError(f"targets: expected shape {(samples,)} or {logits.shape}, got {targets.shape}")
    if dlogits.shape != logits.shape or (weights is not None and weights.shape != (samples,)):
        raise KilterError(f"logits: expected the shape of dlogits and weights, got {logits.shape}")
    grid, ticket = min(samples, _GRID), cuda.tickets(logits, 1)
    space = cuda.workspace(logits, 2 * grid + 2)
    partial, out = space[: 2 * grid], space[2 * grid :]
    captured = cuda.runtime.capturing()
    if captured:
        with cuda.runtime.on(cuda.runtime.device_of(logits)):
            out = cuda.xp.empty(2)
        kept = cuda.kept.setdefault("losses", OrderedDict())  # nobody else may get what replays read and write
        kept[len(kept)] = logits, targets, weights, dlogits, out
    numbers = (samples, classes, on, off)
    arguments = (logits, targets, int(soft), weights, *numbers, partial, ticket, dlogits, out)
    cuda.module(FAMILY, T=logits.dtype).launch("softmax_cross_entropy", grid, power(min(classes, 256), 32), *arguments)
    if captured:
        return out[0]
    loss, wrong = out.get().tolist()
    if wrong:
        _refuse(targets.get(), classes)
    return float(loss)


def _refuse(targets: Any, classes: int) -> None:
    """Says which target is wrong, in the words of the CPU."""
    if targets.ndim == 1:
        label = targets[~((targets >= 0) & (targets < classes))][0]
        raise KilterError(f"targets: expected labels in [0, {classes}), got {label:.16g}")
    sums = targets.sum(axis=1)
    row = ~(np.abs(sums - 1) < 2e-2) | ~(targets >= 0).all(axis=1)
    negative = targets[row][0][targets[row][0] < 0]
    got = f"{negative[0]:.16g}" if negative.size else f"a sum of {sums[row][0]:.16g}"
    raise KilterError(f"targets: expected rows of numbers of at least 0 that sum to 1, got {got}")


FAMILIES = (FAMILY,)
OPS = {"softmax_cross_entropy": softmax_cross_entropy}
