"""A run folder: config.json, metrics.csv, curves.png and model.safetensors."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

import kilter
from kilter import _kilter
from kilter._check import KilterError
from kilter.train._extra import EXTRA, extra
from kilter.train.checkpoint import replacing, save
from kilter.train.loop import Callback, Row, State

CONFIG, METRICS, CURVES, MODEL = "config.json", "metrics.csv", "curves.png", "model.safetensors"
COLUMNS = (
    "epoch",
    "loss",
    "accuracy",
    "valid_loss",
    "valid_accuracy",
    "lr",
    "seconds",
    "images_per_second",
)


class RunFolder(Callback):
    """Writes a run into a folder as it goes.

    Parameters
    ----------
    path
        The folder; made when the run starts, with its parents.
    config
        What the run is made of, as JSON values; stands in config.json and in the metadata of the model.
    title
        Above the curves.

    Raises
    ------
    KilterError
        The folder holds something that is not a run of kilter, or the extra `train` is not installed.

    Notes
    -----
    metrics.csv gets a line per epoch, and model.safetensors holds the weights after the last whole epoch;
    Ctrl-C waits until both are written. The curves are drawn when the run ends, however it ends. A folder of
    an earlier run is taken over.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any], *, title: str = "") -> None:
        for name in EXTRA:
            extra(name)
        self.path, self.config, self.title = Path(path), dict(config), title
        if self.path.is_dir():
            if any(self.path.iterdir()) and not _is_run(self.path):
                raise KilterError(f"{self.path}: expected an empty folder or a run of kilter, got other files in it")
        elif self.path.exists():
            raise KilterError(f"{self.path}: expected a folder, got a file")
        self.history: list[Row] = []
        self._started = False

    def on_start(self, state: State) -> None:
        """Make the folder, with the configuration, a header of the metrics and the first weights."""
        self.history, self._first_call = state.history, state.optimizer.calls
        self.path.mkdir(parents=True, exist_ok=True)
        with _ctrl_c_waits():
            (self.path / CURVES).unlink(missing_ok=True)
            with replacing(self.path / CONFIG) as file:
                file.write(json.dumps({"run": self.config} | _environment(), indent=2).encode() + b"\n")
            with replacing(self.path / METRICS) as file:
                file.write(",".join(COLUMNS).encode() + b"\n")
            self._save(state, 0)
            self._started = True

    def on_epoch(self, state: State) -> None:
        """Append to the metrics; replace the model."""
        row = state.history[-1]
        with _ctrl_c_waits():
            with open(self.path / METRICS, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
                file.flush()
            self._save(state, state.epoch + 1)

    def on_end(self, state: State) -> None:
        """Draw the curves."""
        if not self._started:
            return
        from kilter.train.curves import draw

        with _ctrl_c_waits(), replacing(self.path / CURVES) as file:
            draw(file, state.history, self._lr_curve(state), title=self.title)

    def _save(self, state: State, epochs: int) -> None:
        save(self.path / MODEL, state.model, metadata={"run": self.config, "epochs": epochs})

    def _lr_curve(self, state: State) -> tuple[Any, Any]:
        """The learning rate over the steps so far; their unit is the epoch."""
        lr = state.optimizer.groups[0]["lr"]
        if not callable(lr):
            return [row["epoch"] for row in state.history], [row["lr"] for row in state.history]
        steps = np.unique(np.linspace(0, max(state.step - 1, 0), 500).astype(int))
        return (steps + 1) / state.batches, [lr(self._first_call + int(s)) for s in steps]


def _is_run(path: Path) -> bool:
    try:
        return "kilter" in json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _environment() -> dict[str, Any]:
    return {
        "kilter": kilter.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "simd": _kilter.simd_level(),
        "threads": _kilter.num_threads(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Hold a KeyboardInterrupt back until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if caught:
        raise KeyboardInterrupt
