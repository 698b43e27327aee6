"""The main job: train a network on images, from a configuration to a run folder."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kilter import data as _data
from kilter import nn
from kilter._check import KilterError, number
from kilter.data import Batches, Dataset
from kilter.data.npz import read_npz
from kilter.nn.models import NORMS
from kilter.train import choices
from kilter.train.choices import OPTIMIZERS, SCHEDULES
from kilter.train.folder import RunFolder
from kilter.train.loop import Row, fit

MODELS = ("mlp",)
SETS = {"digits": (30, (256, 128)), "fashion-mnist": (10, (256, 128))}  # epochs, hidden


@dataclass(frozen=True)
class Config:
    """What a run is made of; None is filled in by `Job` from the data and the optimizer."""

    data: str = "digits"  # or "fashion-mnist", or the path of an .npz file
    model: str = "mlp"
    norm: str = "batch"
    hidden: tuple[int, ...] | None = None
    dropout: float = 0.0
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float = 1e-2
    schedule: str = "cosine"
    warmup: float | None = None  # epochs; 1 unless the schedule rises by itself
    batch_size: int = 64
    epochs: int | None = None
    label_smoothing: float = 0.0
    seed: int = 0


class Job:
    """A run that is ready to start.

    Parameters
    ----------
    config
        What to train.
    out
        The run folder; None takes a new one, runs/<data>-<model>-<norm>-<time>.

    Attributes
    ----------
    config
        With nothing left open.
    model, optimizer, folder, history
        Of the run.

    Raises
    ------
    KilterError
        A value of the configuration, the data or the folder is unusable.
    """

    def __init__(self, config: Config, out: str | Path | None = None) -> None:
        self.name = Path(config.data).stem if config.data not in SETS else config.data
        self.config = config = _filled(config)
        self.data = _load(config.data)
        x, y = self.data.x_train, self.data.y_train
        self.classes = int(max(y.max(), self.data.y_test.max())) + 1
        if self.classes > max(len(y), 1000):
            raise KilterError(f"y_train: expected labels 0, 1, 2, ..., got {self.classes - 1}")
        # a last batch of one sample has no variance
        drop_last = config.norm == "batch" and len(x) % config.batch_size == 1
        self.batches = Batches(x, y, config.batch_size, seed=config.seed, drop_last=drop_last)
        self.model = nn.mlp(
            math.prod(x.shape[1:]),
            self.classes,
            hidden=config.hidden or (),
            norm=config.norm,
            dropout=config.dropout,
            seed=config.seed,
        )
        self.optimizer = _optimizer(config, self.model, len(self.batches))
        self.parameters = sum(p.size for p in self.model.params().values())
        self.folder = RunFolder(
            out or _new_folder(f"{self.name}-{config.model}-{config.norm}"),
            asdict(config),
            title=f"{self.name}: {self.shape()}",
        )
        self.seconds = 0.0

    @property
    def history(self) -> list[Row]:
        """The rows of the epochs so far."""
        return self.folder.history

    def run(self, *, progress: bool = True) -> list[Row]:
        """Train, and return the rows of all epochs."""
        config = self.config
        loss = partial(nn.softmax_cross_entropy, label_smoothing=config.label_smoothing)
        start = time.perf_counter()
        try:
            return fit(
                self.model,
                self.optimizer,
                loss,
                self.batches,
                epochs=config.epochs or 1,
                valid=(self.data.x_test, self.data.y_test),
                callbacks=[self.folder],
                progress=progress,
            )
        finally:
            self.seconds = time.perf_counter() - start

    def shape(self) -> str:
        """The network in words."""
        sizes = (math.prod(self.data.x_train.shape[1:]), *(self.config.hidden or ()), self.classes)
        return f"{self.config.model} {'-'.join(map(str, sizes))}, {NORMS[self.config.norm]}"

    def summary(self) -> str:
        """What was trained and what came out, for a person; empty before the first epoch."""
        if not self.history:
            return ""
        accuracies = [row["valid_accuracy"] or 0.0 for row in self.history]
        best = int(np.argmax(accuracies))
        training = sum(row["seconds"] or 0.0 for row in self.history)
        rate = sum((row["seconds"] or 0.0) * (row["images_per_second"] or 0.0) for row in self.history) / training
        x, x_test, config = self.data.x_train, self.data.x_test, self.config
        lines = (
            (
                "data",
                f"{self.name}: {len(x):,} training and {len(x_test):,} test images, {self.classes} classes",
            ),
            ("model", f"{self.shape()}: {self.parameters:,} parameters"),
            (
                "training",
                f"{config.optimizer}, {config.schedule} lr {config.lr:g}, batch {config.batch_size}, "
                f"{len(self.history)} epochs, seed {config.seed}",
            ),
            ("test accuracy", f"{accuracies[-1]:.2%}  (best {accuracies[best]:.2%} in epoch {best + 1})"),
            ("time", f"{self.seconds:.1f} s, {rate:,.0f} images/s in training"),
            ("run folder", f"{self.folder.path}"),
        )
        return "\n".join(f"{name:<14} {text}" for name, text in lines)


def _filled(config: Config) -> Config:
    """Put the defaults in, and check what nobody below checks."""
    for name, value, known in (
        ("model", config.model, MODELS),
        ("norm", config.norm, NORMS),
        ("optimizer", config.optimizer, OPTIMIZERS),
        ("schedule", config.schedule, SCHEDULES),
    ):
        if value not in known:
            raise KilterError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")
    epochs, hidden = SETS.get(config.data, SETS["fashion-mnist"])
    config = replace(
        config,
        epochs=epochs if config.epochs is None else config.epochs,
        hidden=hidden if config.hidden is None else config.hidden,
        lr=OPTIMIZERS[config.optimizer].lr if config.lr is None else config.lr,
        warmup=float(config.schedule != "one_cycle") if config.warmup is None else config.warmup,
    )
    least = 2 if config.norm == "batch" else 1
    if config.batch_size < least:
        raise KilterError(f"batch_size: expected at least {least} with norm {config.norm!r}, got {config.batch_size}")
    if config.epochs is not None and config.epochs < 1:
        raise KilterError(f"epochs: expected at least 1, got {config.epochs}")
    number("label_smoothing", config.label_smoothing, 0.0, 1.0)
    number("lr", config.lr, 0.0, open_low=True)
    most = 0 if config.schedule == "one_cycle" else config.epochs  # one_cycle rises by itself
    if not 0 <= (config.warmup or 0) <= (most or 0):
        raise KilterError(f"warmup: expected 0 to {most} epochs with {config.schedule!r}, got {config.warmup:g}")
    return config


def _optimizer(config: Config, model: nn.Module, batches: int) -> Any:
    warm = round((config.warmup or 0) * batches)
    lr, momentum = choices.schedules(config.schedule, config.lr or 0.0, (config.epochs or 1) * batches, warm)
    return choices.optimizer(config.optimizer, model.params(), lr, momentum, config.weight_decay)


def _load(name: str) -> Dataset:
    if name == "digits":
        return _data.digits()
    if name == "fashion-mnist":
        return _data.fashion_mnist()
    return read_npz(name)


def _new_folder(name: str) -> Path:
    stem = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for count in itertools.count(1):
        path = Path(stem if count == 1 else f"{stem}-{count}")
        if not path.exists():
            return path
    raise AssertionError
