"""A real task that is small enough to be learnt many times, and a watch on how it is learnt."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from kilter import data
from kilter._check import KilterError
from kilter.data import Dataset
from kilter.train import Callback, State, evaluate

TEST = 5000  # test images, at most


def images(most: int, test: int = TEST) -> tuple[str, Dataset]:
    """The name of the data, and at most so many training and test images as rows, no more to test than to train.

    Fashion-MNIST where it is installed, else the digits that come with kilter. The mean of the pixels is taken off.
    """
    try:
        name, found = "Fashion-MNIST", data.fashion_mnist()
    except KilterError:
        name, found = "digits", data.digits()
    return name, rows(found, most, test)


def rows(found: Dataset, most: int, test: int = TEST) -> Dataset:
    """At most so many images, each a row, the mean of all pixels taken off."""
    mean = found.x_train.mean()

    def part(x: Any, count: int) -> Any:
        return (x[:count].reshape(-1, x[0].size) - mean).astype(np.float32)

    x_train, x_test = part(found.x_train, most), part(found.x_test, min(most, test))
    return Dataset(x_train, found.y_train[:most], x_test, found.y_test[: len(x_test)])


class Curve(NamedTuple):
    """Test accuracy and test loss after so many steps, which took so many seconds of training."""

    steps: Any
    seconds: Any
    accuracy: Any
    loss: Any

    def reached(self, accuracy: float) -> tuple[float, float] | None:
        """The steps and seconds after which the accuracy was first there; None if it never was."""
        there = np.flatnonzero(self.accuracy >= accuracy)
        return (float(self.steps[there[0]]), float(self.seconds[there[0]])) if there.size else None


class Watch(Callback):
    """Evaluates every so many steps, and keeps the time that this takes out of the seconds of training."""

    def __init__(self, x: Any, y: Any, every: int) -> None:
        self.x, self.y, self.every = x, y, every
        self._seen: list[tuple[float, ...]] = []
        self._start = 0.0

    def on_start(self, state: State) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step(self, state: State) -> None:
        """Evaluate, if it is time."""
        if state.step % self.every == 0:
            now = time.perf_counter()
            found = evaluate(state.model, (self.x, self.y))
            self._seen.append((state.step, now - self._start, found.accuracy or 0.0, found.loss))
            self._start += time.perf_counter() - now

    def curve(self) -> Curve:
        """What was seen."""
        return Curve(*np.array(self._seen, np.float64).reshape(-1, 4).T)
