"""All optimizers on one real task, each with the best of five learning rates, and the rules taken to the letter.

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
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import ESSAY, NOTES, OWN, SURVEY, Claim, Result, Table, seeds
from kilter.experiments.task import images
from kilter.schedule import cosine
from kilter.train import evaluate, plot

BATCH = 128
TARGET = 0.5  # of that average
CURVATURE = 10  # steps between two estimates for DiagonalNewton
GRID = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the rate that stands with each rule
COLUMNS = 7


class Size(NamedTuple):
    """Seeds after the first, images, steps, steps over which the training loss is averaged, hidden layers."""

    seeds: int
    images: int
    steps: int
    window: int
    hidden: tuple[int, ...]


FULL, QUICK = Size(4, 20_000, 500, 25, (128,)), Size(2, 300, 12, 5, (8,))


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
    """The averaged training loss at each step from `window` on, seconds up to each step, and the test accuracy."""

    losses: Any
    seconds: Any
    accuracy: float
    window: int

    def reached(self) -> int | None:
        """The step at which the averaged loss meets the target."""
        below = np.flatnonzero(self.losses <= TARGET)
        return int(below[0]) + self.window if below.size else None


class Best(NamedTuple):
    """The learning rate that was chosen with the first seed, and its runs with the others."""

    lr: float
    runs: list[Run]

    def mean(self, values: Callable[[Run], float | None]) -> float | None:
        """The mean over the runs; None where one has none."""
        found = [value for run in self.runs if (value := values(run)) is not None]
        return float(np.mean(found)) if len(found) == len(self.runs) else None


def run(seed: int, quick: bool = False) -> Result:
    """Train the same network with every rule; the grid uses the first seed, the results the following ones."""
    size = QUICK if quick else FULL
    name, data = images(size.images)
    best = {rule: _best(rule, data, size, seed) for rule in RULES}
    columns = ("rule", "lr", "steps to target", "seconds to target", "final loss", "test accuracy %", "ms per step")
    rows = [(rule, b.lr, *_numbers(b)) for rule, b in best.items()]
    drawn = seeds(seed + 1, size.seeds)
    claims = (*_claims(best, drawn), _decay(best["momentum"], data, size, seed + 1), *_first_steps(), *_to_the_letter())
    return Result(Table(columns, rows), claims, lambda figure: _paint(figure, best, size, name), (16, 6))


def _numbers(best: Best) -> tuple[float | None, ...]:
    return (
        best.mean(Run.reached),
        best.mean(lambda run: float(run.seconds[step - 1]) if (step := run.reached()) else None),
        best.mean(lambda run: run.losses[-1]),
        best.mean(lambda run: 100 * run.accuracy),
        best.mean(lambda run: 1000 * run.seconds[-1] / len(run.seconds)),
    )


def _best(rule: str, data: Dataset, size: Size, seed: int) -> Best:
    rates = [RULES[rule].lr * factor for factor in GRID]
    late = [float(np.mean(_train(rule, rate, data, size, seed).losses[-size.steps // 2 :])) for rate in rates]
    lr = rates[int(np.argmin(np.nan_to_num(late, nan=np.inf)))]
    return Best(lr, [_train(rule, lr, data, size, seed + 1 + i) for i in range(size.seeds)])


def _train(rule: str, lr: Any, data: Dataset, size: Size, seed: int) -> Run:
    model = nn.mlp(data.x_train.shape[1], 10, hidden=size.hidden, norm="none", seed=seed).reuse_buffers()
    optimizer = RULES[rule].make(model.params(), lr)
    batches = Batches(data.x_train, data.y_train, BATCH, seed=seed, drop_last=True)
    grads, losses, seconds = model.grads(), [], []
    start = time.perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # too large a rate of the grid may diverge
        for step in range(size.steps):
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
    smooth = np.convolve(losses, np.full(size.window, 1 / size.window), "valid")
    return Run(smooth, np.array(seconds), accuracy, size.window)


def _claims(best: dict[str, Best], drawn: str) -> tuple[Claim, ...]:
    steps = {rule: b.mean(Run.reached) or np.inf for rule, b in best.items()}
    plain, momentum = steps["SGD"], steps["momentum"]
    slower = [rule for rule in ADAPTIVE if not steps[rule] < plain]
    return (
        Claim(
            OWN,
            f"every rule reaches a training loss of {TARGET}",
            max(steps.values()) < np.inf,
            f"steps from {min(steps.values()):.0f} to {max(steps.values()):.0f}",
            drawn,
        ),
        Claim(
            NOTES,
            "momentum needs fewer steps than plain gradient descent",
            momentum < plain,
            f"{momentum:.0f} and {plain:.0f} steps",
            drawn,
        ),
        Claim(
            NOTES,
            "every adaptive rule needs fewer steps than plain gradient descent",
            not slower,
            f"plain {plain:.0f} steps, Adam {steps['Adam']:.0f}; not fewer: {', '.join(slower) or 'none'}",
            drawn,
        ),
    )


def _decay(constant: Best, data: Dataset, size: Size, seed: int) -> Claim:
    """Momentum at its best constant rate, and with that rate falling to 0."""
    falling = cosine(constant.lr, size.steps)
    decayed = [100 * _train("momentum", falling, data, size, seed + i).accuracy for i in range(size.seeds)]
    steady = [100 * run.accuracy for run in constant.runs]
    gap = difference(decayed, steady)
    return Claim(
        ESSAY,
        "decay of the learning rate helps: test accuracy of momentum",
        gap.above,
        f"{mean_and_spread(decayed)} % with a cosine to 0, {mean_and_spread(steady)} % with the best constant, {gap}",
        seeds(seed, size.seeds),
    )


def _first_steps() -> tuple[Claim, ...]:
    """How far rules step at first and later, under the gradient 1 and a learning rate of 1."""
    delta, prop, adam = (
        _steps(make, 1000) for make in (optim.Adadelta, partial(optim.RMSprop, lr=1.0), partial(optim.Adam, lr=1.0))
    )
    return (
        Claim(
            NOTES,
            "Adadelta begins with large steps",
            bool(delta[0] > delta[-1]),
            f"the first is {delta[0]:.4f}, about sqrt(eps), and the 1000th {delta[-1]:.4f}",
            "",
        ),
        Claim(
            SURVEY,
            "an average of squares that starts from zero makes RMSprop's first steps too long; Adam corrects it",
            bool(prop[0] > 2 * prop[-1] and np.isclose(adam[0], adam[-1], rtol=0.01)),
            f"first step over the last: RMSprop {prop[0] / prop[-1]:.2f}, Adam {adam[0] / adam[-1]:.2f}",
            "",
        ),
    )


def _steps(make: Callable[..., optim.Optimizer], count: int) -> Any:
    w = np.zeros(1)
    optimizer, path = make([w]), [0.0]
    for _ in range(count):
        optimizer.step([np.ones(1)])
        path.append(float(w[0]))
    return np.abs(np.diff(path))


def _to_the_letter() -> tuple[Claim, ...]:
    """Rules as they are printed, for the weight 1 and the gradients 0.5, -0.25, 1."""
    lr, eps, gradients = 0.1, 1e-8, (0.5, -0.25, 1.0)
    w, squares = 1.0, 0.0
    for g in gradients:
        w -= lr * g / (eps + squares**0.5)  # the sum ends one step before
        squares += g * g
    moved, updates = 0.0, 0.0
    for g in gradients:
        d = updates**0.5 / abs(g) * g  # no eps above
        moved, updates = moved + d, updates + d * d
    shrunk = {rate: 1.0 - _decayed(rate) for rate in (0.1, 0.01)}
    return (
        Claim(
            NOTES,
            "Adagrad divides by the root of the squares up to the step before",
            abs(w) < 10,
            f"taken to the letter three steps lead from 1 to {w:,.0f}: the first divides by eps",
            "",
        ),
        Claim(
            NOTES,
            "Adadelta has no eps above the fraction",
            moved != 0,
            f"taken to the letter it moves by {moved:g}: updates that begin with 0 stay 0",
            "",
        ),
        Claim(
            SURVEY,
            "AdamW decays weights independently of the learning rate",
            bool(np.isclose(shrunk[0.1], shrunk[0.01])),
            f"decay 0.1 takes {shrunk[0.1]:.3f} at lr 0.1 and {shrunk[0.01]:.3f} at 0.01, as in PyTorch; "
            f"decay='independent' takes {1 - _decayed(0.1, 'independent'):.1f} at both",
            "",
        ),
    )


def _decayed(lr: float, decay: str = "lr") -> float:
    """What a step of AdamW without a gradient leaves of 1."""
    w = np.ones(1)
    optim.AdamW([w], lr, weight_decay=0.1, decay=decay).step([np.zeros(1)])
    return float(w[0])


def _paint(figure: Any, best: dict[str, Best], size: Size, name: str) -> None:
    panels = figure.subplots(-(-len(best) // COLUMNS), COLUMNS, sharex=True, sharey=True)
    figure.suptitle(
        f"{name}: training loss, averaged over {size.window} steps and {size.seeds} seeds", color=plot.INK, fontsize=11
    )
    curves = {rule: np.mean([run.losses for run in b.runs], axis=0) for rule, b in best.items()}
    for axes, (rule, own) in zip(panels.flat, curves.items(), strict=False):
        at = np.arange(size.window, size.window + len(own))
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
