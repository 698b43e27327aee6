"""A run folder: config.json, metrics.csv, curves.png and model.safetensors."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

import kilter
from kilter import _kilter
from kilter._check import KilterError
from kilter._interrupt import ctrl_c_waits
from kilter.train._extra import EXTRA, extra
from kilter.train.checkpoint import replacing, sweep, write
from kilter.train.state import COLUMNS, Callback, Row, State
from kilter.train.step import averaged

CONFIG, METRICS, CURVES, MODEL = "config.json", "metrics.csv", "curves.png", "model.safetensors"


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
    After each epoch metrics.csv has its line, and model.safetensors the weights (their averages, if the run has a
    WeightEMA); Ctrl-C waits until both are written. The curves are drawn when the run ends, however it ends. A
    folder of an earlier run is taken over; a run that is resumed gets its metrics and weights from its checkpoint,
    whatever a crash has left.
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
        """Make the folder, with the configuration, the metrics and the weights so far."""
        self.history, self._first_call = state.history, state.optimizer.calls - state.step
        self.path.mkdir(parents=True, exist_ok=True)
        with ctrl_c_waits():
            for name in (CONFIG, METRICS, MODEL, CURVES):
                sweep(self.path / name)
            (self.path / CURVES).unlink(missing_ok=True)
            if not state.step:
                with replacing(self.path / CONFIG) as file:
                    file.write(json.dumps({"run": self.config} | _environment(), indent=2).encode() + b"\n")
            self._save(state)
            self._started = True

    def on_epoch(self, state: State) -> None:
        """Replace the metrics and the model."""
        with ctrl_c_waits():
            self._save(state)

    def on_end(self, state: State) -> None:
        """Draw the curves."""
        if not self._started:
            return
        from kilter.train.curves import draw

        with ctrl_c_waits(), replacing(self.path / CURVES) as file:
            draw(file, state.history, self._lr_curve(state), title=self.title)

    def _save(self, state: State) -> None:
        """Write both files whole: a line that is only begun, or stands twice, cannot be.

        Only the last epoch waits for the disk: until then, what a crash of the machine takes is in the checkpoint.
        """
        last = len(state.history) >= state.epochs or state.stop
        text = io.StringIO(newline="")
        columns = dict.fromkeys([*COLUMNS, *(column for row in state.history for column in row)])
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(state.history)
        with replacing(self.path / METRICS, sync=last) as file:
            file.write(text.getvalue().encode())
        with averaged(state.ema):
            states = {"model": state.model.state_dict()}
        write(self.path / MODEL, states, {"run": self.config, "epochs": len(state.history)}, sync=last)

    def _lr_curve(self, state: State) -> tuple[Any, Any]:
        """The learning rate over the steps so far; their unit is the epoch."""
        lr = state.optimizer.groups[0]["lr"]
        if not callable(lr):
            return [row["epoch"] for row in state.history], [row["lr"] for row in state.history]
        steps = np.unique(np.linspace(0, max(state.step - 1, 0), 500).astype(int))
        return (steps + 1) / state.steps, [lr(self._first_call + int(s)) for s in steps]


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
