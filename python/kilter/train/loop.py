"""The training loop and what watches it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from kilter._check import KilterError
from kilter.data import Batches
from kilter.nn import Module
from kilter.optim import LossScaler
from kilter.train.metrics import NOTHING, Data, Loss, Meter, Metrics, arrays, evaluate

Row: TypeAlias = dict[str, float | None]

FIT_BATCH = 128  # samples per batch where arrays are given instead of batches


@dataclass
class State:
    """Where a training run stands; what callbacks see."""

    model: Module
    optimizer: Any
    epochs: int
    batches: int  # per epoch
    epoch: int = 0  # the current one, from 0
    step: int = 0  # optimizer steps of this run so far
    running: Metrics = NOTHING  # of the current epoch so far
    history: list[Row] = field(default_factory=list)
    stop: bool = False  # set it to end the run after this epoch


class Callback:
    """Watches a run: override what is needed."""

    def on_start(self, state: State) -> None:
        """Before the first epoch."""

    def on_step(self, state: State) -> None:
        """After each optimizer step."""

    def on_epoch(self, state: State) -> None:
        """After each epoch and its validation; `state.history[-1]` is its row."""

    def on_end(self, state: State) -> None:
        """At the end, also after an error or Ctrl-C, even one inside `on_start`."""


def fit(
    model: Module,
    optimizer: Any,
    loss: Loss,
    data: Data | tuple[Any, Any],
    *,
    epochs: int,
    valid: Data | tuple[Any, Any] | None = None,
    scaler: LossScaler | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    seed: int = 0,
) -> list[Row]:
    """Train a model.

    Parameters
    ----------
    model
        A `kilter.nn.Module`.
    optimizer
        Built on `model.params()`.
    loss
        `loss(logits, y) -> (mean loss, dlogits)`.
    data
        A `kilter.data.Batches`, or arrays (x, y), which are cut as `Batches(x, y, 128, seed=seed)`.
    epochs
        How often to go through the data, at least 1.
    valid
        Data to evaluate after each epoch, given like `data`; arrays are read in batches of 1,000.
    scaler
        A LossScaler for 16-bit training: the loss is taken in float32, its gradient scaled and then rounded.
    callbacks
        See `Callback`.
    progress
        Show a progress bar on stderr, if that is a terminal.
    seed
        Of the order of the data, where `data` is arrays.

    Returns
    -------
    list of dict
        One row per epoch: epoch (from 1), loss, accuracy (of the training batches as they went by),
        valid_loss, valid_accuracy, lr (of the last step), seconds (training alone), images_per_second. None
        where it does not apply.

    Raises
    ------
    KilterError
        The loss is no longer finite and there is no scaler; or an argument is wrong.

    Notes
    -----
    Layers reuse their buffers while `fit` runs. Afterwards the model is in eval mode, ready to predict.
    """
    if epochs < 1:
        raise KilterError(f"epochs: expected at least 1, got {epochs}")
    batches = data if isinstance(data, Data) else Batches(*arrays(data), FIT_BATCH, seed=seed)
    state = State(model, optimizer, epochs, len(batches))
    watchers = [*callbacks, *_progress(progress)]
    with ExitStack() as stack:
        stack.enter_context(_training(model))
        # a run that overflows says so through its loss, or the scaler backs off
        stack.enter_context(np.errstate(over="ignore", invalid="ignore"))
        for watcher in watchers:
            stack.callback(watcher.on_end, state)
            watcher.on_start(state)
        for state.epoch in range(epochs):
            row = _epoch(state, loss, batches, scaler, watchers)
            if valid is not None:
                row["valid_loss"], row["valid_accuracy"], _ = evaluate(model, valid, loss)
            state.history.append(row)
            for watcher in watchers:
                watcher.on_epoch(state)
            if state.stop:
                break
    return state.history


def _epoch(state: State, loss: Loss, batches: Data, scaler: LossScaler | None, watchers: Sequence[Callback]) -> Row:
    """Train for one epoch; its row without the validation."""
    model, optimizer = state.model, state.optimizer
    steppers = [w for w in watchers if type(w).on_step is not Callback.on_step]
    grads = model.grads()
    meter = Meter()
    model.train()
    start = time.perf_counter()
    for x, y in batches.epoch(state.epoch):
        logits = model(x)
        if scaler is None:
            value, dlogits = loss(logits, y)
            if not math.isfinite(value):
                where = f"epoch {state.epoch + 1}, step {state.step + 1}"
                raise KilterError(f"loss: expected a finite number, got {value} in {where}; try a smaller lr")
        else:
            value, dlogits = _scaled_loss(loss, logits, y, scaler.scale)
        model.backward(dlogits, need_dx=False)
        optimizer.step(grads, scaler=scaler)
        meter.add(value, logits, y)
        state.step += 1
        if steppers:
            state.running = meter.mean()
            for watcher in steppers:
                watcher.on_step(state)
    seconds = time.perf_counter() - start
    state.running = meter.mean()
    return {
        "epoch": state.epoch + 1,
        "loss": state.running.loss,
        "accuracy": state.running.accuracy,
        "valid_loss": None,
        "valid_accuracy": None,
        "lr": _lr(optimizer),
        "seconds": seconds,
        "images_per_second": state.running.samples / seconds,
    }


def _scaled_loss(loss: Loss, logits: Any, y: Any, scale: float) -> tuple[float, Any]:
    """Loss in at least float32, and its gradient times scale, rounded once to the dtype of the logits."""
    wide = logits if logits.dtype.itemsize > 2 else logits.astype(np.float32)
    value, dlogits = loss(wide, y)
    return value, (dlogits * wide.dtype.type(scale)).astype(logits.dtype, copy=False)


def _lr(optimizer: Any) -> float:
    """Learning rate of the last step, of the first group."""
    lr = optimizer.groups[0]["lr"]
    return float(lr(max(optimizer.calls - 1, 0)) if callable(lr) else lr)


@contextmanager
def _training(model: Module) -> Iterator[None]:
    """Buffers reused inside; afterwards as before, and in eval mode."""
    before = model.reuses_buffers
    model.reuse_buffers(True)
    try:
        yield
    finally:
        model.reuse_buffers(before)
        model.eval()


def _progress(wanted: bool) -> list[Callback]:
    if not wanted or not sys.stderr.isatty():
        return []
    from kilter.train.progress import Progress

    return [Progress()]
