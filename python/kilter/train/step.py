"""What lies between a backward pass and the next forward: accumulate, reduce, step, average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kilter._check import fail
from kilter.dist import Communicator, GradientReducer
from kilter.optim import GradAccumulator, LossScaler, StepReport, WeightEMA
from kilter.train.metrics import Loss


class Stepper:
    """Takes gradients in, and a step of the optimizer once they are those of enough samples.

    Parameters
    ----------
    optimizer
        Built on the parameters.
    grads
        `model.grads()`: the arrays that each backward overwrites.
    accumulate
        Micro-batches per step.
    scaler, ema, comm
        As for `fit`.
    """

    def __init__(
        self,
        optimizer: Any,
        grads: dict[str, Any],
        *,
        accumulate: int = 1,
        scaler: LossScaler | None = None,
        ema: WeightEMA | None = None,
        comm: Communicator | None = None,
    ) -> None:
        if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
            fail("accumulate", "a whole number of at least 1", repr(accumulate))
        self.optimizer, self.grads, self.accumulate = optimizer, grads, accumulate
        self.scaler, self.ema = scaler, ema
        self.pending = 0  # micro-batches since the last step
        self._accumulator = GradAccumulator(grads) if accumulate > 1 else None
        self._reducer = None if comm is None or comm.size == 1 else GradientReducer(grads, comm)

    def add(self, samples: float) -> bool:
        """Take in the gradients of a micro-batch, the mean over so many samples; whether a step is due."""
        self.samples = samples
        if self._accumulator is None:
            return True
        self._accumulator.add(self.grads, samples)
        self.pending += 1
        return self.pending == self.accumulate

    def step(self) -> tuple[Any, StepReport]:
        """Take the step; the gradients that it saw, and the optimizer's report."""
        grads, weight = self.grads, float(self.samples)
        if self._accumulator is not None:
            weight, self.pending = self._accumulator.weight, 0
            grads = self._accumulator.finish() if weight else grads
        if self._reducer is not None:
            self._reducer.reduce(grads, weight)
        report: StepReport = self.optimizer.step(grads, scaler=self.scaler)
        if self.ema is not None and not report.skipped:
            self.ema.update()
        return grads, report


def gradient(loss: Loss, logits: Any, y: Any, share: float, scaler: LossScaler | None) -> tuple[float, Any]:
    """The mean loss of these samples, and the gradient of their sum divided by `share` (see `ranks.even_share`).

    With a scaler the loss is taken in float32 at least, and its gradient times the scale is rounded once to the dtype
    of the logits. A share of no samples has no loss; other ranks may wait for it in the backward pass.
    """
    if not len(logits):
        return 0.0, logits
    wide = logits if scaler is None or logits.dtype.itemsize > 2 else logits.astype(np.float32)
    value, dlogits = loss(wide, y)
    factor = (1.0 if scaler is None else scaler.scale) * (len(logits) / share)
    if not isinstance(factor, float):  # it lies on the device: to look at it would wait for the last step
        dlogits = (dlogits * factor).astype(logits.dtype, copy=False)
    elif factor != 1.0:
        dlogits = (dlogits * dlogits.dtype.type(factor)).astype(logits.dtype, copy=False)
    return value, dlogits


@contextmanager
def averaged(ema: WeightEMA | None) -> Iterator[None]:
    """The averaged weights in the model inside, the trained ones again afterwards."""
    if ema is None:
        yield
        return
    ema.swap()
    try:
        yield
    finally:
        ema.swap()
