"""Batch norm: what it does to activations, and how steady its running statistics are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kilter import data, nn, optim, schedule, stats, train
from kilter._check import fail
from kilter.experiments.report import GUIDE, OWN, Claim, Result, Table
from kilter.norm import batch_norm
from kilter.train import plot

EXAMPLE, GAMMA, BETA = (2.0, 4.0, 6.0, 8.0), 2.0, 1.0
BATCHES, BATCH, SHOWN = 50, 16, 5
FEATURES, FEW = 20_000, 2000  # channels that the noise is measured on; those of a quick run
EPOCHS = 30  # of the network on digits
MOMENTUM = {
    "static 0.9": schedule.constant(0.9),
    "0.9 falling to 0.1": schedule.linear(0.9, 0.1, 40),
    "static 0.1": schedule.constant(0.1),
}


class Path(NamedTuple):
    """Running mean and variance after each batch, (BATCHES, features), and the noise predicted for both, (BATCHES,)."""

    mean: Any
    var: Any
    mean_noise: Any
    var_noise: Any


def stages(x: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any]:
    """Activations (N, C) as they come, normalised, and scaled and shifted."""
    return x, batch_norm(x)[0], batch_norm(x, gamma, beta)[0]


def hidden(seed: int, epochs: int = EPOCHS) -> tuple[Any, Any, Any]:
    """The stages of the hidden layer of a network trained on digits, its channels from small to large gamma."""
    x, y, _, _ = data.digits()
    model = nn.mlp(64, 10, hidden=(64,), seed=seed)
    optimizer = optim.AdamW(model.params(), 2e-2)
    batches = data.Batches(x.reshape(-1, 64), y, 32, seed=seed)
    train.fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=epochs, progress=False)
    z, (gamma, beta) = _before_norm(model, x)
    order = np.argsort(gamma)
    return stages(z[:, order], gamma[order], beta[order])


def _before_norm(model: nn.Sequential, x: Any) -> tuple[Any, Any]:
    """What reaches the first batch norm, and its gamma and beta."""
    for layer in model:
        if isinstance(layer, nn.BatchNorm):
            return x, layer.params().values()
        x = layer(x)
    return fail("model", "a batch norm", "none")


def follow(momentum: Any, seed: int, features: int = FEATURES) -> Path:
    """Running statistics over batches of 16 standard normal values per feature.

    The noise v of an average s <- (1 - a) s + a b obeys v <- sqrt((1 - a)^2 v^2 + a^2 sd(b)^2), where sd(b) is
    1 / sqrt(16) for a batch's mean and sqrt(2 / 15) for its unbiased variance; v is sqrt(a / (2 - a)) sd(b) in the end
    if a is constant.
    """
    rng = np.random.default_rng(seed)
    running = stats.RunningStats(features, momentum=momentum)
    path = Path(*(np.empty((BATCHES, n)) for n in (features, features)), *np.zeros((2, BATCHES)))
    noise = np.zeros(2)
    for i in range(BATCHES):
        a = momentum(i)
        batch_norm(rng.standard_normal((BATCH, features), np.float32), running=running)
        path.mean[i], path.var[i] = running.mean, running.var
        noise = np.hypot((1 - a) * noise, a * np.array([1 / np.sqrt(BATCH), np.sqrt(2 / (BATCH - 1))]))
        path.mean_noise[i], path.var_noise[i] = noise
    return path


def run(seed: int, quick: bool = False) -> Result:
    """Follow activations through one layer, and running statistics through 50 batches."""
    example = np.array(EXAMPLE).reshape(-1, 1)
    worked = stages(example, np.array([GAMMA]), np.array([BETA]))
    layer = hidden(seed, 2 if quick else EPOCHS)
    features = FEW if quick else FEATURES
    paths = {name: follow(momentum, seed, features) for name, momentum in MOMENTUM.items()}
    rows = [
        (statistic, name, float(predicted[-1]), float(values[-1].std()))
        for name, path in paths.items()
        for statistic, values, predicted in (
            ("running mean", path.mean, path.mean_noise),
            ("running variance", path.var, path.var_noise),
        )
    ]
    table = Table(("statistic", "momentum", "noise predicted", "noise measured"), rows)
    claims = (*_claims_on_activations(worked, layer, seed), *_claims_on_noise(rows, seed))
    return Result(table, claims, lambda figure: _paint(figure, worked, layer, paths), (14, 7.5))


def _claims_on_activations(worked: Sequence[Any], layer: Sequence[Any], seed: int) -> tuple[Claim, ...]:
    means = {weight: _running_mean((5.0, 6.0, 7.0), weight) for weight in (0.9, 0.1)}
    shares = [_running_mean((0.0,) * (2 - age) + (1.0,) + (0.0,) * age, 0.9) for age in range(3)]
    formula, program = schedule.linear(0.9, 0.1, BATCHES), MOMENTUM["0.9 falling to 0.1"]
    y = worked[2].ravel()
    before, after = (_skewness(values) for values in layer[:2])
    most = np.abs(after).argmax()
    return (
        Claim(
            GUIDE,
            "2, 4, 6, 8 with scale 2 and shift 1 become -1.68, 0.1, 1.9, 3.68",
            bool(np.allclose(y, (-1.68, 0.1, 1.9, 3.68), atol=0.01)),
            "exactly " + ", ".join(f"{v:.6f}" for v in y) + ": 0.1 and 1.9 are rounded early",
            "",
        ),
        Claim(
            GUIDE,
            "batch means 5, 6, 7 at weight 0.9 for the new one give 6.765",
            bool(np.isclose(means[0.9], 6.765)),
            f"{means[0.9]:.3f}; with 0.9 for the old one {means[0.1]:.3f}",
            "",
        ),
        Claim(
            GUIDE,
            "older batches count less and less in a running average: a (1 - a)^k",
            bool(np.allclose(shares, (0.9, 0.09, 0.009))),
            "at a = 0.9, newest first: " + ", ".join(f"{share:.3f}" for share in shares),
            "",
        ),
        Claim(
            GUIDE,
            f"the program of the falling momentum follows its formula, 0.9 to 0.1 over {BATCHES}",
            bool(np.allclose(program(np.arange(BATCHES)), formula(np.arange(BATCHES)))),
            f"at 25 the formula says {formula(25):g}, the program {program(25):g}: it arrives after 40",
            "",
        ),
        Claim(
            OWN,
            "batch norm keeps the shape of a distribution, and does not make it normal",
            bool(np.allclose(before, after, atol=1e-3) and np.abs(after).max() > 0.3),
            f"skewness (normal: 0) {before[most]:.3f} before, {after[most]:.3f} after",
            f"{seed}",
        ),
    )


def _claims_on_noise(rows: Sequence[Any], seed: int) -> tuple[Claim, ...]:
    predicted = {row[:2]: row[2] for row in rows}
    measured = {row[:2]: row[3] for row in rows}
    off = max(abs(measured[key] / predicted[key] - 1) for key in predicted)
    mean = {name: measured["running mean", name] for name in MOMENTUM}
    static, falling, slow = mean.values()
    theory = [np.sqrt(a / (2 - a) / BATCH) for a in (0.9, 0.1)]
    return (
        Claim(
            OWN,
            "the noise of a running mean is sqrt(a / (2 - a)) sigma / sqrt(batch)",
            bool(np.allclose((static, slow), theory, rtol=0.02)),
            f"at 0.9 {static:.4f} of {theory[0]:.4f}, at 0.1 {slow:.4f} of {theory[1]:.4f}",
            f"{seed}",
        ),
        Claim(
            GUIDE,
            "a falling momentum makes the late running statistics smoother than a static 0.9",
            bool(falling < static / 2),
            f"noise of the mean after {BATCHES} batches {falling:.4f} against {static:.4f}",
            f"{seed}",
        ),
        Claim(
            OWN,
            "the noise is predicted for a falling momentum and for the variance too",
            bool(off < 0.03),
            f"largest difference {off:.1%}",
            f"{seed}",
        ),
    )


def _running_mean(means: Sequence[float], weight: float) -> float:
    """What is left of these batch means, the newest last, with this weight of the new one."""
    running = stats.RunningStats(1, momentum=schedule.constant(weight), dtype="float64")
    for mean in means:
        running.update(np.array([mean]), np.ones(1), BATCH)
    return float(running.mean[0])


def _skewness(x: Any) -> Any:
    z = x.astype("float64") - x.mean(0, dtype="float64")
    return (z**3).mean(0) / (z**2).mean(0) ** 1.5


def _paint(figure: Any, worked: Sequence[Any], layer: Sequence[Any], paths: dict[str, Path]) -> None:
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(2, 4)
    _paint_example(figure.add_subplot(grid[0, 0]), worked)
    titles = ("five channels of a hidden layer: before", "the same, normalised", "scaled and shifted")
    panels = [figure.add_subplot(grid[0, 1 + column]) for column in range(3)]
    panels[2].sharex(panels[1])
    panels[2].sharey(panels[1])
    for axes, values, title in zip(panels, layer, titles, strict=True):
        _paint_densities(axes, values, title)
    for column, (statistic, name) in enumerate((s, n) for s in ("mean", "variance") for n in list(paths)[:2]):
        _paint_path(figure.add_subplot(grid[1, column]), paths[name], statistic, name)


def _paint_example(axes: Any, worked: Sequence[Any]) -> None:
    plot.style(axes, "2, 4, 6, 8, with scale 2 and shift 1")
    places, values = np.arange(3), np.hstack(worked)
    for line in values:
        axes.plot(places, line, color=plot.COLORS[0], linewidth=1.4, marker="o", markersize=4)
        for place, value in zip(places, line, strict=True):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.text(place + 0.08, value, f"{value:.4g}", fontsize=8, color=plot.INK, va="center", bbox=box)
    axes.set_xticks(places, ("before", "normalised", "scaled,\nshifted"))
    axes.set_xlim(-0.15, 2.45)


def _paint_densities(axes: Any, values: Any, title: str) -> None:
    plot.style(axes, title)
    chosen = np.linspace(0, values.shape[1] - 1, SHOWN).astype(int)
    values = values[:, chosen]
    low, high = values.min(), values.max()
    for color, channel in zip(plot.COLORS, values.T, strict=False):
        density, edges = np.histogram(channel, 40, (low, high), density=True)
        axes.stairs(density, edges, color=color, linewidth=1.4)
    axes.set_ylim(bottom=0)


def _paint_path(axes: Any, path: Path, statistic: str, name: str) -> None:
    values, noise, truth = (path.mean, path.mean_noise, 0) if statistic == "mean" else (path.var, path.var_noise, 1)
    plot.style(axes, f"running {statistic}: {name}", "batch")
    batches = np.arange(1, BATCHES + 1)
    axes.fill_between(batches, truth - 2 * noise, truth + 2 * noise, color=plot.GRID, linewidth=0)
    for color, line in zip(plot.COLORS, values.T[:SHOWN], strict=False):
        axes.plot(batches, line, color=color, linewidth=1.2)
    text = f"noise predicted {noise[-1]:.3f} (band: twice that)\nmeasured {values[-1].std():.3f}"
    axes.set_ylim(truth - 0.9, truth + 1.2)
    axes.text(0.98, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=plot.INK)
