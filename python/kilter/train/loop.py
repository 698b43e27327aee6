"""The training loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from kilter import _check
from kilter._check import fail
from kilter.data import Batches
from kilter.dist import Communicator
from kilter.nn import Module
from kilter.optim import LossScaler, WeightEMA
from kilter.train import ranks
from kilter.train.metrics import Data, Loss, arrays, shared
from kilter.train.resume import Checkpoints
from kilter.train.run import Run
from kilter.train.state import Callback, Row, State
from kilter.train.step import Stepper

FIT_BATCH = 128  # samples per batch where arrays are given instead of batches


def fit(
    model: Module,
    optimizer: Any,
    loss: Loss,
    data: Data | tuple[Any, Any],
    *,
    epochs: int,
    valid: Data | tuple[Any, Any] | None = None,
    accumulate: int = 1,
    scaler: LossScaler | None = None,
    ema: WeightEMA | None = None,
    comm: Communicator | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
    resume: bool = False,
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
        How often to go through the data, at least 1; those before a resume count.
    valid
        Data to evaluate after each epoch, given like `data`; arrays are read in batches of 250.
    accumulate
        How many batches make one step of the optimizer, which gets their mean gradient over all samples; the last
        step of an epoch may have fewer. Batch norm sees single batches.
    scaler
        A LossScaler for 16-bit training: the loss is taken in float32, its gradient scaled and then rounded.
    ema
        A WeightEMA of the parameters: updated by every step that was not skipped, and evaluated in their place.
    comm
        This rank's communicator, of `kilter.dist`. Each rank takes its share of every batch (`Batches.shard`) and of
        `valid`; gradients are averaged over all samples, metrics too. All ranks give equal models and arguments.
        Batch norm needs `convert_sync_batchnorm` to do as one process would; without it, every rank continues each
        epoch with the running statistics of rank 0.
    callbacks
        See `Callback`.
    checkpoint
        A folder, or `Checkpoints`: where rank 0 keeps the last two checkpoints, written after each epoch. Those of an
        earlier run are removed, unless it is resumed.
    resume
        Continue from the checkpoint, with arguments as before: what follows is, bit for bit, what the uninterrupted
        run would have done. Without one, training starts at the beginning.
    progress
        Show a progress bar on stderr, if that is a terminal.
    seed
        Of the order of the data, where `data` is arrays.

    Returns
    -------
    list of dict
        One row per epoch: epoch (from 1), loss, accuracy (of the training batches as they went by),
        valid_loss, valid_accuracy, lr (of the last step), seconds (training alone), images_per_second. None
        where it does not apply: soft targets, such as those of mixed samples, have no accuracy.

    Raises
    ------
    KilterError
        The loss is no longer finite and there is no scaler; no checkpoint can be used; or an argument is wrong.
    OSError
        A checkpoint cannot be written.

    Notes
    -----
    Layers reuse their buffers while `fit` runs. Afterwards the model is in eval mode, ready to predict; it has the
    trained weights, and `ema.swap()` exchanges them for their averages.
    """
    if epochs < 1:
        fail("epochs", "at least 1", epochs)
    if ema is not None and ema.swapped:
        fail("ema", "the trained weights in the model (call swap first)", "the averages")
    if resume and checkpoint is None:
        fail("checkpoint", "a folder to resume from", "None")
    batches = data if isinstance(data, Data) else Batches(*arrays(data), FIT_BATCH, seed=seed)
    _check.communicator(comm)
    stepper = Stepper(optimizer, model.grads(), accumulate=accumulate, scaler=scaler, ema=ema, comm=comm)
    state = State(model, optimizer, epochs, -(-len(batches) // accumulate), ema)
    kept = checkpoint if checkpoint is None or isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    run = Run(state, loss, shared(batches, comm), valid, stepper, callbacks, kept, comm)
    watchers = (*callbacks, *_progress(progress and ranks.leads(comm)))
    run.begin(resume)
    with ExitStack() as stack:
        stack.enter_context(training(model))
        # a run that overflows says so through its loss, or the scaler backs off
        stack.enter_context(np.errstate(over="ignore", invalid="ignore"))
        for watcher in watchers:
            stack.callback(watcher.on_end, state)
            watcher.on_start(state)
        run.steppers = [w for w in watchers if type(w).on_step is not Callback.on_step]
        if not state.step:
            run.save()
        while len(state.history) < epochs and not state.stop:
            state.epoch = len(state.history)
            run.epoch()
            for watcher in watchers:
                watcher.on_epoch(state)
            state.stop = bool(sum(ranks.total(comm, [state.stop])))
            run.save()
    return state.history


@contextmanager
def training(model: Module) -> Iterator[None]:
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
