"""16-bit training: with float32 masters it is float32 training, without them it stalls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kilter import nn
from kilter._check import dtype_of
from kilter.data import Batches, Dataset
from kilter.experiments.report import Claim, Result, Table, seeds
from kilter.experiments.task import images, spread
from kilter.optim import Adam, LossScaler
from kilter.schedule import cosine
from kilter.train import Callback, State, fit, plot

IMAGES, EPOCHS, BATCH, HIDDEN, SEEDS = 40_000, 5, 128, (128,), 4
LR = 2e-4  # of Adam: small steps are what 16-bit weights lose
SCALE = 1024.0


class Variant(NamedTuple):
    """How weights, activations and gradients are kept, and drawn."""

    dtype: str
    masters: bool
    scaler: bool
    color: str
    line: str
    width: float


BLUE, RED, GREEN = plot.COLORS[:3]
VARIANTS = {
    "float32": Variant("float32", True, False, plot.QUIET, "-", 8),
    "bfloat16, masters": Variant("bfloat16", True, False, BLUE, "-", 4.5),
    "float16, masters, scaler": Variant("float16", True, True, RED, "-", 2.5),
    "float16, masters": Variant("float16", True, False, GREEN, "-", 1),
    "bfloat16 alone": Variant("bfloat16", False, False, BLUE, "--", 1.8),
    "float16 alone, scaler": Variant("float16", False, True, RED, "--", 1.8),
}


class Run(NamedTuple):
    """One training run: by epoch the training loss; test accuracy; shares of elements of the first weight matrix."""

    losses: list[float]
    accuracy: float
    moved: float  # changed by a step
    empty: float  # gradient exactly zero


class Probe(Callback):
    """Looks at the first weight matrix every 20 steps."""

    def __init__(self) -> None:
        self.moved: list[float] = []
        self.empty: list[float] = []
        self._before: Any = None

    def on_step(self, state: State) -> None:
        """Keep the weights, or compare them with those of the step before."""
        if state.step % 20 > 1:
            return
        weight, grad = (next(a for a in d.values() if a.ndim == 2) for d in (state.model.params(), state.model.grads()))
        if state.step % 20 == 0:
            self._before = weight.copy()
        elif self._before is not None:
            self.moved.append(float(np.mean(weight != self._before)))
            self.empty.append(float(np.mean(grad == 0)))


def run(seed: int) -> Result:
    """Train the same network in every precision, each with several seeds."""
    runs = {name: _runs(variant, seed) for name, variant in VARIANTS.items()}
    columns = ("weights", "test accuracy %", "spread", "training loss", "weights moved %", "zero gradients %")
    rows = []
    for name, some in runs.items():
        accuracy = [100 * one.accuracy for one in some]
        means = [
            float(np.mean(values)) for values in zip(*((r.losses[-1], r.moved, r.empty) for r in some), strict=True)
        ]
        rows.append((name, float(np.mean(accuracy)), spread(accuracy), means[0], 100 * means[1], 100 * means[2]))
    return Result(
        Table(columns, rows), _claims(runs, seeds(seed, SEEDS)), lambda figure: _paint(figure, runs), (11, 4.2)
    )


def _runs(variant: Variant, seed: int) -> list[Run]:
    _, data = images(IMAGES, dtype_of("dtype", variant.dtype))
    return [_train(variant, data, seed + i) for i in range(SEEDS)]


def _train(variant: Variant, data: Dataset, seed: int) -> Run:
    model = nn.mlp(data.x_train.shape[1], 10, hidden=HIDDEN, seed=seed, dtype=variant.dtype)
    batches = Batches(data.x_train, data.y_train, BATCH, seed=seed, drop_last=True)
    lr = cosine(LR, EPOCHS * len(batches))
    optimizer = Adam(model.params(), lr, master_dtype="auto" if variant.masters else None)
    probe = Probe()
    history = fit(
        model,
        optimizer,
        nn.softmax_cross_entropy,
        batches,
        epochs=EPOCHS,
        valid=(data.x_test, data.y_test),
        scaler=LossScaler(SCALE) if variant.scaler else None,
        callbacks=[probe],
        progress=False,
    )
    losses = [float(row["loss"] or 0.0) for row in history]
    accuracy = float(history[-1]["valid_accuracy"] or 0.0)
    return Run(losses, accuracy, float(np.mean(probe.moved)), float(np.mean(probe.empty)))


def _claims(runs: dict[str, list[Run]], drawn: str) -> tuple[Claim, ...]:
    exact = [100 * one.accuracy for one in runs["float32"]]
    noise = spread(exact)
    claims = []
    for name in ("bfloat16, masters", "float16, masters, scaler"):
        gap = float(np.mean([100 * one.accuracy for one in runs[name]]) - np.mean(exact))
        numbers = f"{np.mean(exact) + gap:.2f} % and {np.mean(exact):.2f} %, spread of float32 {noise:.2f}"
        text = f"{name}: reaches the accuracy of float32 within the spread over seeds"
        claims.append(Claim(text, abs(gap) <= noise, numbers, drawn))
    for name, whole in (("bfloat16 alone", "bfloat16, masters"), ("float16 alone, scaler", "float16, masters, scaler")):
        ends, best = ([one.losses[-1] for one in runs[key]] for key in (name, whole))
        share = np.mean([one.moved for one in runs[name]])
        numbers = f"loss {np.mean(ends):.3f}, with masters {np.mean(best):.3f}; a step moves {share:.0%} of the weights"
        claims.append(Claim(f"{name}: stalls above the loss that masters reach", min(ends) > max(best), numbers, drawn))
    with_scaler, without = (
        np.mean([one.empty for one in runs[name]]) for name in ("float16, masters, scaler", "float16, masters")
    )
    numbers = f"zero are {without:.2%} without, {with_scaler:.2%} with a scale of {SCALE:g}"
    text = "float16 gradients that round to zero come back with a loss scale"
    claims.append(Claim(text, bool(with_scaler < without), numbers, drawn))
    return tuple(claims)


def _paint(figure: Any, runs: dict[str, list[Run]]) -> None:
    loss, moved = figure.subplots(1, 2, width_ratios=(3, 2))
    plot.style(loss, f"training loss, mean of {SEEDS} seeds", "epoch")
    for name, some in runs.items():
        variant = VARIANTS[name]
        mean = np.mean([one.losses for one in some], axis=0)
        epochs = np.arange(1, len(mean) + 1)
        loss.plot(epochs, mean, variant.line, color=variant.color, linewidth=variant.width, label=name)
    plot.plain_log(loss)
    plot.whole_steps(loss)
    loss.legend(frameon=False, fontsize=8, labelcolor=plot.INK)
    plot.style(moved, "share of the weights that a step moves, %")
    names = list(runs)[::-1]
    shares = [100 * float(np.mean([one.moved for one in runs[name]])) for name in names]
    moved.barh(names, shares, color=[VARIANTS[name].color for name in names], height=0.55)
    for place, share in enumerate(shares):
        moved.text(share + 1, place, f"{share:.0f}", va="center", fontsize=8, color=plot.INK)
    moved.set_xlim(0, 110)
    moved.grid(visible=False, axis="y")
