"""All optimizers on one real task, each with the best of five learning rates.

The rate of a rule is the one of its grid with the lowest training loss over the second half of a run with the first
seed; it stays constant. The curves and numbers come from the seeds after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kilter import nn, optim
from kilter.data import Batches, Dataset
from kilter.experiments.report import Claim, Result, Table, seeds
from kilter.experiments.task import images
from kilter.train import evaluate, plot

IMAGES, STEPS, BATCH, HIDDEN, SEEDS = 20_000, 500, 128, (128,), 3
WINDOW = 25  # steps over which the training loss is averaged
TARGET = 0.5  # of that average
CURVATURE = 10  # steps between two estimates for DiagonalNewton
GRID = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the rate that stands with each rule
KAPPA = 1e4  # condition of the quadratic
COLUMNS = 7


class Rule(NamedTuple):
    """An optimizer of a model's parameters, and the middle of the grid of its learning rate."""

    make: Callable[..., optim.Optimizer]
    lr: float


RULES = {
    "SGD": Rule(optim.SGD, 0.3),
    "momentum": Rule(partial(optim.SGD, momentum=0.9), 0.1),
    "Nesterov": Rule(partial(optim.SGD, momentum=0.9, nesterov=True), 0.1),
    "Adagrad": Rule(optim.Adagrad, 0.03),
    "RMSprop": Rule(optim.RMSprop, 0.003),
    "Adadelta": Rule(optim.Adadelta, 2.0),
    "Adam": Rule(optim.Adam, 0.003),
    "AMSGrad": Rule(partial(optim.Adam, amsgrad=True), 0.003),
    "AdamW": Rule(optim.AdamW, 0.003),
    "Adamax": Rule(optim.Adamax, 0.01),
    "NAdam": Rule(optim.NAdam, 0.003),
    "Lion": Rule(optim.Lion, 0.001),
    "DiagonalNewton": Rule(partial(optim.DiagonalNewton, damping=1e-2, clip=0.03), 0.01),
}

ADAPTIVE = ("Adagrad", "RMSprop", "Adadelta", "Adam", "AMSGrad", "AdamW", "Adamax", "NAdam")


class Run(NamedTuple):
    """The averaged training loss at each step from WINDOW on, seconds up to each step, and the test accuracy."""

    losses: Any
    seconds: Any
    accuracy: float

    def reached(self) -> int | None:
        """The step at which the averaged loss meets the target."""
        below = np.flatnonzero(self.losses <= TARGET)
        return int(below[0]) + WINDOW if below.size else None


class Best(NamedTuple):
    """The learning rate that was chosen with the first seed, and its runs with the others."""

    lr: float
    runs: list[Run]

    def mean(self, values: Callable[[Run], float | None]) -> float | None:
        """The mean over the runs; None where one has none."""
        found = [value for run in self.runs if (value := values(run)) is not None]
        return float(np.mean(found)) if len(found) == len(self.runs) else None


def run(seed: int) -> Result:
    """Train the same network with every rule; the grid uses the first seed, the results the following ones."""
    name, data = images(IMAGES)
    best = {rule: _best(rule, data, seed) for rule in RULES}
    columns = ("rule", "lr", "steps to target", "seconds to target", "final loss", "test accuracy %", "ms per step")
    rows = [(rule, b.lr, *_numbers(b)) for rule, b in best.items()]
    claims = (*_claims(best, seeds(seed + 1, SEEDS)), *_quadratic())
    return Result(Table(columns, rows), claims, lambda figure: _paint(figure, best, name), (16, 6))


def _numbers(best: Best) -> tuple[float | None, ...]:
    return (
        best.mean(Run.reached),
        best.mean(lambda run: float(run.seconds[step - 1]) if (step := run.reached()) else None),
        best.mean(lambda run: run.losses[-1]),
        best.mean(lambda run: 100 * run.accuracy),
        best.mean(lambda run: 1000 * run.seconds[-1] / STEPS),
    )


def _best(rule: str, data: Dataset, seed: int) -> Best:
    rates = [RULES[rule].lr * factor for factor in GRID]
    late = [float(np.mean(_train(rule, rate, data, seed).losses[-STEPS // 2 :])) for rate in rates]
    lr = rates[int(np.argmin(np.nan_to_num(late, nan=np.inf)))]
    return Best(lr, [_train(rule, lr, data, seed + 1 + i) for i in range(SEEDS)])


def _train(rule: str, lr: float, data: Dataset, seed: int) -> Run:
    model = nn.mlp(data.x_train.shape[1], 10, hidden=HIDDEN, norm="none", seed=seed).reuse_buffers()
    optimizer = RULES[rule].make(model.params(), lr)
    batches = Batches(data.x_train, data.y_train, BATCH, seed=seed, drop_last=True)
    grads, losses, seconds = model.grads(), [], []
    start = time.perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # too large a rate of the grid may diverge
        for step in range(STEPS):
            if step % len(batches) == 0:
                epoch = batches.epoch(step // len(batches))
            x, y = next(epoch)
            more = {}
            if rule == "DiagonalNewton" and step % CURVATURE == 0:
                more["curvature"] = optim.gauss_newton_bartlett(model, x, seed=step)
            loss, dlogits = nn.softmax_cross_entropy(model(x), y)
            model.backward(dlogits, need_dx=False)
            optimizer.step(grads, **more)
            losses.append(loss)
            seconds.append(time.perf_counter() - start)
        accuracy = evaluate(model, (data.x_test, data.y_test)).accuracy or 0.0
    smooth = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")
    return Run(smooth, np.array(seconds), accuracy)


def _claims(best: dict[str, Best], drawn: str) -> tuple[Claim, ...]:
    steps = {rule: b.mean(Run.reached) or np.inf for rule, b in best.items()}
    plain, momentum = steps["SGD"], steps["momentum"]
    slower = [rule for rule in ADAPTIVE if not steps[rule] < plain]
    return (
        Claim(
            f"every rule reaches a training loss of {TARGET}",
            max(steps.values()) < np.inf,
            f"steps from {min(steps.values()):.0f} to {max(steps.values()):.0f}",
            drawn,
        ),
        Claim(
            "momentum needs fewer steps than plain gradient descent",
            momentum < plain,
            f"{momentum:.0f} and {plain:.0f} steps",
            drawn,
        ),
        Claim(
            "every adaptive rule needs fewer steps than plain gradient descent",
            not slower,
            f"plain {plain:.0f} steps, Adam {steps['Adam']:.0f}; not fewer: {', '.join(slower) or 'none'}",
            drawn,
        ),
    )


def _quadratic() -> tuple[Claim, ...]:
    """Preconditioning where it is exact: the minimum of (KAPPA x² + y²) / 2 from (1, 1), to a norm of 1e-6."""
    h = np.array([KAPPA, 1.0])
    w = np.ones(2)
    optim.DiagonalNewton([w], damping=0.0).step([h * w], [h])
    newton = float(np.linalg.norm(w))
    w = np.ones(2)
    descent = optim.SGD([w], 2 / (KAPPA + 1))
    while np.linalg.norm(w) > 1e-6:
        descent.step([h * w])
    text = f"a quadratic of condition {KAPPA:g} takes the diagonal Newton one step"
    return (Claim(text, newton <= 1e-6, f"gradient descent with the best rate takes {descent.calls:,}", ""),)


def _paint(figure: Any, best: dict[str, Best], name: str) -> None:
    panels = figure.subplots(-(-len(best) // COLUMNS), COLUMNS, sharex=True, sharey=True)
    figure.suptitle(
        f"{name}: training loss, averaged over {WINDOW} steps and {SEEDS} seeds", color=plot.INK, fontsize=11
    )
    curves = {rule: np.mean([run.losses for run in b.runs], axis=0) for rule, b in best.items()}
    for axes, (rule, own) in zip(panels.flat, curves.items(), strict=False):
        at = np.arange(WINDOW, WINDOW + len(own))
        for other in curves.values():
            axes.plot(at, other, color=plot.QUIET, linewidth=0.6)
        axes.axhline(TARGET, color=plot.QUIET, linewidth=1, linestyle=":")
        axes.plot(at, own, color=plot.COLORS[0], linewidth=1.8)
        plot.style(axes, f"{rule}, lr {best[rule].lr:.2g}")
    ends = [curve[-1] for curve in curves.values()]
    panels.flat[0].set_ylim(0.9 * min(ends), max(1.0, 1.05 * max(ends)))
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(len(curves) - COLUMNS, 0) : len(curves)]:
        axes.set_xlabel("step", fontsize=9, color=plot.INK)
        axes.tick_params(labelbottom=True)
