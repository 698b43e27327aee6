"""A run of `fit`: its place within the epoch, its epochs, and what its checkpoints hold."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from kilter._check import KilterError
from kilter.dist import Communicator
from kilter.train import ranks
from kilter.train.checkpoint import States, put
from kilter.train.metrics import Data, Loss, Meter, evaluate
from kilter.train.resume import Checkpoints
from kilter.train.state import Callback, Row, State
from kilter.train.step import Stepper, averaged, gradient


class Run:
    """What `fit` was given, and how far it is; the arguments are those of `fit`."""

    def __init__(
        self,
        state: State,
        loss: Loss,
        batches: Data,
        valid: Data | tuple[Any, Any] | None,
        stepper: Stepper,
        callbacks: Sequence[Callback],
        checkpoints: Checkpoints | None,
        comm: Communicator | None,
    ) -> None:
        self.state, self.loss, self.batches, self.valid, self.stepper = state, loss, batches, valid, stepper
        self.checkpoints, self.comm = checkpoints, comm
        self.callbacks = callbacks
        self.steppers: list[Callback] = []  # those that watch every step
        self.meter, self.batch, self.since = Meter(), 0, 0.0  # of the epoch: sums, batches, and when it began
        self._every = checkpoints.every if checkpoints is not None else None

    # ---- epochs

    def epoch(self) -> None:
        """Train for one epoch, or for what is left of it, evaluate, and add its row to the history."""
        state, model, stepper = self.state, self.state.model, self.stepper
        model.train()
        self.since += time.perf_counter()
        batches = self.batches.epoch(state.epoch)
        for x, y in islice(batches, self.batch, None) if self.batch else batches:
            share = ranks.even_share(self.comm, len(x))
            logits = model(x)
            value, dlogits = self._loss(logits, y, share)
            model.backward(dlogits, need_dx=False)
            self.meter.add(value, logits, y)
            self.batch += 1
            if stepper.add(share):
                self._step()
        if stepper.pending:
            self._step()
        seconds = time.perf_counter() - self.since
        state.history.append(self._row(seconds))
        self.meter, self.batch, self.since = Meter(), 0, 0.0

    def _loss(self, logits: Any, y: Any, share: float) -> tuple[float, Any]:
        value, dlogits = gradient(self.loss, logits, y, share, self.stepper.scaler)
        if not math.isfinite(value) and self.stepper.scaler is None:
            where = f"epoch {self.state.epoch + 1}, step {self.state.step + 1}"
            raise KilterError(f"loss: expected a finite number, got {value} in {where}; try a smaller lr")
        return value, dlogits

    def _step(self) -> None:
        state = self.state
        state.grads, state.report = self.stepper.step()
        state.step += 1
        if self.steppers:
            state.running = self.meter.mean()
            for watcher in self.steppers:
                watcher.on_step(state)
        if self._every is not None and state.step % self._every == 0 and self.batch < len(self.batches):
            self.save()

    def _row(self, seconds: float) -> Row:
        state = self.state
        state.running = self.meter.mean()
        self.meter.sums = ranks.total(self.comm, self.meter.sums)
        mean = self.meter.mean()
        row: Row = {
            "epoch": state.epoch + 1,
            "loss": mean.loss,
            "accuracy": mean.accuracy,
            "valid_loss": None,
            "valid_accuracy": None,
            "lr": _lr(state.optimizer),
            "seconds": seconds,
            "images_per_second": mean.samples / seconds,
        }
        if self.valid is not None:
            ranks.share_statistics(state.model, self.comm)
            with averaged(state.ema):
                row["valid_loss"], row["valid_accuracy"], _ = evaluate(
                    state.model, self.valid, self.loss, comm=self.comm
                )
        return row

    # ---- checkpoints

    def begin(self, resume: bool) -> None:
        """Take the checkpoint up, or remove those of an earlier run; then write the first."""
        found, leads = False, ranks.leads(self.comm)
        if resume and self.checkpoints is not None:
            found = self.checkpoints.load(self._restore, warn=leads)
        ranks.expect_equal(self.comm, self.state.model, self.state.optimizer)
        if self.checkpoints is not None and leads:
            self.checkpoints.sweep()
            if not found:
                self.checkpoints.clear()

    def save(self) -> None:
        """Write a checkpoint, on rank 0."""
        if self.checkpoints is None:
            return
        ranks.share_statistics(self.state.model, self.comm)
        place = self._place(ranks.each(self.comm, self.meter.sums))
        if ranks.leads(self.comm):
            states = {name: target.state_dict() for name, target in self._targets().items()}
            self.checkpoints.save(states, {"plan": self._plan(), "run": place})

    def _targets(self) -> dict[str, Any]:
        """All that has state, by the name of its part in a checkpoint."""
        state = self.state
        parts = {"model": state.model, "optimizer": state.optimizer, "scaler": self.stepper.scaler, "ema": state.ema}
        found = {name: target for name, target in parts.items() if target is not None}
        seen: Counter[str] = Counter()
        for callback in self.callbacks:
            if callback.state_dict():
                name = type(callback).__name__
                found[f"{name}{seen[name]}"] = callback
                seen[name] += 1
        return found

    def _plan(self) -> dict[str, Any]:
        """What must be the same for a run to continue."""
        of_data = ("samples", "batch_size", "seed", "shuffle", "drop_last")
        known = {name: getattr(self.batches, name) for name in of_data if hasattr(self.batches, name)}
        return {"batches": len(self.batches), "accumulate": self.stepper.accumulate, **known}

    def _place(self, sums: list[list[float]]) -> dict[str, Any]:
        """Where the run stands; the sums are those of all ranks."""
        state = self.state
        return {
            "step": state.step,
            "batch": self.batch,
            "seconds": time.perf_counter() - self.since if self.batch else 0.0,
            "sums": sums,
            "stop": state.stop,
            "history": state.history,
        }

    def _restore(self, states: States, metadata: dict[str, Any]) -> None:
        plan, targets = metadata.get("plan"), self._targets()
        if plan is None or states.keys() != targets.keys():
            got = ", ".join(states) if plan is not None else "a saved model"
            raise KilterError(f"checkpoint: expected that of a run with {', '.join(targets)}, got {got}")
        for name, own in self._plan().items():
            if plan.get(name) != own:
                raise KilterError(f"checkpoint: expected that of a run with {name} {own}, got {plan.get(name)}")
        place, state = metadata["run"], self.state
        rank, size = (0, 1) if self.comm is None else (self.comm.rank, self.comm.size)
        if place["batch"] and len(place["sums"]) != size:
            raise KilterError(f"checkpoint: expected that of a run with ranks {size}, got {len(place['sums'])}")
        put(targets, states)
        state.step, state.stop, state.history = place["step"], place["stop"], place["history"]
        state.epoch = max(min(len(state.history), state.epochs - 1), 0)
        self.batch, self.since = place["batch"], -place["seconds"]
        if self.batch:
            self.meter.sums = place["sums"][rank]


def _lr(optimizer: Any) -> float:
    """Learning rate of the last step, of the first group."""
    lr = optimizer.groups[0]["lr"]
    return float(lr(max(optimizer.calls - 1, 0)) if callable(lr) else lr)
