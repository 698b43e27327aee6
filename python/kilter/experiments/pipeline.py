"""Batch norm step by step on a small network, its gradients, its place, and its relatives.

The small network has two inputs, three hidden units and one output, and 64 samples; the numbers in the figure are its
own. Its place, before or behind the activation, is compared on digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter import data, nn, optim
from kilter.data import Batches
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import GUIDE, NOTES, SURVEY, Claim, Result, Table, seeds
from kilter.experiments.task import rows
from kilter.norm import batch_norm, batch_norm_backward, group_norm, instance_norm, layer_norm
from kilter.train import evaluate, fit, plot

SAMPLES, UNITS, EPS = 64, 3, 1e-5
GAMMA, BETA = np.array([0.5, 1.0, 1.5]), np.array([-0.5, 0.0, 0.5])
HIDDEN, LR, BATCH = (64, 64), 1e-3, 32  # of the network on digits


class Size(NamedTuple):
    """Seeds, images and epochs of the comparison on digits."""

    seeds: int
    images: int
    epochs: int


FULL, QUICK = Size(10, 1437, 10), Size(2, 200, 1)


class Pass(NamedTuple):
    """What flows through the small network: (SAMPLES, units) each, and the statistics between."""

    x: Any
    z: Any
    mean: Any
    var: Any
    normal: Any
    scaled: Any
    active: Any
    y: Any


def run(seed: int, quick: bool = False) -> Result:
    """Follow one batch, check the gradients and the relatives, and compare the places."""
    size = QUICK if quick else FULL
    flow = _forward(seed)
    accuracy = {
        place: [_accuracy(place == "before", size, seed + i) for i in range(size.seeds)]
        for place in ("before", "behind")
    }
    columns = ("value", *(f"unit {i + 1}" for i in range(UNITS)))
    table = Table(columns, [(name, *map(float, values)) for name, values in _steps(flow)])
    claims = (
        _gradients(seed),
        _place(accuracy, seeds(seed, size.seeds)),
        _not_normal(seed),
        _identity(seed),
        _count(),
        *_relatives(seed),
    )
    return Result(table, claims, lambda figure: _paint(figure, flow), (15, 8.5))


def _forward(seed: int) -> Pass:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SAMPLES, 2)) * (1.0, 2.0) + (0.0, 1.0)
    z = x @ rng.standard_normal((2, UNITS)) + (3.0, -1.0, 0.5)
    normal = batch_norm(z, eps=EPS)[0]
    scaled = batch_norm(z, GAMMA, BETA, eps=EPS)[0]
    active = np.maximum(scaled, 0)
    return Pass(x, z, z.mean(0), z.var(0), normal, scaled, active, active @ rng.standard_normal((UNITS, 1)))


def _steps(flow: Pass) -> list[tuple[str, Any]]:
    """The pipeline in numbers, by unit."""
    after = [("normalised", flow.normal), ("scaled, shifted", flow.scaled)]
    steps = [("mean of the batch", flow.mean), ("variance of the batch", flow.var), ("gamma", GAMMA), ("beta", BETA)]
    return steps + [
        (f"{what} of {name}", f(values, axis=0))
        for name, values in after
        for what, f in (("mean", np.mean), ("deviation", np.std))
    ]


def _gradients(seed: int) -> Claim:
    """The gradients of gamma and beta against central differences, for the sum over the batch and for one sample."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, SAMPLES, UNITS))
    y, cache = batch_norm(x, GAMMA, BETA, eps=EPS)
    _, dgamma, dbeta, _ = batch_norm_backward(dy, cache)
    normal, h = (y - BETA) / GAMMA, 1e-6

    def slope(gamma: Any, beta: Any) -> float:
        up, down = (batch_norm(x, GAMMA + s * h * gamma, BETA + s * h * beta, eps=EPS)[0] for s in (1, -1))
        return float(((up - down) * dy).sum() / (2 * h))

    one = np.eye(UNITS)
    truth = np.array([slope(e, 0 * e) for e in one] + [slope(0 * e, e) for e in one])
    batch, single = np.concatenate([dgamma, dbeta]), np.concatenate([normal[0] * dy[0], dy[0]])
    off, far = (float(np.abs(g - truth).max() / np.abs(truth).max()) for g in (batch, single))
    return Claim(
        NOTES,
        "the gradients of gamma and beta are those of one sample, as printed",
        far < 1e-6,
        f"off by {far:.0%} against central differences in a batch of {SAMPLES}; summed over the batch off by {off:.1g}",
        f"{seed}",
    )


def _accuracy(before: bool, size: Size, seed: int) -> float:
    """Test accuracy on digits with batch norm before or behind each ReLU."""
    found = rows(data.digits(), size.images)
    sizes = (found.x_train.shape[1], *HIDDEN)
    layers: list[nn.Module] = []
    for i, units in enumerate(HIDDEN):
        pair = [nn.BatchNorm(units), nn.ReLU()]
        layers += [nn.Linear(sizes[i], units, seed=seed, stream=i), *(pair if before else pair[::-1])]
    model = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 10, seed=seed, stream=len(HIDDEN)))
    batches = Batches(found.x_train, found.y_train, BATCH, seed=seed, drop_last=True)
    optimizer = optim.Adam(model.params(), LR)
    fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=size.epochs, progress=False)
    return 100 * (evaluate(model, (found.x_test, found.y_test)).accuracy or 0.0)


def _place(accuracy: Mapping[str, Sequence[float]], drawn: str) -> Claim:
    gap = difference(accuracy["behind"], accuracy["before"])
    return Claim(
        NOTES,
        "batch norm stands behind the activation: test accuracy no lower than before it",
        not gap.below,
        f"behind {mean_and_spread(accuracy['behind'])} %, before {mean_and_spread(accuracy['before'])} %, {gap}",
        drawn,
    )


def _not_normal(seed: int) -> Claim:
    """An exponential distribution has skewness 2 and kurtosis 9; a normal one 0 and 3."""
    x = np.random.default_rng(seed).exponential(size=(100_000, 1))
    z, w = (v - v.mean() for v in (x, batch_norm(x)[0]))
    before, after = (tuple(float((v**k).mean() / v.std() ** k) for k in (3, 4)) for v in (z, w))
    return Claim(
        NOTES,
        "batch norm coerces activations to a normal distribution",
        abs(after[0]) < 0.1 and abs(after[1] - 3) < 0.1,
        f"exponential values: skewness {before[0]:.2f} before, {after[0]:.2f} after (normal 0); kurtosis "
        f"{before[1]:.2f} and {after[1]:.2f} (normal 3): mean and variance alone change",
        f"{seed}",
    )


def _identity(seed: int) -> Claim:
    x = np.random.default_rng(seed).standard_normal((SAMPLES, UNITS)) * 3 + 7
    y = batch_norm(x, np.sqrt(x.var(0) + EPS), x.mean(0), eps=EPS)[0]
    off = float(np.abs(y - x).max())
    text = "gamma and beta let batch norm be the identity"
    return Claim(SURVEY, text, off < 1e-12, f"gamma = sqrt(var + eps), beta = mean: off by {off:.1g}", f"{seed}")


def _count() -> Claim:
    model = nn.Sequential(*(nn.BatchNorm(4) for _ in range(3)))
    learnt = sum(p.size for p in model.params().values())
    text = "three layers of k features have 3 x 2 x k values of gamma and beta to learn"
    return Claim(GUIDE, text, learnt == 24, f"k = 4: {learnt}; the running statistics are not learnt", "")


def _relatives(seed: int) -> tuple[Claim, ...]:
    rng = np.random.default_rng(seed)
    flat, image = rng.standard_normal((8, 6)), rng.standard_normal((4, 6, 5, 5))

    def off(a: Any, b: Any) -> float:
        return float(np.abs(a - b).max())

    turned = off(layer_norm(flat)[0], batch_norm(np.ascontiguousarray(flat.T))[0].T)
    layer = nn.LayerNorm((6,), dtype="float64")
    trained = layer(flat)
    same = np.array_equal(trained, layer.eval()(flat))
    values = layer_norm(flat)[0]
    one, each = (
        off(a, b)
        for a, b in (
            (group_norm(image, 1)[0], layer_norm(image, ndim=3)[0]),
            (group_norm(image, 6)[0], instance_norm(image)[0]),
        )
    )
    drawn = f"{seed}"
    return (
        Claim(
            SURVEY,
            "layer norm is batch norm with samples and features exchanged",
            turned < 1e-12,
            f"largest difference {turned:.1g}",
            drawn,
        ),
        Claim(SURVEY, "layer norm is the same in training and inference", same, "equal to the last bit", drawn),
        Claim(
            NOTES,
            "layer norm gives each sample mean 0 and variance 1, without scale and shift",
            bool(off(values.mean(1), 0) < 1e-12 and off(values.var(1), 1) < 1e-4),
            f"means within {off(values.mean(1), 0):.1g}, variances {off(values.var(1), 1):.1g} (eps 1e-5)",
            drawn,
        ),
        Claim(
            GUIDE,
            "group norm lies between layer norm (one group) and instance norm (a group per channel)",
            max(one, each) < 1e-12,
            f"largest differences {one:.1g} and {each:.1g}",
            drawn,
        ),
    )


def _paint(figure: Any, flow: Pass) -> None:
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, 4))
    left, right = top.subfigures(1, 2, width_ratios=(3, 2))
    _paint_network(left.subplots(), flow)
    _paint_relatives(right)
    stages = (
        ("z = W x + b", flow.z),
        ("z_hat = (z - mean) / sqrt(var + eps)", flow.normal),
        ("gamma z_hat + beta", flow.scaled),
        ("ReLU", flow.active),
    )
    for axes, (title, values) in zip(bottom.subplots(1, 4, sharey=True), stages, strict=True):
        plot.style(axes, title)
        for unit, color in enumerate(plot.COLORS[:UNITS]):
            axes.plot(
                values[:, unit], unit + np.linspace(-0.25, 0.25, SAMPLES), "o", color=color, ms=3, alpha=0.5, mew=0
            )
            mean, sd = round(values[:, unit].mean(), 9), values[:, unit].std()
            axes.plot([mean - sd, mean + sd], [unit - 0.36] * 2, color=color, linewidth=2)
            axes.plot(mean, unit - 0.36, "|", color=color, markersize=9, markeredgewidth=2)
            text = f"{mean + 0.0:.2f} ± {sd:.2f}"
            axes.text(0.99, unit + 0.4, text, transform=axes.get_yaxis_transform(), fontsize=8, color=color, ha="right")
        axes.set_ylim(UNITS - 0.4, -0.6)
        axes.set_yticks(range(UNITS), [f"unit {u + 1}" for u in range(UNITS)])
        low, high = values.min(), values.max()
        axes.set_xlim(low - 0.08 * (high - low), high + 0.35 * (high - low))


def _paint_network(axes: Any, flow: Pass) -> None:
    """The small network from left to right, batch norm between the hidden layer and its activation."""
    axes.set_title(
        "batch norm in a small network; mean ± deviation over the batch", loc="left", fontsize=10, color=plot.INK
    )
    axes.set_axis_off()
    layers = (
        ("inputs", flow.x, "x{}"),
        ("linear", flow.z, "z{}"),
        ("batch norm", flow.scaled, "BN"),
        ("activation", flow.active, "ReLU"),
        ("output", flow.y, "y"),
    )
    heights = [np.arange(values.shape[1])[::-1] - (values.shape[1] - 1) / 2 for _, values, _ in layers]
    for column, (name, values, label) in enumerate(layers):
        x = 1.6 * column
        axes.text(x, 1.75, name, fontsize=9, color=plot.INK, ha="center")
        for unit, y in enumerate(heights[column]):
            color = plot.COLORS[unit] if values.shape[1] == UNITS else plot.INK
            shape = "square,pad=0.45" if label in ("BN", "ReLU") else "circle,pad=0.35"
            axes.text(
                x,
                y,
                label.format(unit + 1),
                fontsize=9,
                color=color,
                ha="center",
                va="center",
                zorder=3,
                bbox={"boxstyle": shape, "facecolor": "white", "edgecolor": color, "linewidth": 1.4},
            )
            text = f"{values[:, unit].mean():.2f} ± {values[:, unit].std():.2f}"
            axes.text(x, y - 0.42, text, fontsize=8, color=plot.INK, ha="center")
            full = column in (1, 4)  # every unit of the layer before feeds this one
            for other, before in enumerate(heights[column - 1] if column else ()):
                if full or other == unit:
                    axes.plot([x - 1.6, x], [before, y], color=plot.QUIET, linewidth=1, zorder=1)
    axes.set_xlim(-0.6, 7.0)
    axes.set_ylim(-1.7, 2.0)


def _paint_relatives(figure: Any) -> None:
    """Which values share a statistic: 4 samples down, 6 channels across, each cell a sample's channel."""
    figure.suptitle("which values share a statistic: the same colour", x=0.02, ha="left", fontsize=10, color=plot.INK)
    sample, channel = np.mgrid[0:4, 0:6]
    shared = {
        "batch norm": channel,
        "layer norm": sample,
        "group norm, 2 groups": 2 * sample + channel // 3,
        "instance norm": 6 * sample + channel,
    }
    for axes, (name, group) in zip(figure.subplots(2, 2).flat, shared.items(), strict=True):
        axes.imshow(np.linspace(0, 1, group.max() + 1)[group], cmap="turbo", alpha=0.75, aspect="auto")
        axes.set_title(name, fontsize=9, color=plot.INK, loc="left")
        axes.set_xticks(np.arange(-0.5, 6), [])
        axes.set_yticks(np.arange(-0.5, 4), [])
        axes.grid(color="white", linewidth=1.5)
        axes.tick_params(length=0)
        axes.set_xlabel("channels", fontsize=8, color=plot.INK)
        axes.set_ylabel("samples", fontsize=8, color=plot.INK)
        for side in axes.spines.values():
            side.set_visible(False)
