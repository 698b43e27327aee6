"""Transfer learning: a trained network learns another task from few images.

New classes: it knows six classes, and learns the other four. Finer classes: it knows ten classes in pairs, and learns
to tell them apart, on images it has not seen. Each seed draws the six classes, or the pairs. The trained network is
written to a file and read back into a network with a new last layer; what fits by name and shape is taken. Then either
only the new layer learns (everything else is frozen, batch norm with its running statistics), or all layers, those of
the old network at a tenth of the rate. Each way has a learning rate that suits it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kilter import nn, optim
from kilter.data import Batches, Dataset
from kilter.experiments import panels
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import OWN, TRICKS, Claim, Result, Table, seeds
from kilter.experiments.task import Curve, Watch, images
from kilter.train import fit, load, plot, save

TASKS = ("new classes", "finer classes")
OLD, HIDDEN = 6, (256, 128)  # of the ten classes, those that are known
LR, SLOW, BATCH, NEW_BATCH = 2e-3, 0.1, 64, 8
FIRM = 0.95  # of what is reached from scratch: the goal of the race
WAYS = {"from scratch": plot.COLORS[1], "new last layer": plot.COLORS[2], "all layers": plot.COLORS[0]}
RATES = {"from scratch": LR, "new last layer": 1e-2, "all layers": 1e-2}


class Size(NamedTuple):
    """Seeds, images for the old task, epochs on them, images per class for the new task, steps on them."""

    seeds: int
    images: int
    epochs: int
    few: tuple[int, ...]
    steps: int


FULL, QUICK = Size(6, 10_000, 3, (4, 16, 64), 160), Size(2, 300, 1, (4, 8), 8)
FRESH, TEST = 2000, 2000  # images for new tasks, and to test on, at most


class Run(NamedTuple):
    """The curve on test images of the new classes; how far the statistics of batch norm moved; names left out."""

    curve: Curve
    moved: float
    left_out: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """At the end, %."""
        return float(100 * self.curve.accuracy[-1])


Runs = dict[tuple[str, int, str], list[Run]]  # of a task, images per class, way


def run(seed: int, quick: bool = False) -> Result:
    """Train on the old tasks once per seed, and on the new ones in every way."""
    size = QUICK if quick else FULL
    name, found = images(size.images + FRESH, test=TEST)
    runs: Runs = {(task, few, way): [] for task in TASKS for few in size.few for way in WAYS}
    for i in range(size.seeds):
        for task in TASKS:
            for (few, way), one in _seed(found, task, size, seed + i).items():
                runs[task, few, way].append(one)
    table = []
    for key, some in runs.items():
        accuracy = [one.accuracy for one in some]
        first = float(np.mean([100 * one.curve.accuracy[0] for one in some]))
        spread = float(np.std(accuracy, ddof=1))
        table.append((*key, first, float(np.mean(accuracy)), spread, float(np.mean([r.moved for r in some]))))
    columns = ("task", "images per class", "way", "accuracy %, early", "accuracy %", "spread", "statistics moved")
    claims = _claims(runs, size, seeds(seed, size.seeds))
    return Result(Table(columns, table), claims, lambda figure: _paint(figure, runs, size, name), (15, 8))


def _seed(found: Dataset, task: str, size: Size, seed: int) -> dict[tuple[int, str], Run]:
    """All runs of one seed on one task."""
    old, new = _tasks(found, task, size, np.random.default_rng(seed).permutation(10))
    model = nn.mlp(old.x_train.shape[1], int(old.y_train.max()) + 1, hidden=HIDDEN, seed=seed)
    batches = Batches(old.x_train, old.y_train, BATCH, seed=seed, drop_last=True)
    optimizer = optim.AdamW(model.params(), LR)
    fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=size.epochs, progress=False)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "old.safetensors")
        save(path, model)
        for few in size.few:
            chosen = np.concatenate(
                [np.flatnonzero(new.y_train == label)[:few] for label in range(new.y_train.max() + 1)]
            )
            some = new._replace(x_train=new.x_train[chosen], y_train=new.y_train[chosen])
            for way in WAYS:
                runs[few, way] = _learn(some, way, path, size, seed)
    return runs


def _tasks(found: Dataset, task: str, size: Size, drawn: Any) -> tuple[Dataset, Dataset]:
    """The old and the new task: other images, and a number for each of the ten classes or -1 in both."""
    known, wanted = np.full((2, 10), -1)
    if task == "new classes":
        known[drawn[:OLD]], wanted[drawn[OLD:]] = np.arange(OLD), np.arange(10 - OLD)
    else:
        known[drawn], wanted = np.arange(10) // 2, np.arange(10)
    share = min(size.images, len(found.y_train) * 2 // 3)
    old = found._replace(x_train=found.x_train[:share], y_train=found.y_train[:share])
    new = found._replace(x_train=found.x_train[share:], y_train=found.y_train[share:])
    return _relabelled(old, known), _relabelled(new, wanted)


def _relabelled(found: Dataset, number: Any) -> Dataset:
    """The images of the classes that have a number, labelled by it."""
    train, test = (number[y] >= 0 for y in (found.y_train, found.y_test))
    labels = (number[y][kept] for y, kept in ((found.y_train, train), (found.y_test, test)))
    y_train, y_test = labels
    return Dataset(found.x_train[train], y_train, found.x_test[test], y_test)


def _learn(some: Dataset, way: str, path: Path, size: Size, seed: int) -> Run:
    """Learn the new classes from few images."""
    model = nn.mlp(some.x_train.shape[1], int(some.y_train.max()) + 1, hidden=HIDDEN, seed=seed + 1000)
    left_out: list[str] = []
    if way != "from scratch":
        left_out = model.load_state_dict(load(path).model, strict=False).missing
    if way == "new last layer":
        for layer in model.layers[:-1]:
            layer.freeze()
    before = _statistics(model)
    batches = Batches(some.x_train, some.y_train, min(NEW_BATCH, len(some.y_train)), seed=seed, drop_last=True)
    epochs = -(-size.steps // len(batches))
    watch = Watch(some.x_test, some.y_test, every=max(epochs * len(batches) // 12, 1))
    fit(
        model,
        _optimizer(model, way),
        nn.softmax_cross_entropy,
        batches,
        epochs=epochs,
        callbacks=[watch],
        progress=False,
    )
    return Run(watch.curve(), float(np.abs(_statistics(model) - before).max()), tuple(left_out))


def _optimizer(model: nn.Sequential, way: str) -> optim.Optimizer:
    """AdamW for what is not frozen; the layers that were taken over learn slowly."""
    params = model.params()
    if way != "all layers":
        return optim.AdamW(params, RATES[way])
    last = {name: p for name, p in params.items() if name.startswith(f"{len(model) - 1}.")}
    taken = {name: p for name, p in params.items() if name not in last}
    return optim.AdamW([{"params": taken, "lr": SLOW * RATES[way]}, {"params": last}], RATES[way])


def _statistics(model: nn.Module) -> Any:
    """All running means and variances."""
    layers = [layer for _, layer in model.modules() if isinstance(layer, nn.BatchNorm)]
    return np.concatenate([a for layer in layers for a in (layer.running.mean, layer.running.var)])


def _claims(runs: Runs, size: Size, drawn: str) -> tuple[Claim, ...]:
    accuracy = {key: [one.accuracy for one in some] for key, some in runs.items()}
    claims = []
    for task in TASKS:
        for few, way in [(size.few[0], "new last layer"), *((few, "all layers") for few in size.few)]:
            own, scratch = accuracy[task, few, way], accuracy[task, few, "from scratch"]
            gap = difference(own, scratch)
            text = f"{task}, {few} images of each: stored weights give a higher test accuracy ({way})"
            numbers = f"{mean_and_spread(own)} %, from scratch {mean_and_spread(scratch)} %, {gap}"
            claims.append(Claim(TRICKS, text, gap.above, numbers, drawn))
        claims.append(_race(task, runs, size, drawn))
    keys = [(task, few) for task in TASKS for few in size.few]
    frozen = max(one.moved for key in keys for one in runs[*key, "new last layer"])
    moved = min(one.moved for key in keys for one in runs[*key, "all layers"])
    names = {one.left_out for key in keys for one in runs[*key, "all layers"]}
    claims += [
        Claim(
            OWN,
            "a frozen batch norm keeps its statistics",
            frozen == 0 and moved > 0,
            f"largest change {frozen:g}; {moved:.2g} at least where all layers learn",
            drawn,
        ),
        Claim(
            OWN,
            "loading by name and shape takes all but the last layer",
            len(names) == 1 and all(len(some) == 2 for some in names),
            f"left out: {', '.join(next(iter(names)))}",
            drawn,
        ),
    ]
    return tuple(claims)


def _race(task: str, runs: Runs, size: Size, drawn: str) -> Claim:
    """Steps to most of what is reached from scratch with the most images."""
    few = size.few[-1]
    goals = [FIRM * float(one.curve.accuracy[-1]) for one in runs[task, few, "from scratch"]]
    steps = {
        way: [(one.curve.reached(g) or (np.inf, 0.0))[0] for one, g in zip(runs[task, few, way], goals, strict=True)]
        for way in WAYS
    }
    mean = {way: float(np.mean(some)) for way, some in steps.items()}
    return Claim(
        TRICKS,
        f"{task}, {few} images of each: stored weights arrive sooner at {FIRM:.0%} of what is reached from scratch",
        mean["all layers"] < mean["from scratch"],
        ", ".join(f"{way} {n:.0f} steps" if n < np.inf else f"{way} not in every run" for way, n in mean.items()),
        drawn,
    )


def _paint(figure: Any, runs: Runs, size: Size, name: str) -> None:
    for row, task in zip(panels.grid(figure, 2, len(size.few), sharey="row"), TASKS, strict=True):
        for axes, few in zip(row, size.few, strict=True):
            plot.style(axes, f"{name}, {task}, {few} images of each: test accuracy, %", "step")
            for way, color in WAYS.items():
                some = runs[task, few, way]
                panels.band(axes, some[0].curve.steps, [100 * one.curve.accuracy for one in some], color, way)
            panels.legend(axes, "lower right")
