"""Initial weights: what Xavier, He and PyTorch's default draw, and what a network of three layers makes of them.

The network has three linear layers with ReLU between them and no norm; Adam at 1e-4, batches of 128. It learns a part
of Fashion-MNIST, where that is installed, and digits. Each seed draws weights and order, the same order for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kilter import data, init, nn, optim
from kilter.data import Batches, Dataset
from kilter.experiments import panels
from kilter.experiments.compare import difference, spread
from kilter.experiments.report import SURVEY, Claim, Result, Table, seeds
from kilter.experiments.task import Curve, Watch, images, rows
from kilter.train import fit, plot

LR, BATCH, HIDDEN = 1e-4, 128, (512, 256)
SHAPE = (784, 512)  # of the weights whose distribution is looked at
POINT = 1.0  # of test accuracy
DEPTH, WIDTH = 30, 256  # of the stack whose signal is followed


class Start(NamedTuple):
    """A function of `kilter.init`, the variance it is meant to have for (fan_in, fan_out), and how it is drawn."""

    fill: Callable[..., Any]
    variance: Callable[[int, int], float]
    color: str
    line: str


BLUE, RED, GREEN = plot.COLORS[:3]
STARTS = {
    "Xavier uniform": Start(init.xavier_uniform, lambda i, o: 2 / (i + o), BLUE, "-"),
    "Xavier normal": Start(init.xavier_normal, lambda i, o: 2 / (i + o), BLUE, "--"),
    "He uniform": Start(init.he_uniform, lambda i, o: 2 / i, RED, "-"),
    "He normal": Start(init.he_normal, lambda i, o: 2 / i, RED, "--"),
    "PyTorch default": Start(init.torch_default, lambda i, o: 1 / (3 * i), GREEN, "-"),
}
UNIFORM, NORMAL = ("Xavier uniform", "He uniform"), ("Xavier normal", "He normal")


class Size(NamedTuple):
    """Seeds, training images of Fashion-MNIST and of digits, epochs on each."""

    seeds: int
    images: int
    digits: int
    epochs: int
    digits_epochs: int


FULL, QUICK = Size(5, 10_000, 1437, 4, 30), Size(2, 300, 300, 1, 1)


class Run(NamedTuple):
    """The curve on test images, and the training loss of every epoch."""

    curve: Curve
    loss: Any


def run(seed: int, quick: bool = False) -> Result:
    """Draw weights, train from them, and follow a signal through a deep stack."""
    size = QUICK if quick else FULL
    name, found = images(size.images)
    digits = rows(data.digits(), size.digits)
    tasks = {name: (found, size.epochs), "digits": (digits, size.digits_epochs)}  # one task where both are digits
    runs = {
        (task, start): [_train(some, start, epochs, seed + i) for i in range(size.seeds)]
        for task, (some, epochs) in tasks.items()
        for start in STARTS
    }
    drawn = {start: given.fill(SHAPE, seed=seed) for start, given in STARTS.items()}
    depth = {start: _signal(given, seed) for start, given in STARTS.items()}
    table = []
    for (task, start), some in runs.items():
        accuracy = [100 * float(one.curve.accuracy[-1]) for one in some]
        first, last = (float(np.mean([one.loss[at] for one in some])) for at in (0, -1))
        variance = float(drawn[start].var())
        table.append((task, start, variance, first, last, float(np.mean(accuracy)), spread(accuracy)))
    columns = (
        "task",
        "weights",
        f"variance, {SHAPE[0]} x {SHAPE[1]}",
        "loss, epoch 1",
        "loss, last epoch",
        "test accuracy %",
        "spread",
    )
    words = seeds(seed, size.seeds)
    claims = [*_claims_on_weights(drawn, f"{seed}"), _claim_on_depth(depth, f"{seed}")]
    claims += [claim for task in tasks for claim in _claims_on_training(task, runs, words)]
    return Result(
        Table(columns, table), tuple(claims), lambda figure: _paint(figure, drawn, depth, runs, tuple(tasks)), (15, 7.5)
    )


def _train(found: Dataset, start: str, epochs: int, seed: int) -> Run:
    sizes, fill = (found.x_train.shape[1], *HIDDEN, 10), STARTS[start].fill
    layers: list[nn.Module] = []
    for i in range(3):
        layers += [nn.Linear(sizes[i], sizes[i + 1], seed=seed, stream=i, init=fill), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    batches = Batches(found.x_train, found.y_train, BATCH, seed=seed)
    watch = Watch(found.x_test, found.y_test, every=max(epochs * len(batches) // 12, 1))
    history = fit(
        model,
        optim.Adam(model.params(), LR),
        nn.softmax_cross_entropy,
        batches,
        epochs=epochs,
        callbacks=[watch],
        progress=False,
    )
    return Run(watch.curve(), np.array([row["loss"] for row in history]))


def _signal(start: Start, seed: int) -> Any:
    """The root mean square of the signal after each of many square layers with ReLU, 1 at first."""
    x = np.random.default_rng(seed).standard_normal((500, WIDTH)).astype("float32")
    sizes = []
    for layer in range(DEPTH):
        x = np.maximum(x @ start.fill((WIDTH, WIDTH), seed=seed, stream=layer), 0)
        sizes.append(float(np.sqrt(np.mean(x * x, dtype=np.float64))))
    return np.array(sizes)


def _claims_on_weights(drawn: dict[str, Any], seed: str) -> list[Claim]:
    fan_in, fan_out = SHAPE
    off = {name: abs(float(w.var()) / STARTS[name].variance(*SHAPE) - 1) for name, w in drawn.items()}
    xavier = float(drawn["Xavier uniform"].var())
    bound = float(np.abs(drawn["PyTorch default"]).max())
    return [
        Claim(
            SURVEY,
            "He weights have variance 2 / inputs",
            off["He normal"] < 0.01 and off["He uniform"] < 0.01,
            f"normal {drawn['He normal'].var():.4g}, uniform {drawn['He uniform'].var():.4g} of {2 / fan_in:.4g}",
            seed,
        ),
        Claim(
            SURVEY,
            "Xavier weights on ±sqrt(6 / (inputs + outputs)) have variance 1 / inputs",
            bool(abs(xavier * fan_in - 1) < 0.01),
            f"{xavier:.4g} at {fan_in} x {fan_out}, that is 2 / (inputs + outputs), not {1 / fan_in:.4g}: "
            "equal for square layers alone",
            seed,
        ),
        Claim(
            SURVEY,
            "PyTorch's default draws on ±1 / sqrt(inputs): a variance of 1 / (3 inputs), a sixth of He's",
            off["PyTorch default"] < 0.01 and bound <= fan_in**-0.5,
            f"variance {drawn['PyTorch default'].var():.4g}, bound {bound:.4f} of {fan_in**-0.5:.4f}",
            seed,
        ),
    ]


def _claim_on_depth(depth: dict[str, Any], seed: str) -> Claim:
    he, xavier, default = (depth[name][-1] for name in ("He normal", "Xavier normal", "PyTorch default"))
    return Claim(
        SURVEY,
        f"He weights keep a signal through many layers with ReLU; smaller ones lose it: {DEPTH} layers",
        bool(0.3 < he < 3 and xavier < 1e-3 and default < 1e-6),
        f"left of 1: He {he:.2g}, Xavier {xavier:.1g} (2^(-{DEPTH} / 2) is {2 ** (-DEPTH / 2):.1g}), "
        f"default {default:.1g}",
        seed,
    )


def _claims_on_training(task: str, runs: dict[tuple[str, str], list[Run]], drawn: str) -> list[Claim]:
    loss = {start: [float(one.loss[-1]) for one in runs[task, start]] for start in STARTS}
    accuracy = {start: [100 * float(one.curve.accuracy[-1]) for one in runs[task, start]] for start in STARTS}
    claims = []
    for start in UNIFORM:
        gap = difference(loss[start], loss["PyTorch default"])
        numbers = (
            f"training loss {np.mean(loss[start]):.3f} and {np.mean(loss['PyTorch default']):.3f}, {gap}; test "
            f"accuracy {np.mean(accuracy[start]):.2f} and {np.mean(accuracy['PyTorch default']):.2f} %"
        )
        claims.append(Claim(SURVEY, f"{task}: {start} learns faster than PyTorch's default", gap.below, numbers, drawn))
    for first, second in (UNIFORM, *zip(UNIFORM, NORMAL, strict=True)):
        gap = difference(accuracy[first], accuracy[second])
        numbers = f"test accuracy {np.mean(accuracy[first]):.2f} and {np.mean(accuracy[second]):.2f} %, {gap}"
        if (first, second) == UNIFORM:
            text, held = "Xavier and He weights learn alike: within a point", abs(gap.mean) + gap.half < POINT
        else:
            text = f"{first} and normal weights learn alike: the variance counts, not the distribution"
            held = not gap.clear
        claims.append(Claim(SURVEY, f"{task}: {text}", held, numbers, drawn))
    return claims


def _paint(figure: Any, drawn: Any, depth: Any, runs: Any, tasks: tuple[str, ...]) -> None:
    grid = panels.grid(figure, 2, 1 + len(tasks))
    plot.style(grid[0, 0], f"first weights of {SHAPE[0]} x {SHAPE[1]}: density")
    for name, start in STARTS.items():
        density, edges = np.histogram(drawn[name], 90, (-0.15, 0.15), density=True)
        grid[0, 0].stairs(density, edges, color=start.color, linestyle=start.line, linewidth=1.4, label=name)
    plot.style(grid[1, 0], f"signal through {DEPTH} layers with ReLU", "layer")
    for name, start in STARTS.items():
        grid[1, 0].semilogy(1 + np.arange(DEPTH), depth[name], start.line, color=start.color, lw=1.6, label=name)
    for column, task in enumerate(tasks, 1):
        plot.style(grid[0, column], f"{task}: training loss", "epoch")
        plot.style(grid[1, column], f"{task}: test accuracy, %", "step")
        for name, start in STARTS.items():
            some = runs[task, name]
            epochs = 1 + np.arange(len(some[0].loss))
            panels.band(grid[0, column], epochs, [one.loss for one in some], start.color, name, start.line)
            accuracy = [100 * one.curve.accuracy for one in some]
            panels.band(grid[1, column], some[0].curve.steps, accuracy, start.color, name, start.line)
        plot.whole_steps(grid[0, column])
    for axes in grid.flat:
        panels.legend(axes)
