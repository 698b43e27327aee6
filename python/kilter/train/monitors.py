"""What is worth watching while a network trains, and costs little; and the callback of a plateau."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kilter._backend import backend_of
from kilter._check import KilterError, fail
from kilter.schedule import Plateau
from kilter.train.state import Callback, State


def update_ratio(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """How far a step moved the weights, for their size: norm(after - before) / norm(before), over all arrays.

    About 1e-3 is usual for a learning rate that is neither too small nor too large.

    Parameters
    ----------
    before, after
        Names to arrays; equal names and shapes. 16-bit values are subtracted in float32.

    Returns
    -------
    float
        inf if all of `before` is zero and `after` is not.

    Raises
    ------
    KilterError
        Names or shapes differ.
    """
    if before.keys() != after.keys():
        fail("after", f"the arrays {', '.join(before)}", ", ".join(after) or "none")
    moved = 0.0
    for name, old in before.items():
        new = after[name]
        if new.shape != old.shape:
            fail(f"after[{name}]", f"shape {old.shape}", f"shape {new.shape}")
        moved += _squares(_wide(new) - _wide(old))
    size = math.sqrt(sum(map(_squares, before.values())))
    return math.sqrt(moved) / size if size else (math.inf if moved else 0.0)


def count_nonfinite(arrays: Mapping[str, Any]) -> int:
    """How many elements are infinite or NaN. (`kilter.optim.clip_grad_norm(grads, math.inf)` measures their norm.)

    Parameters
    ----------
    arrays
        Names to arrays, such as gradients.
    """
    return sum(int(a.size - backend_of(a).xp.count_nonzero(backend_of(a).xp.isfinite(a))) for a in arrays.values())


class Monitor(Callback):
    """Adds three columns to the rows of `fit`.

    grad_norm: the norm of the gradients, before clipping and without the scale of a LossScaler; mean over the steps
    with finite gradients. update_ratio: see the function of that name; mean over every `every`-th step. nonfinite: the
    number of steps with gradients that are not finite.

    Parameters
    ----------
    every
        How often to compare the weights with those of the step before, at least 1.

    Notes
    -----
    The norm costs one look at the gradients per step, in the optimizer (`track_norm`, which is switched on); the
    ratio a copy of the weights per `every` steps.
    """

    def __init__(self, every: int = 20) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            fail("every", "a whole number of at least 1", repr(every))
        self.every = every
        self._before: dict[str, Any] | None = None
        self._clear()

    def on_start(self, state: State) -> None:
        """Have the norm tracked."""
        state.optimizer.track_norm = True
        self._remember(state)

    def on_step(self, state: State) -> None:
        """Take the norm and, if it is time, the ratio."""
        found = state.report.grad_norm if state.report is not None else None
        if found is None or not math.isfinite(found):
            self.nonfinite += 1
        else:
            self.norms += found
            self.steps += 1
        if self._before is not None:
            self.ratios += update_ratio(self._before, state.model.params())
            self.compared += 1
        self._remember(state)

    def on_epoch(self, state: State) -> None:
        """Add the columns."""
        state.history[-1].update(
            grad_norm=self.norms / self.steps if self.steps else None,
            update_ratio=self.ratios / self.compared if self.compared else None,
            nonfinite=self.nonfinite,
        )
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch so far."""
        return {
            "norms": self.norms,
            "steps": self.steps,
            "ratios": self.ratios,
            "compared": self.compared,
            "nonfinite": self.nonfinite,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the sums back."""
        if state.keys() != self.state_dict().keys():
            raise KilterError(f"state: expected {', '.join(self.state_dict())}, got {', '.join(state)}")
        for name, value in state.items():
            setattr(self, name, value)

    def _remember(self, state: State) -> None:
        """Keep the weights, if the next step is one to compare."""
        due = (state.step + 1) % self.every == 0
        self._before = {name: p.copy() for name, p in state.model.params().items()} if due else None

    def _clear(self) -> None:
        self.norms = self.ratios = 0.0
        self.steps = self.compared = self.nonfinite = 0


class FollowPlateau(Callback):
    """Tells a `Plateau` the loss of each epoch.

    Parameters
    ----------
    plateau
        Which is, or is part of, an option of the optimizer.
    metric
        A column of the rows of `fit`.
    """

    def __init__(self, plateau: Plateau, metric: str = "loss") -> None:
        self.plateau, self.metric = plateau, metric

    def on_epoch(self, state: State) -> None:
        """Update the plateau."""
        value = state.history[-1].get(self.metric)
        if value is None:
            fail("metric", "a column with numbers", repr(self.metric))
        self.plateau.update(value)

    def state_dict(self) -> dict[str, Any]:
        """That of the plateau."""
        return self.plateau.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.plateau.load_state_dict(state)


def _wide(a: Any) -> Any:
    return a.astype(np.float32) if a.dtype.itemsize < 4 else a


def _squares(a: Any) -> float:
    """The sum of the squares, in float64."""
    xp = backend_of(a).xp
    flat = _wide(a).reshape(-1)
    return float(xp.sum(xp.square(flat, dtype=np.float64)))
