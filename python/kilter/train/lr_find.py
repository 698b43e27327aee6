"""Which learning rate: a short run in which it grows from far too small to far too large."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilter import _check
from kilter._check import KilterError, fail
from kilter.data import Batches
from kilter.dist import Communicator
from kilter.nn import Module
from kilter.optim import LossScaler
from kilter.train import plot, ranks
from kilter.train.checkpoint import replacing
from kilter.train.loop import FIT_BATCH, training
from kilter.train.metrics import Data, Loss, arrays, shared
from kilter.train.state import Callback, State
from kilter.train.step import Stepper, gradient


class Found(NamedTuple):
    """What `lr_find` measured: one entry for each step, and its advice."""

    lrs: NDArray[np.float64]
    losses: NDArray[np.float64]  # smoothed
    suggestion: float


def lr_find(
    model: Module,
    optimizer: Any,
    loss: Loss,
    data: Data | tuple[Any, Any],
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop: float = 4.0,
    scaler: LossScaler | None = None,
    comm: Communicator | None = None,
    seed: int = 0,
) -> Found:
    """Take steps with a learning rate that grows exponentially, and watch the loss.

    lr_i = low (high / low)^(i / (steps - 1)); the loss is smoothed as Adam does it, l <- smoothing l + (1 - smoothing)
    loss, divided by 1 - smoothing^(i + 1).

    Parameters
    ----------
    model, optimizer
        They end exactly as they were. Groups keep the ratio of their learning rates.
    loss, data, scaler, comm, seed
        As for `fit`; the batches of epoch 0, 1, ... are used, each for one step.
    low, high
        The first and the last learning rate.
    steps
        How many steps from `low` to `high`, at least 10.
    smoothing
        In [0, 1).
    stop
        End once the smoothed loss is above `stop` times its minimum, or not finite.

    Returns
    -------
    Found
        `lrs`, `losses`, up to the end, and `suggestion`: a tenth of the learning rate of the smallest loss, a safe peak
        for a schedule.

    Raises
    ------
    KilterError
        An argument is not as above, or the loss does not fall.

    References
    ----------
    Smith, 2015, arXiv:1506.01186, section 3.3; the ramp is exponential, as the right rate may be anywhere.
    """
    low = _check.number("low", low, 0.0, open_low=True)
    high = _check.number("high", high, low, math.inf, open_low=True)
    smoothing = _check.number("smoothing", smoothing, 0.0, 0.999)
    stop = _check.number("stop", stop, 1.0, math.inf, open_low=True)
    if not isinstance(steps, int) or steps < 10:
        fail("steps", "a whole number of at least 10", repr(steps))
    batches = data if isinstance(data, Data) else Batches(*arrays(data), FIT_BATCH, seed=seed)
    stepper = Stepper(optimizer, model.grads(), scaler=scaler, comm=comm)
    lrs = low * (high / low) ** (np.arange(steps) / (steps - 1))
    losses: list[float] = []
    mean, best = 0.0, math.inf
    with _unchanged(model, optimizer, scaler), training(model), np.errstate(all="ignore"):
        model.train()
        ratios = _ratios(optimizer)
        for lr, (x, y) in zip(lrs.tolist(), _forever(shared(batches, comm)), strict=False):
            for group, ratio in zip(optimizer.groups, ratios, strict=True):
                group["lr"] = lr * ratio
            value = _step(model, stepper, loss, x, y, ranks.even_share(comm, len(x)))
            value = ranks.mean(comm, value, len(x))
            mean = smoothing * mean + (1 - smoothing) * value
            smooth = mean / (1 - smoothing ** (len(losses) + 1))
            if not smooth <= stop * best:
                break
            losses.append(smooth)
            best = min(best, smooth)
    found = np.array(losses)
    # the smoothed loss trails behind: its minimum shows late, which a tenth makes up for
    lowest = int(found.argmin()) if len(found) else 0
    if len(found) < 2 or not lowest:
        raise KilterError(f"loss: expected one that falls for some lr from {low:g} to {high:g}, got none")
    return Found(lrs[: len(found)], found, float(lrs[lowest]) / 10)


class LRPicture(Callback):
    """Draws what `lr_find` measured, when the run starts."""

    def __init__(self, path: Path, found: Found) -> None:
        self.path, self.found = path, found

    def on_start(self, state: State) -> None:
        """Write the picture."""
        with replacing(self.path) as file:
            plot.draw(file, (5, 3.4), self._paint)

    def _paint(self, figure: Any) -> None:
        axes = figure.subplots()
        plot.style(axes, "loss, smoothed, while the learning rate grows", "learning rate")
        lrs, losses, suggestion = self.found
        axes.plot(lrs, losses, color=plot.COLORS[0], linewidth=1.8)
        axes.axvline(suggestion, color=plot.COLORS[1], linewidth=1.2)
        axes.annotate(
            f"{suggestion:.2g}", (suggestion, losses.max()), xytext=(4, -4), textcoords="offset points", fontsize=9
        )
        axes.set_xscale("log")


def _step(model: Module, stepper: Stepper, loss: Loss, x: Any, y: Any, share: float) -> float:
    value, dlogits = gradient(loss, model(x), y, share, stepper.scaler)
    model.backward(dlogits, need_dx=False)
    stepper.add(share)
    stepper.step()
    return value


def _forever(batches: Data) -> Iterator[tuple[Any, Any]]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def _ratios(optimizer: Any) -> list[float]:
    """The learning rates of the groups as parts of the first one's, where that is not zero."""
    rates = [group["lr"](optimizer.calls) if callable(group["lr"]) else group["lr"] for group in optimizer.groups]
    return [float(rate / rates[0]) if rates[0] else 1.0 for rate in rates]


@contextmanager
def _unchanged(model: Module, optimizer: Any, scaler: LossScaler | None) -> Iterator[None]:
    """What happens inside is undone."""
    kept = [(target, target.state_dict()) for target in (model, optimizer, scaler) if target is not None]
    options = [dict(group) for group in optimizer.groups]
    modes = [(module, module.training) for _, module in model.modules()]
    try:
        yield
    finally:
        for group, before in zip(optimizer.groups, options, strict=True):
            group.update(before)
        for target, state in kept:
            target.load_state_dict(state)
        for module, mode in modes:
            module.training = mode
