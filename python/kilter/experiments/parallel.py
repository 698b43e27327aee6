"""Data over several ranks, and what large batches ask of the learning rate.

The ranks are threads of this process. The large batches train a network without batch norm, which would forgive a wrong
rate, by SGD with momentum, each for the same number of epochs: with the rate of the small batch, with the rate scaled
by the size of the batch, with a warm-up, and with both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kilter import nn, optim, schedule
from kilter.data import Batches, Dataset
from kilter.dist import Communicator, Threads, shard
from kilter.experiments import panels
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import ESSAY, OWN, TRICKS, Claim, Result, Table, seeds
from kilter.experiments.task import images
from kilter.train import evaluate, fit, plot

HIDDEN, MOMENTUM = (128,), 0.9
BATCH, LR = 32, 0.01  # the small batch and its rate
POINT = 1.0  # of test accuracy: less counts as nothing
PEAK, WARM = 2.0, 1.0  # of the warm-up that falls, times the rate; epochs of a warm-up
WAYS = {  # scaled rate, warm-up
    "same rate": (False, False),
    "scaled": (True, False),
    "warm-up": (False, True),
    "scaled, warm-up": (True, True),
}
COLORS = dict(zip(WAYS, (plot.COLORS[1], plot.COLORS[2], plot.COLORS[3], plot.COLORS[0]), strict=True))


class Size(NamedTuple):
    """Seeds, images, epochs, batches as multiples of the small one."""

    seeds: int
    images: int
    epochs: int
    factors: tuple[int, ...]


FULL, QUICK = Size(6, 12_800, 4, (1, 4, 16, 64)), Size(2, 256, 2, (1, 4))


class Run(NamedTuple):
    """Test accuracy, %, and seconds per epoch."""

    accuracy: float
    seconds: float


def run(seed: int, quick: bool = False) -> Result:
    """Check the arithmetic of shards, and train with batches of growing size."""
    size = QUICK if quick else FULL
    name, data = images(size.images)
    runs: dict[tuple[int, str], list[Run]] = {(factor, way): [] for factor in size.factors for way in WAYS}
    for i in range(size.seeds):  # all batches side by side: a busy machine slows all of them
        for (factor, way), some in runs.items():
            some.append(_train(data, _rate(size, factor, *WAYS[way]), factor, size, seed + i))
    worst = size.factors[-2]
    falls = [_train(data, _falling(size, worst), worst, size, seed + i).accuracy for i in range(size.seeds)]
    table = [
        (
            BATCH * factor,
            way,
            LR * (factor if WAYS[way][0] else 1),
            float(np.mean([one.accuracy for one in some])),
            float(np.std([one.accuracy for one in some], ddof=1)),
            float(np.mean([one.seconds for one in some])),
        )
        for (factor, way), some in runs.items()
    ]
    columns = ("batch", "learning rate", "peak", "test accuracy %", "spread", "seconds per epoch")
    drawn = seeds(seed, size.seeds)
    claims = (
        _shares(),
        _gradients(seed),
        _ranks(data, seed),
        _accumulated(seed),
        *_claims(runs, size, drawn),
        _direction(falls, runs[worst, "scaled, warm-up"], BATCH * worst, drawn),
    )
    return Result(Table(columns, table), claims, lambda figure: _paint(figure, runs, size, name), (15, 4.4))


def _rate(size: Size, factor: int, scaled: bool, warm: bool) -> Any:
    """The learning rate: constant, by the batch or not, behind a warm-up or not."""
    peak = schedule.scale_lr(LR, BATCH * factor, BATCH) if scaled else LR
    steady = schedule.constant(peak)
    return schedule.warmup(steady, _warm_steps(size, factor)) if warm else steady


def _falling(size: Size, factor: int) -> Any:
    """The other direction: high at first, then down to the scaled rate."""
    peak = schedule.scale_lr(LR, BATCH * factor, BATCH)
    return schedule.linear(PEAK * peak, peak, _warm_steps(size, factor))


def _warm_steps(size: Size, factor: int) -> int:
    return max(round(WARM * size.images / (BATCH * factor)), 1)


def _train(data: Dataset, lr: Any, factor: int, size: Size, seed: int) -> Run:
    model = nn.mlp(data.x_train.shape[1], 10, hidden=HIDDEN, norm="none", seed=seed)
    batches = Batches(data.x_train, data.y_train, min(BATCH * factor, len(data.y_train)), seed=seed, drop_last=True)
    optimizer = optim.SGD(model.params(), lr, momentum=MOMENTUM)
    history = fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=size.epochs, progress=False)
    found = evaluate(model, (data.x_test, data.y_test))
    return Run(100 * (found.accuracy or 0.0), float(np.mean([row["seconds"] for row in history])))


def _shares() -> Claim:
    each = [shard(8192, rank, 256) for rank in range(256)]
    sizes = {part.stop - part.start for part in each}
    uneven = [
        [part.stop - part.start for part in (shard(n, r, world) for r in range(world))]
        for n in (0, 5, 1437, 8192)
        for world in (1, 3, 7, 256)
    ]
    fits = all(max(parts) - min(parts) <= 1 for parts in uneven) and sum(map(sum, uneven)) == 4 * (5 + 1437 + 8192)
    return Claim(
        TRICKS,
        "a batch of 8192 on 256 devices is 32 for each",
        sizes == {32} and fits,
        "and any batch on any number of devices: shares differ by one at most, and sum to the batch",
        "",
    )


def _gradients(seed: int) -> Claim:
    """The mean gradient over unequal shares, weighted and not, against the gradient of the whole batch."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((10, 20)).astype("float32"), rng.integers(0, 5, 10)
    model = nn.mlp(20, 5, hidden=(16,), norm="none", seed=seed)

    def gradient(at: slice) -> Any:
        model.backward(nn.softmax_cross_entropy(model(x[at]), y[at])[1], need_dx=False)
        return np.concatenate([g.ravel() for g in model.grads().values()])

    whole, parts = gradient(slice(None)), [shard(10, rank, 4) for rank in range(4)]
    each, n = np.array([gradient(at) for at in parts]), np.array([at.stop - at.start for at in parts])
    off, plain = (
        float(np.abs(mean - whole).max() / np.abs(whole).max()) for mean in (n @ each / n.sum(), each.mean(axis=0))
    )
    return Claim(
        TRICKS,
        "replicas that hold equal weights and average their gradients do as one device does",
        off < 1e-5,
        f"shares {', '.join(map(str, n))}: weighted by samples off by {off:.1g}, the plain mean by {plain:.1g}",
        f"{seed}",
    )


def _ranks(data: Dataset, seed: int) -> Claim:
    """A run on one rank and on four: the largest difference of a weight, over the largest weight."""

    def weights(comm: Communicator) -> Any:
        model = nn.convert_sync_batchnorm(nn.mlp(data.x_train.shape[1], 10, hidden=(32,), seed=seed), comm)
        optimizer = optim.SGD(model.params(), 0.1, momentum=MOMENTUM)
        batches = Batches(data.x_train[:640], data.y_train[:640], 62, seed=seed)
        fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=1, comm=comm, progress=False)
        return np.concatenate([p.ravel() for p in model.params().values()])

    (one,), four = (Threads(n).run(weights) for n in (1, 4))
    off = max(float(np.abs(some - one).max() / np.abs(one).max()) for some in four)
    same = all(np.array_equal(some, four[0]) for some in four)
    return Claim(
        TRICKS,
        "training on 4 ranks is training on one, remainders included",
        off < 1e-3 and same,
        f"weights after an epoch of batches of 62 differ by {off:.1g} of the largest; the ranks' own by 0",
        f"{seed}",
    )


def _accumulated(seed: int) -> Claim:
    """The gradient of unequal micro-batches, accumulated, against that of all samples at once."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((10, 20)).astype("float32"), rng.integers(0, 5, 10)
    model = nn.mlp(20, 5, hidden=(16,), norm="none", seed=seed)
    gathered = optim.GradAccumulator(model.grads())
    parts = (slice(0, 6), slice(6, 9), slice(9, 10))
    for at in parts:
        model.backward(nn.softmax_cross_entropy(model(x[at]), y[at])[1], need_dx=False)
        gathered.add(model.grads(), at.stop - at.start)
    mean = np.concatenate([g.ravel() for g in gathered.finish().values()])
    model.backward(nn.softmax_cross_entropy(model(x), y)[1], need_dx=False)
    whole = np.concatenate([g.ravel() for g in model.grads().values()])
    off = float(np.abs(mean - whole).max() / np.abs(whole).max())
    return Claim(
        ESSAY,
        "accumulated gradients of small batches are those of a large one",
        off < 1e-5,
        f"batches of 6, 3 and 1, weighted by samples: off by {off:.1g}",
        f"{seed}",
    )


def _claims(runs: dict[tuple[int, str], list[Run]], size: Size, drawn: str) -> list[Claim]:
    accuracy = {key: [one.accuracy for one in some] for key, some in runs.items()}
    base = accuracy[1, "same rate"]
    claims = []
    for factor in size.factors[1:]:
        scaled = accuracy[factor, "scaled, warm-up"]
        kept, gain = difference(scaled, base), difference(scaled, accuracy[factor, "same rate"])
        numbers = (
            f"{size.epochs * (size.images // (BATCH * factor))} steps: test accuracy {mean_and_spread(scaled)} %, "
            f"batch {BATCH} {mean_and_spread(base)} %, {kept}; unscaled "
            f"{mean_and_spread(accuracy[factor, 'same rate'])} %, {gain}"
        )
        text = (
            f"a batch {factor} times as large with a rate {factor} times as large, warmed up, loses less than a point"
        )
        claims.append(Claim(TRICKS, text, kept.mean - kept.half > -POINT, numbers, drawn))
    last = size.factors[-1]
    for factor in (size.factors[-2], last):
        gap = difference(accuracy[factor, "scaled, warm-up"], accuracy[factor, "scaled"])
        numbers = f"{mean_and_spread(accuracy[factor, 'scaled'])} % without, {gap}"
        claims.append(
            Claim(TRICKS, f"batch {BATCH * factor}: warm-up helps the scaled rate", gap.above, numbers, drawn)
        )
    gap = difference(accuracy[last, "scaled"], accuracy[last, "warm-up"])
    claims.append(
        Claim(
            OWN,
            f"batch {BATCH * last}: scaling and warm-up are two things, and scaling makes up for fewer steps",
            gap.above,
            f"scaled alone {mean_and_spread(accuracy[last, 'scaled'])} %, warm-up alone "
            f"{mean_and_spread(accuracy[last, 'warm-up'])} %, {gap}",
            drawn,
        )
    )
    times = [float(np.mean([one.seconds for way in WAYS for one in runs[factor, way]])) for factor in size.factors]
    numbers = ", ".join(f"batch {BATCH * f} {1000 * t:.0f} ms" for f, t in zip(size.factors, times, strict=True))
    claims.append(Claim(TRICKS, "larger batches make an epoch faster", times[-1] < times[0], numbers, drawn))
    return claims


def _direction(falls: list[float], rises: list[Run], batch: int, drawn: str) -> Claim:
    up = [one.accuracy for one in rises]
    gap = difference(falls, up)
    return Claim(
        TRICKS,
        f"batch {batch}: training starts with a high rate, and warms up downwards",
        gap.above,
        f"from {PEAK:g} times the rate down {mean_and_spread(falls)} %, from 0 up {mean_and_spread(up)} %, {gap}",
        drawn,
    )


def _paint(figure: Any, runs: dict[tuple[int, str], list[Run]], size: Size, name: str) -> None:
    left, middle, right = panels.grid(figure, 1, 3)[0]
    batches = [BATCH * factor for factor in size.factors]
    plot.style(left, f"{name}: test accuracy after {size.epochs} epochs, %", "batch")
    for way, color in COLORS.items():
        values = np.array([[one.accuracy for one in runs[factor, way]] for factor in size.factors]).T
        panels.band(left, batches, values, color, way)
    plot.style(middle, "seconds per epoch", "batch")
    seconds = [[one.seconds for way in WAYS for one in runs[factor, way]] for factor in size.factors]
    panels.band(middle, batches, np.array(seconds).T, plot.COLORS[0], "all runs")
    middle.set_ylim(bottom=0)
    for axes in (left, middle):
        panels.ticks(axes, batches)
    panels.legend(left, "lower left")
    factor = size.factors[-2]
    steps = np.arange(size.epochs * _warm_steps(size, factor))
    plot.style(right, f"learning rates at batch {BATCH * factor}", "step")
    for way, color in COLORS.items():
        right.plot(steps, _rate(size, factor, *WAYS[way])(steps) + 0.0 * steps, color=color, linewidth=1.8, label=way)
    right.plot(steps, _falling(size, factor)(steps), ":", color=plot.INK, linewidth=1.5, label="scaled, falling")
    right.set_ylim(bottom=0)
    panels.legend(right)
