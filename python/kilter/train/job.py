"""The main job: train a network on images, from a configuration to a run folder."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kilter import nn
from kilter._check import KilterError
from kilter.dist import Communicator
from kilter.nn.models import NORMS
from kilter.optim import LossScaler, WeightEMA
from kilter.train import build
from kilter.train.config import FIND, SETS, Config, filled, from_json
from kilter.train.folder import CONFIG, RunFolder
from kilter.train.loop import fit
from kilter.train.lr_find import LRPicture, lr_find
from kilter.train.metrics import Loss
from kilter.train.monitors import FollowPlateau, Monitor
from kilter.train.resume import Checkpoints
from kilter.train.state import Callback, Row

__all__ = ["Config", "Job"]


class Job:
    """A run that is ready to start.

    Parameters
    ----------
    config
        What to train.
    out
        The run folder; None takes a new one, runs/<data>-<model>-<norm>-<time>.
    resume
        Continue the run that is in the folder, from its checkpoint; `config` must be its own (see `resumed`).
    comm
        This rank's communicator; all ranks make the same job, and rank 0 alone writes the folder. Batch norm then
        takes its statistics over all ranks, and each rank's dropout has masks of its own.

    Attributes
    ----------
    config
        With nothing left open.
    model, optimizer, history
        Of the run.
    path
        The run folder.

    Raises
    ------
    KilterError
        A value of the configuration, the data or the folder is unusable.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        comm: Communicator | None = None,
    ) -> None:
        self.name = Path(config.data).stem if config.data not in SETS else config.data
        self.config = config = filled(config)
        self.resume, self.comm = resume, (comm := build.communicator(config, comm))
        self.data, self.classes = build.dataset(config)
        self.batches = build.batches(config, self.data, self.classes)
        self.model = build.model(config, self.data.x_train.shape[1:], self.classes, comm)
        self.path = Path(out or _new_folder(f"{self.name}-{config.model}-{config.norm}"))
        self.checkpoints = Checkpoints(self.path, every=config.checkpoint_every)
        # a run that goes on has all weights in its checkpoint
        fresh = not (resume and self.checkpoints.exist)
        self.started = build.start(self.model, config.start) if config.start is not None and fresh else None
        self.model.freeze(*config.freeze) if config.freeze else None
        self.parameters = sum(p.size for p in self.model.params().values())
        self.scaler = LossScaler() if config.precision == "fp16" else None
        self.ema = None if config.ema is None else WeightEMA(self.model.params(), config.ema, warmup=True)
        pictures = self._find() if config.lr == FIND else []
        rates = build.rates(self.config, float(self.config.lr or 0.0), -(-len(self.batches) // config.accumulate))
        self.optimizer = build.optimizer(config, self.model, rates)
        self._watchers: list[Callback] = [Monitor()] if config.monitor else []
        self._watchers += [FollowPlateau(rates.plateau)] if rates.plateau is not None else []
        self.folder: RunFolder | None = None
        if comm is None or comm.rank == 0:
            self.folder = RunFolder(self.path, asdict(self.config), title=f"{self.name}: {self.shape()}")
            self._watchers += [self.folder, *pictures]
        self.seconds = 0.0

    @classmethod
    def resumed(cls, folder: str | Path, *, comm: Communicator | None = None) -> Job:
        """The job that continues the run of a folder, from its last checkpoint.

        Raises
        ------
        KilterError
            The folder holds no run of this version of kilter.
        """
        path = Path(folder) / CONFIG
        try:
            values = json.loads(path.read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = getattr(error, "strerror", None) or "no configuration in it"
            raise KilterError(f"{path}: expected that of a run of kilter, got none ({reason})") from None
        return cls(from_json(values), folder, resume=True, comm=comm)

    @property
    def history(self) -> list[Row]:
        """The rows of the epochs so far; on other ranks than 0 empty."""
        return self.folder.history if self.folder is not None else []

    def run(self, *, progress: bool = True) -> list[Row]:
        """Train, and return the rows of all epochs."""
        start = time.perf_counter()
        try:
            return fit(
                self.model,
                self.optimizer,
                self._loss(),
                self.batches,
                epochs=self.config.epochs or 1,
                valid=(self.data.x_test, self.data.y_test),
                accumulate=self.config.accumulate,
                scaler=self.scaler,
                ema=self.ema,
                comm=self.comm,
                callbacks=self._watchers,
                checkpoint=self.checkpoints,
                resume=self.resume,
                progress=progress,
            )
        finally:
            self.seconds = time.perf_counter() - start

    def _loss(self) -> Loss:
        return partial(
            nn.softmax_cross_entropy,
            label_smoothing=self.config.label_smoothing,
            smooth_others=self.config.smooth_others,
        )

    def _find(self) -> list[Callback]:
        """Measure the learning rate, and put it into the configuration; the callback that shows how."""
        probe = build.optimizer(self.config, self.model, build.rates(self.config, 1.0, 1))
        found = lr_find(
            self.model, probe, self._loss(), self.batches, scaler=self.scaler, comm=self.comm, seed=self.config.seed
        )
        self.config = replace(self.config, lr=float(f"{found.suggestion:.2g}"))
        return [LRPicture(self.path / "lr_find.png", found)]

    def shape(self) -> str:
        """The network in words."""
        shape = self.data.x_train.shape[1:]
        inputs = str(math.prod(shape)) if self.config.model == "mlp" else "x".join(map(str, shape))
        sizes = (inputs, *map(str, self.config.hidden or ()), str(self.classes))
        return f"{self.config.model} {'-'.join(sizes)}, {NORMS[self.config.norm]}"

    def summary(self) -> str:
        """What was trained and what came out, for a person; empty before the first epoch."""
        if not self.history:
            return ""
        accuracies = [row["valid_accuracy"] or 0.0 for row in self.history]
        best = int(np.argmax(accuracies))
        training = sum(row["seconds"] or 0.0 for row in self.history)
        rate = sum((row["seconds"] or 0.0) * (row["images_per_second"] or 0.0) for row in self.history) / training
        x, x_test = self.data.x_train, self.data.x_test
        lines = [
            ("data", f"{self.name}: {len(x):,} training and {len(x_test):,} test images, {self.classes} classes"),
            ("model", f"{self.shape()}: {self.parameters:,} parameters"),
            ("start", self.started),
            ("training", ", ".join(self._training())),
            ("test accuracy", f"{accuracies[-1]:.2%}  (best {accuracies[best]:.2%} in epoch {best + 1})"),
            ("time", f"{self.seconds:.1f} s, {rate:,.0f} images/s in training"),
            ("run folder", f"{self.path}"),
        ]
        return "\n".join(f"{name:<14} {text}" for name, text in lines if text)

    def _training(self) -> list[str]:
        """The recipe in words: the options that are always there, and those that differ from their defaults."""
        config, plain = self.config, Config()
        lr = f"{config.lr:g}" + (f" per {config.base_batch} samples" if config.base_batch else "")
        parts = [config.optimizer, f"{config.schedule} lr {lr}", f"batch {config.batch_size}"]
        for name in (
            "accumulate",
            "clip_norm",
            "label_smoothing",
            "mixup",
            "cutmix",
            "augment",
            "ema",
            "precision",
            "device",
        ):
            value: Any = getattr(config, name)
            if value != getattr(plain, name):
                shown = " and ".join(value) if isinstance(value, tuple) else value
                parts.append(f"{name.replace('_', ' ')} {shown}")
        ranks = [] if self.comm is None or self.comm.size == 1 else [f"{self.comm.size} ranks"]
        return [*parts, f"{len(self.history)} epochs", f"seed {config.seed}", *ranks]


def _new_folder(name: str) -> Path:
    stem = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for count in itertools.count(1):
        path = Path(stem if count == 1 else f"{stem}-{count}")
        if not path.exists():
            return path
    raise AssertionError
