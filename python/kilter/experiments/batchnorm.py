"""Batch norm against none: two tasks over many seeds, and how smooth the loss is along its own gradient.

The first task has 1,000 inputs of ten normal numbers and labels that are drawn at random: there is nothing to learn but
the labels themselves. In the second a network of random weights gives the labels. Both are learnt by a 10-64-1 network
in batches of 32 by Adam at 1e-3; each seed draws data, weights and order, the same for both networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter import init, nn, optim
from kilter.data import Batches, Dataset
from kilter.experiments import panels
from kilter.experiments.compare import difference
from kilter.experiments.report import ESSAY, OWN, SURVEY, Claim, Result, Table, seeds
from kilter.experiments.task import images
from kilter.train import fit, plot

FEATURES, HIDDEN, BATCH, LR, EPOCHS = 10, 64, 32, 1e-3, 10
MORE = 2  # times as many epochs for the network without batch norm, which is faster
DEEP, DEEP_BATCH, DEEP_LR = (128, 128, 128), 128, 0.1  # the network whose surface is looked at
REACH = (0.5, 1.0, 2.0, 3.0, 4.0)  # steps along the gradient, times the learning rate
TASKS = ("random labels", "learnable labels")
KINDS = {"with batch norm": "batch", "without": "none"}
COLORS = dict(zip(KINDS, plot.COLORS, strict=False))


class Size(NamedTuple):
    """Seeds and samples of the two tasks; seeds, images, steps and steps between looks for the surface."""

    seeds: int
    samples: int
    surfaces: int
    images: int
    steps: int
    every: int


FULL, QUICK = Size(100, 1000, 8, 5000, 200, 10), Size(2, 100, 2, 300, 10, 5)


class Run(NamedTuple):
    """By epoch: the mean loss of the training batches, the loss on held-out data, seconds of training so far."""

    loss: Any
    held_out: Any
    seconds: Any


def run(seed: int, quick: bool = False) -> Result:
    """Train with and without batch norm, and measure the loss along the gradient."""
    size = QUICK if quick else FULL
    runs: dict[tuple[str, str], list[Run]] = {(task, kind): [] for task in TASKS for kind in KINDS}
    for i in range(size.seeds):  # all kinds side by side: a busy machine slows all of them
        for (task, kind), some in runs.items():
            some.append(_train(_data(task, size.samples, seed + i), kind, seed + i))
    _, data = images(size.images)
    surfaces = {kind: [_surface(data, KINDS[kind], size, seed + i) for i in range(size.surfaces)] for kind in KINDS}
    rows = [(task, kind, *_numbers(some)) for (task, kind), some in runs.items()]
    columns = ("task", "network", "loss, epoch 1", "loss, epoch 10", "held-out loss", "ms per epoch")
    claims = [claim for task in TASKS for claim in _claims(task, runs, seeds(seed, size.seeds))]
    claims += [*_held_out(runs, seeds(seed, size.seeds)), *_smoothness(surfaces, seeds(seed, size.surfaces))]
    return Result(Table(columns, rows), tuple(claims), lambda figure: _paint(figure, runs, surfaces, size), (14, 7))


def _data(task: str, samples: int, seed: int) -> Dataset:
    """Training and held-out samples of a task, labels (N, 1) of 0 and 1."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * samples, FEATURES)).astype("float32")
    if task == "random labels":
        y: Any = rng.integers(0, 2, (2 * samples, 1))
    else:
        first, last = rng.standard_normal((FEATURES, HIDDEN)), rng.standard_normal((HIDDEN, 1))
        score = np.maximum(x @ first, 0) @ last
        y = score > np.median(score)
    y = y.astype("float32")
    return Dataset(x[:samples], y[:samples], x[samples:], y[samples:])


def _train(data: Dataset, kind: str, seed: int) -> Run:
    layers = [nn.BatchNorm(HIDDEN)] if KINDS[kind] == "batch" else []
    model = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN, seed=seed, init=init.torch_default),
        *layers,
        nn.ReLU(),
        nn.Linear(HIDDEN, 1, seed=seed, stream=1, init=init.torch_default),
    )
    history = fit(
        model,
        optim.Adam(model.params(), LR),
        nn.bce_with_logits,
        Batches(data.x_train, data.y_train, BATCH, seed=seed),
        epochs=EPOCHS * (1 if layers else MORE),
        valid=(data.x_test, data.y_test),
        progress=False,
    )
    return Run(*(np.array([row[name] for row in history]) for name in ("loss", "valid_loss", "seconds")))


def _numbers(runs: Sequence[Run]) -> tuple[float, ...]:
    means = ((r.loss[0], r.loss[EPOCHS - 1], r.held_out[EPOCHS - 1], 1000 * r.seconds.mean()) for r in runs)
    return tuple(float(np.mean(values)) for values in zip(*means, strict=True))


def _at(run: Run, seconds: float) -> float:
    """The loss between epochs, at a time."""
    return float(np.interp(seconds, np.cumsum(run.seconds), run.loss))


def _claims(task: str, runs: dict[tuple[str, str], list[Run]], drawn: str) -> list[Claim]:
    norm, plain = (runs[task, kind] for kind in KINDS)
    last = [run.loss[EPOCHS - 1] for run in norm]
    claims = []
    for when, other in (
        (f"{EPOCHS} epochs", [run.loss[EPOCHS - 1] for run in plain]),
        ("the same time", [_at(run, with_norm.seconds.sum()) for run, with_norm in zip(plain, norm, strict=True)]),
    ):
        gap = difference(last, other)
        numbers = (
            f"training loss {np.mean(last):.4f} with, {np.mean(other):.4f} without, {gap}; "
            f"lower with {gap.pairs - gap.first_higher} of {gap.pairs} seeds"
        )
        claims.append(Claim(ESSAY, f"batch norm gives a lower loss after {when}: {task}", gap.below, numbers, drawn))
    return claims


def _held_out(runs: dict[tuple[str, str], list[Run]], drawn: str) -> tuple[Claim, ...]:
    norm, plain, memory = (
        [run.held_out[EPOCHS - 1] for run in runs[key]]
        for key in (*((TASKS[1], kind) for kind in KINDS), (TASKS[0], "with batch norm"))
    )
    chance = float(np.log(2))
    gap = difference(norm, plain)
    return (
        Claim(
            OWN,
            "what is gained on random labels is memory: held-out data is answered worse than by chance",
            difference(memory, [chance] * len(memory)).above,
            f"held-out loss {np.mean(memory):.4f} with batch norm, chance {chance:.4f}",
            drawn,
        ),
        Claim(
            OWN,
            f"batch norm gives a lower held-out loss after {EPOCHS} epochs: learnable labels",
            gap.below,
            f"{np.mean(norm):.4f} with, {np.mean(plain):.4f} without, {gap}",
            drawn,
        ),
    )


def _surface(data: Dataset, norm: str, size: Size, seed: int) -> Any:
    """At every look, how far the loss ranges along the gradient, and how much the gradient turns: (looks, 2)."""
    model = nn.mlp(data.x_train.shape[1], 10, hidden=DEEP, norm=norm, seed=seed)
    params, grads = model.params(), model.grads()
    optimizer = optim.SGD(params, DEEP_LR)
    batches = Batches(data.x_train, data.y_train, DEEP_BATCH, seed=seed, drop_last=True)
    looks = []
    for step in range(size.steps):
        if step % len(batches) == 0:
            epoch = batches.epoch(step // len(batches))
        x, y = next(epoch)
        model.backward(nn.softmax_cross_entropy(model(x), y)[1], need_dx=False)
        if step % size.every == 0:
            looks.append(_look(model, x, y))
        optimizer.step(grads)
    return np.array(looks)


def _look(model: nn.Module, x: Any, y: Any) -> tuple[float, float]:
    """Largest minus smallest loss of the batch along its gradient; largest turn of the gradient, over its norm."""
    params, grads = model.params(), model.grads()
    start, direction = ({name: a.copy() for name, a in some.items()} for some in (params, grads))
    length = np.sqrt(sum(float(np.vdot(g, g)) for g in direction.values()))
    losses, turns = [], []
    for reach in REACH:
        for name, p in params.items():
            np.subtract(start[name], DEEP_LR * reach * direction[name], out=p)
        loss, dlogits = nn.softmax_cross_entropy(model(x), y)
        model.backward(dlogits, need_dx=False)
        losses.append(loss)
        turns.append(np.sqrt(sum(float(((grads[n] - direction[n]) ** 2).sum()) for n in grads)) / length)
    for name, p in params.items():
        p[...] = start[name]
        grads[name][...] = direction[name]
    return max(losses) - min(losses), max(turns)


def _smoothness(surfaces: dict[str, list[Any]], drawn: str) -> list[Claim]:
    claims = []
    for column, what in enumerate(("the loss ranges less along its gradient", "the gradient turns less along itself")):
        norm, plain = ([float(looks[:, column].mean()) for looks in surfaces[kind]] for kind in KINDS)
        gap = difference(norm, plain)
        numbers = f"mean over the run {np.mean(norm):.3g} with, {np.mean(plain):.3g} without, {gap}"
        claims.append(Claim(SURVEY, f"batch norm smooths the loss surface: {what}", gap.below, numbers, drawn))
    return claims


def _paint(figure: Any, runs: dict[tuple[str, str], list[Run]], surfaces: dict[str, list[Any]], size: Size) -> None:
    grid = panels.grid(figure, 2, 3)
    epochs = np.arange(1, EPOCHS + 1)
    for axes, task in zip(grid[:, 0], TASKS, strict=True):
        plot.style(axes, f"{task}: training loss, and held-out (dashed)", "epoch")
        for kind, color in COLORS.items():
            panels.band(axes, epochs, [run.loss[:EPOCHS] for run in runs[task, kind]], color, kind)
            axes.plot(
                epochs, np.mean([run.held_out[:EPOCHS] for run in runs[task, kind]], 0), "--", color=color, lw=1.2
            )
        axes.axhline(np.log(2), color=plot.QUIET, linewidth=1, linestyle=":")
        panels.legend(axes)
    for axes, task in zip(grid[:, 1], TASKS, strict=True):
        norm, plain = ([run.loss[EPOCHS - 1] for run in runs[task, kind]] for kind in KINDS)
        plot.style(axes, f"{task}: loss with minus without", f"after epoch {EPOCHS}; number of {size.seeds} seeds")
        axes.hist(np.subtract(norm, plain), 20, color=plot.COLORS[0], alpha=0.7)
        axes.axvline(0, color=plot.INK, linewidth=1.2)
    titles = ("range of the loss along its gradient", "turn of the gradient along itself")
    for column, (axes, title) in enumerate(zip(grid[:, 2], titles, strict=True)):
        plot.style(axes, title, "step")
        for kind, color in COLORS.items():
            values = np.array([looks[:, column] for looks in surfaces[kind]])
            panels.band(axes, size.every * np.arange(values.shape[1]), values, color, kind)
        panels.legend(axes)
