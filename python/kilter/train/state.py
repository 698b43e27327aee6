"""Where a training run stands, and what watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kilter.nn import Module
from kilter.optim import StepReport, WeightEMA
from kilter.train.metrics import NOTHING, Metrics

Row: TypeAlias = dict[str, float | None]

COLUMNS = ("epoch", "loss", "accuracy", "valid_loss", "valid_accuracy", "lr", "seconds", "images_per_second")


@dataclass
class State:
    """Where a training run stands; what callbacks see."""

    model: Module
    optimizer: Any
    epochs: int
    steps: int  # of the optimizer, per epoch
    ema: WeightEMA | None = None
    epoch: int = 0  # the current one, from 0
    step: int = 0  # optimizer steps of this run so far, those before a resume included
    grads: Any = None  # what the optimizer was given last: the mean over micro-batches and ranks, still scaled
    report: StepReport | None = None  # of the last step
    running: Metrics = NOTHING  # of the current epoch so far, on this rank
    history: list[Row] = field(default_factory=list)
    stop: bool = False  # set it to end the run after this epoch


class Callback:
    """Watches a run: override what is needed. Over ranks, every rank calls its own."""

    def on_start(self, state: State) -> None:
        """Before the first epoch; `state.step` and `state.history` go on from a checkpoint."""

    def on_step(self, state: State) -> None:
        """After each optimizer step."""

    def on_epoch(self, state: State) -> None:
        """After each epoch and its validation; `state.history[-1]` is its row, to which columns may be added."""

    def on_end(self, state: State) -> None:
        """At the end, also after an error or Ctrl-C, even one inside `on_start`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps for it: names to arrays and plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take `state_dict` back; before `on_start`."""
