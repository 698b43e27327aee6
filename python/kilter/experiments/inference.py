"""Batch norm in training and at inference: noise of small batches, and the gap that running averages leave.

Digits, a network of two hidden layers, Adam, batches of 32. The gap is how far the loss on all training images in
inference is from their loss in training mode, all in one batch, so that the noise of small batches is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter import data, nn, optim, stats
from kilter.data import Batches, Dataset
from kilter.experiments import panels
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import ESSAY, GUIDE, SURVEY, Claim, Result, Table, seeds
from kilter.experiments.task import rows
from kilter.norm import batch_norm, group_norm, layer_norm
from kilter.schedule import constant
from kilter.train import evaluate, fit, plot, recompute_batch_norm

HIDDEN, LR, BATCH = (64, 64), 1e-3, 32
FEATURES, GROUPS, DRAWS = 64, 8, 200  # of the noise of one sample's output, over so many batches of strangers
NORMS = {"batch": plot.COLORS[0], "layer": plot.COLORS[1], "group": plot.COLORS[2]}
STATISTICS = {  # the weight of a new batch; None recomputes the statistics over all images
    "running, new batch weighs 0.1": 0.1,
    "running, new batch weighs 0.9": 0.9,
    "recomputed over the data": None,
}


class Size(NamedTuple):
    """Seeds, images, batch sizes, epochs for each of them, steps at which the gap is measured."""

    seeds: int
    images: int
    batches: tuple[int, ...]
    epochs: int
    steps: tuple[int, ...]


FULL = Size(8, 1437, (2, 4, 8, 16, 32, 64), 4, (1, 2, 5, 10, 20, 50, 100, 200, 400))
QUICK = Size(2, 200, (4, 16), 1, (1, 4, 8))


def run(seed: int, quick: bool = False) -> Result:
    """Measure noise and accuracy by batch size, and the gap by step."""
    size = QUICK if quick else FULL
    found = rows(data.digits(), size.images)
    noise = {norm: [_noise(norm, batch, seed) for batch in size.batches] for norm in NORMS}
    accuracy = {
        norm: np.array([[_accuracy(found, norm, b, size, seed + i) for b in size.batches] for i in range(size.seeds)])
        for norm in NORMS
    }
    gaps = {
        name: np.array([_gaps(found, name, size.steps, seed + i) for i in range(size.seeds)]) for name in STATISTICS
    }
    table: list[tuple[Any, ...]] = [
        (f"batch {b}", norm, noise[norm][i], accuracy[norm][:, i].mean(), None)
        for norm in NORMS
        for i, b in enumerate(size.batches)
    ]
    table += [
        (f"step {s}", name, None, None, float(values[:, i].mean()))
        for name, values in gaps.items()
        for i, s in enumerate(size.steps)
    ]
    columns = ("at", "what normalises", "noise of an output", "test accuracy %", "gap of the loss")
    drawn = seeds(seed, size.seeds)
    claims = (
        *_claims_on_batches(noise, accuracy, size, seed),
        *_claims_on_gaps(gaps, size, drawn),
        _alone(seed),
        _pooled(),
    )
    return Result(Table(columns, table), claims, lambda figure: _paint(figure, noise, accuracy, gaps, size), (15, 4.4))


def _normalised(norm: str, x: Any) -> Any:
    if norm == "batch":
        return batch_norm(x)[0]
    return layer_norm(x)[0] if norm == "layer" else group_norm(x, GROUPS)[0]


def _noise(norm: str, batch: int, seed: int) -> float:
    """How far the output of one sample strays as the other samples of its batch change: standard deviation."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((DRAWS, batch, FEATURES)).astype("float32")
    x[:, 0] = x[0, 0]
    outputs = np.array([_normalised(norm, one)[0] for one in x], np.float64)
    return float(np.sqrt(outputs.var(axis=0).mean()))


def _network(found: Dataset, weight: float, seed: int) -> nn.Sequential:
    """With batch norm, whose new batches weigh so much: as a schedule, for a number above 0.5 is taken for a slip."""
    model = nn.mlp(found.x_train.shape[1], 10, hidden=HIDDEN, seed=seed)
    for _, layer in model.modules():
        if isinstance(layer, nn.BatchNorm):
            layer.running = stats.RunningStats(layer.running.mean.size, momentum=constant(weight))
    return model


def _accuracy(found: Dataset, norm: str, batch: int, size: Size, seed: int) -> float:
    model = nn.mlp(found.x_train.shape[1], 10, hidden=HIDDEN, norm=norm, seed=seed)
    batches = Batches(found.x_train, found.y_train, batch, seed=seed, drop_last=True)
    fit(
        model,
        optim.Adam(model.params(), LR),
        nn.softmax_cross_entropy,
        batches,
        epochs=size.epochs,
        progress=False,
    )
    return 100 * (evaluate(model, (found.x_test, found.y_test)).accuracy or 0.0)


def _gaps(found: Dataset, name: str, steps: Sequence[int], seed: int) -> list[float]:
    """The gap at each of the steps of one run."""
    weight = STATISTICS[name]
    model = _network(found, weight or 0.1, seed)
    optimizer = optim.Adam(model.params(), LR)
    batches = Batches(found.x_train, found.y_train, BATCH, seed=seed, drop_last=True)
    gaps, step = [], 0
    for epoch in range(steps[-1] // len(batches) + 1):
        for x, y in batches.epoch(epoch):
            model.backward(nn.softmax_cross_entropy(model(x), y)[1], need_dx=False)
            optimizer.step(model.grads())
            step += 1
            if step in steps:
                gaps.append(_gap(model, batches, precise=weight is None))
    return gaps  # an epoch that goes on past the last step adds none


def _gap(model: nn.Module, batches: Batches, *, precise: bool) -> float:
    """How far the loss in inference is from that in training mode, of all images; the model stays as it is."""
    state = model.state_dict()
    training, _ = nn.softmax_cross_entropy(model(batches.x), batches.y)
    model.load_state_dict(state)
    if precise:
        recompute_batch_norm(model, batches)
    inference = evaluate(model, (batches.x, batches.y)).loss
    model.load_state_dict(state)
    return abs(inference - training)


def _claims_on_batches(noise: dict[str, Any], accuracy: dict[str, Any], size: Size, seed: int) -> list[Claim]:
    small, large = size.batches[0], size.batches[-1]
    ratio = noise["batch"][0] / noise["batch"][-1]
    claims = [
        Claim(
            ESSAY,
            "the smaller the batch, the noisier batch norm; layer and group norm do not see the batch",
            bool((np.diff(noise["batch"]) < 0).all()) and not any(noise["layer"] + noise["group"]),
            f"noise {noise['batch'][0]:.3f} at batch {small}, {noise['batch'][-1]:.3f} at {large}, {ratio:.1f} times "
            f"(square root of the batches {np.sqrt(large / small):.1f}); layer and group norm exactly 0",
            f"{seed}",
        )
    ]
    for norm in ("layer", "group"):
        gaps = [difference(accuracy[norm][:, i], accuracy["batch"][:, i]) for i in (0, -1)]
        numbers = "; ".join(
            f"batch {b}: {accuracy[norm][:, i].mean():.1f} % and {accuracy['batch'][:, i].mean():.1f} %, {gap}"
            for b, i, gap in zip((small, large), (0, -1), gaps, strict=True)
        )
        text = f"with small batches {norm} norm is the better choice: test accuracy above that of batch norm"
        claims.append(Claim(ESSAY, text, gaps[0].above, numbers, seeds(seed, size.seeds)))
    return claims


def _claims_on_gaps(gaps: dict[str, Any], size: Size, drawn: str) -> list[Claim]:
    slow, fast, precise = gaps.values()
    first, last = size.steps[0], size.steps[-1]
    shrunk, closed = difference(slow[:, -1], slow[:, 0]), difference(precise[:, 0], slow[:, 0])
    noisy = difference(fast[:, -1], slow[:, -1])
    return [
        Claim(
            ESSAY,
            "running averages remove the gap between training and inference",
            shrunk.below and float(slow[:, -1].mean()) < 0.1 * float(slow[:, 0].mean()),
            f"gap {mean_and_spread(slow[:, 0])} after {first} step, {mean_and_spread(slow[:, -1])} after {last}",
            drawn,
        ),
        Claim(
            SURVEY,
            "the mean and variance of the data set close the gap at every step, early ones too",
            bool((precise.mean(0) < slow.mean(0)).all()) and closed.below,
            f"recomputed {precise[:, 0].mean():.3f} after {first} step and {precise[:, -1].mean():.4f} after {last}, "
            f"running {slow[:, 0].mean():.3f} and {slow[:, -1].mean():.4f}",
            drawn,
        ),
        Claim(
            GUIDE,
            "0.9 is a good weight for the new batch: no larger gap at the end than with 0.1",
            not noisy.above,
            f"gap after {last} steps {mean_and_spread(fast[:, -1])} with 0.9, {mean_and_spread(slow[:, -1])} with 0.1, "
            f"{noisy}",
            drawn,
        ),
    ]


def _alone(seed: int) -> Claim:
    """At inference a sample's output does not depend on its batch."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, FEATURES)).astype("float32")
    layer = nn.BatchNorm(FEATURES)
    layer(x)
    layer.eval()
    alone = np.vstack([layer(one[None]) for one in x])
    same = np.array_equal(alone, layer(x)) and np.array_equal(alone[:7], layer(x[:7]))
    text = "at inference the output of a sample does not depend on the batch around it"
    return Claim(ESSAY, text, same, "batches of 1, 7 and 64: equal to the last bit", f"{seed}")


def _pooled() -> Claim:
    """Unequal batches {1, 2, 3} and {10}: their pooled mean, and the mean of their means."""
    parts = [np.array(values, np.float64).reshape(-1, 1) for values in ((1, 2, 3), (10,))]
    whole = stats.merge(*(stats.moments(part) for part in parts))
    mean, var = whole.mean[0], whole.m2[0] / whole.count
    return Claim(
        SURVEY,
        "statistics of a data set are those of all its samples, however unequal the batches",
        bool(np.isclose(mean, 4) and np.isclose(var, 12.5)),
        f"{{1, 2, 3}} and {{10}}: mean {mean:g}, variance {var:g}; averages over batches would say 6 and 0.333",
        "",
    )


def _paint(figure: Any, noise: dict[str, Any], accuracy: dict[str, Any], gaps: dict[str, Any], size: Size) -> None:
    left, middle, right = panels.grid(figure, 1, 3)[0]
    plot.style(left, "noise of a sample's output: its batch changes", "batch size")
    plot.style(middle, f"test accuracy after {size.epochs} epochs, %", "batch size")
    for (norm, color), line in zip(NORMS.items(), ("-", "-", "--"), strict=True):
        left.plot(size.batches, noise[norm], line, color=color, linewidth=1.8, marker="o", ms=4, label=f"{norm} norm")
        panels.band(middle, size.batches, accuracy[norm], color, f"{norm} norm", line)
    left.plot(
        size.batches, np.sqrt(1.5 / np.array(size.batches)), ":", color=plot.INK, lw=1.2, label="sqrt(1.5 / batch)"
    )
    plot.style(right, "gap of the loss, inference and training", "step")
    for color, (name, values) in zip(plot.COLORS, gaps.items(), strict=False):
        panels.band(right, size.steps, values, color, name)
    for axes, places in ((left, size.batches), (middle, size.batches), (right, size.steps)):
        panels.ticks(axes, places)
        panels.legend(axes)
