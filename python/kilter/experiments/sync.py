"""Batch norm over several devices: what each sees alone, and what they see together.

The devices are threads of this process (`kilter.dist.Threads`). They hold equal weights and average their gradients by
the number of samples; batch norm takes its statistics per device, or over all of them. A device holds the images of its
own digits, or its part of a mixture of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter import data, nn, optim, stats
from kilter.data import Batches, Dataset
from kilter.dist import Communicator, GradientReducer, Threads
from kilter.experiments import panels
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import GUIDE, OWN, Claim, Result, Table, seeds
from kilter.experiments.task import rows
from kilter.norm import batch_norm
from kilter.train import evaluate, plot

EXAMPLE = ((1.0, 3.0), (2.0, 4.0, 6.0), (10.0,))  # one channel on three devices, with 2, 3 and 1 samples
RANKS, HIDDEN, LR, MOMENTUM = 4, (64,), 0.05, 0.9
SPLITS = ("own digits", "mixed")
EARLY = 20  # steps before rounding has grown
WAYS = {"alone": plot.COLORS[1], "synchronised": plot.COLORS[0], "one device": plot.COLORS[2]}


class Size(NamedTuple):
    """Seeds, images, samples per device and step, steps."""

    seeds: int
    images: int
    share: int
    steps: int


FULL, QUICK = Size(8, 1437, 4, 300), Size(2, 200, 4, 6)


class Run(NamedTuple):
    """By step, the running mean of one channel on each device, (steps, ranks); in the end, of each device, the running
    statistics of all layers, and the accuracy on test images, %."""

    path: Any
    running: Any
    accuracy: Any


def run(seed: int, quick: bool = False) -> Result:
    """Compare rules for the statistics of several devices, and train with and without synchronisation."""
    size = QUICK if quick else FULL
    rules = _rules()
    runs = {
        (split, way): [_train(split, way, size, seed + i) for i in range(size.seeds)]
        for split in SPLITS
        for way in WAYS
    }
    table: list[tuple[Any, ...]] = [
        (f"{{1, 3}} {{2, 4, 6}} {{10}}: {rule}", *pair, None, None) for rule, pair in rules.items()
    ]
    for (split, way), some in runs.items():
        apart = float(np.mean([_apart(one) for one in some]))
        table.append((f"{split}: {way}", None, None, apart, float(np.mean(_accuracy(some)))))
    columns = ("statistics", "mean", "variance", "running statistics apart", "test accuracy %")
    drawn = seeds(seed, size.seeds)
    claims = (*_claims_on_rules(rules), _equal_parts(seed), _exchanged(seed), *_claims_on_training(runs, drawn))
    return Result(Table(columns, table), claims, lambda figure: _paint(figure, rules, runs), (15, 4.4))


def _rules() -> dict[str, tuple[float, float]]:
    """Mean and variance of the example by each rule."""
    parts = [np.array(part).reshape(-1, 1) for part in EXAMPLE]
    n, mean, var = (
        np.array(values) for values in ([len(p) for p in parts], [p.mean() for p in parts], [p.var() for p in parts])
    )
    pooled = np.concatenate(parts)

    def together(comm: Communicator) -> Any:
        return batch_norm(parts[comm.rank], comm=comm)[1].moments

    found = Threads(len(parts)).run(together)[0]
    middle = float((mean * n).sum() / n.sum())
    return {
        "all samples on one device": (float(pooled.mean()), float(pooled.var())),
        "weighted by samples": (middle, float(((var + (mean - middle) ** 2) * n).sum() / n.sum())),
        "batch_norm(comm=...)": (float(found.mean[0]), float(found.m2[0] / found.count)),
        "sums over total samples": (float(mean.sum() / n.sum()), float(var.sum() / n.sum())),
        "mean of the devices": (float(mean.mean()), float(var.mean())),
    }


def _train(split: str, way: str, size: Size, seed: int) -> Run:
    """One run; "one device" takes the samples of all in one batch."""
    found = rows(data.digits(), size.images)
    order = np.argsort(found.y_train, kind="stable") if split == "own digits" else np.arange(len(found.y_train))
    ranks = 1 if way == "one device" else RANKS
    parts = np.array_split(order, RANKS)

    def work(comm: Communicator) -> tuple[Any, Any, float]:
        mine = parts if comm.size == 1 else [parts[comm.rank]]
        return _rank(comm if way == "synchronised" else None, comm, mine, found, size, seed)

    path, running, accuracy = zip(*Threads(ranks).run(work), strict=True)
    return Run(np.array(path).T, np.array(running), np.array(accuracy))


def _rank(
    norms: Communicator | None, comm: Communicator, parts: Sequence[Any], found: Dataset, size: Size, seed: int
) -> tuple[Any, Any, float]:
    """Train as one rank, on `size.share` samples of each of the parts per step."""
    model = nn.convert_sync_batchnorm(nn.mlp(found.x_train.shape[1], 10, hidden=HIDDEN, seed=seed), norms)
    layers = [layer for _, layer in model.modules() if isinstance(layer, nn.BatchNorm)]
    optimizer, reducer = optim.SGD(model.params(), LR, momentum=MOMENTUM), GradientReducer(model.grads(), comm)
    batches = [Batches(found.x_train[p], found.y_train[p], size.share, seed=seed, drop_last=True) for p in parts]
    path = []
    for step in range(size.steps):
        shares = [_batch(some, step) for some in batches]
        x, y = (np.concatenate(arrays) for arrays in zip(*shares, strict=True))
        model.backward(nn.softmax_cross_entropy(model(x), y)[1], need_dx=False)
        optimizer.step(reducer.reduce(model.grads(), len(x)))
        path.append(float(layers[0].running.mean[0]))
    running = np.concatenate([a for layer in layers for a in (layer.running.mean, layer.running.var)])
    return path, running, 100 * (evaluate(model, (found.x_test, found.y_test)).accuracy or 0.0)


def _batch(batches: Batches, step: int) -> tuple[Any, Any]:
    """The batch of a step, epoch after epoch."""
    epoch, at = divmod(step, len(batches))
    rows = batches.order(epoch)[at * batches.batch_size : (at + 1) * batches.batch_size]
    return batches.x[rows], batches.y[rows]


def _accuracy(runs: Sequence[Run]) -> list[float]:
    """The mean over the devices, of each run."""
    return [float(one.accuracy.mean()) for one in runs]


def _apart(one: Run) -> float:
    """The largest difference between the running statistics of two devices, over their root mean square."""
    return float(np.ptp(one.running, axis=0).max() / np.sqrt(np.mean(one.running**2)))


def _claims_on_rules(rules: dict[str, tuple[float, float]]) -> list[Claim]:
    truth = rules["all samples on one device"]

    def claim(text: str, rule: str) -> Claim:
        mean, var = rules[rule]
        numbers = (
            f"{{1, 3}}, {{2, 4, 6}}, {{10}}: mean {mean:.3f}, variance {var:.3f}; truth {truth[0]:.3f}, {truth[1]:.3f}"
        )
        return Claim(GUIDE, text, bool(np.allclose(rules[rule], truth)), numbers, "")

    plain = rules["mean of the devices"]
    return [
        Claim(
            OWN,
            "the plain mean over devices of unequal shares is wrong too",
            not np.allclose(plain, truth),
            f"mean {plain[0]:.3f}, variance {plain[1]:.3f}",
            "",
        ),
        claim("means weighted by samples, and variances with their shift, are those of all", "weighted by samples"),
        claim(
            "summed means and variances of the devices, over all samples, are those of all", "sums over total samples"
        ),
        claim("synchronised batch norm with unequal shares has the statistics of all samples", "batch_norm(comm=...)"),
    ]


def _equal_parts(seed: int) -> Claim:
    """Three devices with 32 samples each against one with 96: outputs, gradients and running statistics."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((96, 64)).astype("float32") for _ in range(2))

    def layer(comm: Communicator | None, at: slice) -> Any:
        norm = nn.BatchNorm(64)
        norm.comm = comm
        return norm(x[at]), norm.backward(dy[at]), norm.running.mean, norm.running.var

    whole = layer(None, slice(None))
    parts = Threads(3).run(lambda comm: layer(comm, slice(32 * comm.rank, 32 * comm.rank + 32)))
    split = [np.concatenate([part[i] for part in parts]) for i in range(2)] + [parts[0][i] for i in (2, 3)]
    off = max(float(np.abs(a - b).max()) for a, b in zip(whole, split, strict=True))
    same = all(np.array_equal(parts[0][i], part[i]) for part in parts for i in (2, 3))
    return Claim(
        GUIDE,
        "32 samples on each of 3 devices are normalised as 96 on one, and all keep the same running statistics",
        off < 1e-5 and same,
        f"largest difference of outputs, gradients and statistics {off:.1g}; devices among themselves 0",
        f"{seed}",
    )


def _exchanged(seed: int) -> Claim:
    """Statistics from gathered activations and from gathered statistics, and the bytes of both."""
    x = np.random.default_rng(seed).standard_normal((96, 64)).astype("float32")
    gathered = stats.moments(x)
    merged = stats.merge(*(stats.moments(x[at : at + 32]) for at in (0, 32, 64)))
    off = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(gathered[1:], merged[1:], strict=True))
    one = 8 * (1 + 2 * x.shape[1])
    return Claim(
        GUIDE,
        "synchronised statistics need the activations of all devices",
        off > 1e-6,
        f"count, mean and sum of squares per device give the same to {off:.1g} of their size, in {one:,} bytes "
        f"instead of {x[:32].nbytes:,} for 32 x 64",
        f"{seed}",
    )


def _claims_on_training(runs: dict[tuple[str, str], list[Run]], drawn: str) -> list[Claim]:
    alone, together = ([_apart(one) for one in runs[SPLITS[0], way]] for way in ("alone", "synchronised"))
    claims = [
        Claim(
            GUIDE,
            "batch norm per device is inconsistent: the devices keep different running statistics",
            min(alone) > 0.01 and max(together) == 0,
            f"apart by {np.mean(alone):.2g} of their size, synchronised by {max(together):g}",
            drawn,
        )
    ]
    for split in SPLITS:
        accuracy = {way: _accuracy(runs[split, way]) for way in WAYS}
        gain = difference(accuracy["synchronised"], accuracy["alone"])
        text = f"synchronised batch norm trains better: test accuracy, {split} on each device"
        numbers = f"{mean_and_spread(accuracy['synchronised'])} and {mean_and_spread(accuracy['alone'])} %, {gain}"
        claims.append(Claim(GUIDE, text, gain.above, numbers, drawn))
    rest = difference(accuracy["synchronised"], accuracy["one device"])
    off = max(
        float(np.abs(s.path - o.path)[:EARLY].max())
        for s, o in zip(runs["mixed", "synchronised"], runs["mixed", "one device"], strict=True)
    )
    text = "synchronised training is training on one device"
    numbers = (
        f"a running mean differs by {off:.1g} in {EARLY} steps, before rounding grows; test accuracy in the end "
        f"{mean_and_spread(accuracy['one device'])} % on one, {rest}"
    )
    return [*claims, Claim(GUIDE, text, not rest.clear and off < 1e-3, numbers, drawn)]


def _paint(figure: Any, rules: dict[str, tuple[float, float]], runs: dict[tuple[str, str], list[Run]]) -> None:
    left, middle, right = panels.grid(figure, 1, 3, width_ratios=(4, 5, 3))[0]
    _paint_rules(left, rules)
    plot.style(middle, f"{SPLITS[0]}: a running mean, on each device", "step")
    for way, color in WAYS.items():
        path = runs[SPLITS[0], way][0].path
        style: dict[str, Any] = {"linewidth": 3.5, "alpha": 0.35} if way == "one device" else {"linewidth": 1.2}
        middle.plot(1 + np.arange(len(path)), path, color=color, label=[way] + [None] * (path.shape[1] - 1), **style)
    panels.legend(middle)
    plot.style(right, "test accuracy, %: dots are seeds")
    accuracy = {f"{split}: {way}": _accuracy(some) for (split, way), some in runs.items()}
    panels.strips(right, accuracy, [*WAYS.values()] * 2)


def _paint_rules(axes: Any, rules: dict[str, tuple[float, float]]) -> None:
    """Each rule's mean as a point and one standard deviation as a bar, on the samples."""
    plot.style(axes, "{1, 3} {2, 4, 6} {10}: mean, and one deviation")
    truth = rules["all samples on one device"]
    for place, (mean, var) in enumerate(list(rules.values())[::-1]):
        color = plot.COLORS[0] if np.allclose((mean, var), truth) else plot.COLORS[1]
        axes.plot([mean - var**0.5, mean + var**0.5], [place] * 2, color=color, linewidth=2.4)
        axes.plot(mean, place, "o", color=color, markersize=7)
    for color, part in zip(plot.COLORS[2:], EXAMPLE, strict=False):
        axes.plot(part, [-0.8] * len(part), "s", color=color, markersize=6)
    axes.set_yticks((-0.8, *range(len(rules))), ("samples", *list(rules)[::-1]))
    axes.set_ylim(-1.3, len(rules) - 0.5)
    axes.grid(visible=False, axis="y")
