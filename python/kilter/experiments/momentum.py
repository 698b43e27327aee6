"""Momentum where the loss is flat, where it is sharp, and where gradients bounce; nothing here is random.

The rule is the classical one: the change is velocity, velocity <- alpha velocity - lr gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kilter import optim
from kilter.experiments import panels
from kilter.experiments.report import NOTES, OWN, Claim, Result, Table
from kilter.train import plot

ALPHA, SUMS = 0.9, 50  # the usual momentum; steps of the sums
FLAT, EDGE, LOW, WIDE, DEEP = 0.05, 2.0, 2.6, 0.18, 0.9  # slope of region A; where B begins; place, width, depth of B
SKETCH_LR, SKETCH_STEPS = 0.02, 3000
VALLEY, START, VALLEY_LR, CLOSE = (1.0, 100.0), (-8.0, 1.0), 0.019, 1e-3  # curvatures along and across
RULES = {"plain": 0.0, f"momentum {ALPHA:g}": ALPHA}
COLORS = dict(zip(RULES, (plot.COLORS[1], plot.COLORS[0]), strict=True))


def run(seed: int, quick: bool = False) -> Result:
    """Follow both rules; `seed` and `quick` change nothing, as this takes no time."""
    del seed, quick
    constant, alternating = sums(np.ones(SUMS)), sums((-1.0) ** np.arange(SUMS))
    sketch = {rule: follow(_slope, [0.0], SKETCH_LR, alpha, SKETCH_STEPS)[:, 0] for rule, alpha in RULES.items()}
    valley = {rule: follow(_valley, START, VALLEY_LR, alpha, 1000) for rule, alpha in RULES.items()}
    limits = {rule: largest_rate(alpha) for rule, alpha in RULES.items()}
    arrived = {rule: int(np.argmax(path > EDGE)) for rule, path in sketch.items()}
    settled = {rule: _settled(path) for rule, path in valley.items()}
    across = {rule: float(np.abs(np.diff(path[:, 1])).sum()) for rule, path in valley.items()}
    rows = [
        (rule, arrived[rule], float(sketch[rule].max() - LOW), settled[rule], across[rule], limits[rule])
        for rule in RULES
    ]
    columns = (
        "rule",
        "steps out of region A",
        "furthest past the minimum of B",
        f"steps to {CLOSE:g} in the valley",
        "way across it",
        "largest lr times curvature",
    )
    claims = (*_claims_on_sums(constant, alternating), *_claims_on_paths(arrived, settled, across, limits))
    return Result(
        Table(columns, rows), claims, lambda figure: _paint(figure, sketch, valley, constant, alternating), (14, 8)
    )


def sums(gradients: Any) -> Any:
    """The change over lr, with its sign turned, after each of these gradients: sum of alpha^k G(t - k)."""
    w = np.zeros(1)
    optimizer = optim.SGD([w], 1.0, momentum=ALPHA)
    changes = []
    for g in gradients:
        before = w.copy()
        optimizer.step([np.array([g])])
        changes.append(float((before - w)[0]))
    return np.array(changes)


def follow(gradient: Callable[[Any], Any], start: Any, lr: float, alpha: float, steps: int) -> Any:
    """The path (steps + 1, n) of a point under SGD."""
    w = np.array(start, np.float64)
    optimizer = optim.SGD([w], lr, momentum=alpha)
    path = [w.copy()]
    for _ in range(steps):
        optimizer.step([gradient(w)])
        path.append(w.copy())
    return np.array(path)


def largest_rate(alpha: float) -> float:
    """The largest lr times curvature with which a parabola is not left, to 0.01."""
    curvatures = np.arange(0.5, 5.0, 0.01)
    with np.errstate(over="ignore", invalid="ignore"):
        ends = follow(lambda w: curvatures * w, np.ones(len(curvatures)), 1.0, alpha, 2000)[-1]
    return float(curvatures[np.abs(ends) < 1][-1])


def _loss(w: Any) -> Any:
    """A gentle slope (region A) with one sharp well in it (region B)."""
    return 1.15 - FLAT * w - DEEP * np.exp(-(((w - LOW) / WIDE) ** 2) / 2)


def _slope(w: Any) -> Any:
    """The gradient of `_loss`."""
    z = (w - LOW) / WIDE
    return -FLAT + DEEP / WIDE * z * np.exp(-(z**2) / 2)


def _valley(w: Any) -> Any:
    return np.array(VALLEY) * w


def _settled(path: Any) -> int:
    """The step from which on the point stays within CLOSE of the minimum."""
    outside = np.flatnonzero(np.linalg.norm(path, axis=1) > CLOSE)
    return int(outside[-1]) + 1


def _claims_on_sums(constant: Any, alternating: Any) -> tuple[Claim, ...]:
    last = SUMS - 1
    kernel = ALPHA ** np.arange(SUMS)
    gradients = np.cos(np.arange(SUMS))
    unrolled = np.array([kernel[: t + 1] @ gradients[t::-1] for t in range(SUMS)])
    off = float(np.abs(sums(gradients) - unrolled).max())
    printed = (last + 1) * ALPHA**last
    return (
        Claim(
            NOTES,
            "the recursion is a sum over all past gradients with weights alpha^k",
            off < 1e-12,
            f"largest difference over {SUMS} steps {off:.1g}",
            "",
        ),
        Claim(
            NOTES,
            "the sum for constant gradients as printed, with the exponent t in each term, is the change",
            bool(np.isclose(printed, constant[last], rtol=0.01)),
            f"that sum is {printed:.3f} after {SUMS} steps, the change {constant[last]:.3f}",
            "",
        ),
        Claim(
            NOTES,
            f"where gradients stay the same, momentum {ALPHA:g} makes steps up to 1 / (1 - alpha) times as long",
            bool(0.99 / (1 - ALPHA) < constant[last] < 1 / (1 - ALPHA)),
            f"{constant[last]:.3f} times after {SUMS} steps, limit {1 / (1 - ALPHA):g}",
            "",
        ),
        Claim(
            NOTES,
            "where gradients turn at every step, momentum makes steps shorter: by 1 / (1 + alpha)",
            bool(np.isclose(abs(alternating[last]), 1 / (1 + ALPHA), rtol=0.01)),
            f"{abs(alternating[last]):.4f} after {SUMS} steps, limit {1 / (1 + ALPHA):.4f}",
            "",
        ),
    )


def _claims_on_paths(
    arrived: dict[str, int], settled: dict[str, int], across: dict[str, float], limits: dict[str, float]
) -> tuple[Claim, ...]:
    (plain, fast), (slow, soon) = (tuple(some.values()) for some in (arrived, settled))
    (rough, calm), (low, high) = (tuple(some.values()) for some in (across, limits))
    place = f"curvatures {VALLEY[0]:g} and {VALLEY[1]:g}, lr {VALLEY_LR:g}"
    return (
        Claim(
            NOTES,
            "momentum leaves a region of low curvature sooner",
            fast < plain / 2,
            f"{fast} steps, without {plain}: {plain / fast:.1f} times",
            "",
        ),
        Claim(
            NOTES,
            "momentum calms the bouncing across a narrow valley: a shorter way from side to side",
            calm < rough,
            f"{place}: {calm:.1f} in all, without {rough:.1f}",
            "",
        ),
        Claim(
            NOTES,
            "momentum arrives sooner at the lowest point of a narrow valley",
            soon < slow,
            f"{place}: within {CLOSE:g} after {soon} steps, without {slow}",
            "",
        ),
        Claim(
            OWN,
            "momentum raises the largest stable learning rate to 1 + alpha times",
            bool(np.isclose(high / low, 1 + ALPHA, rtol=0.01)),
            f"lr times curvature {high:.2f}, without {low:.2f}",
            "",
        ),
    )


def _paint(figure: Any, sketch: Any, valley: Any, constant: Any, alternating: Any) -> None:
    grid = panels.grid(figure, 2, 2, width_ratios=(3, 2))
    _paint_sketch(grid[0, 0], sketch)
    _paint_valley(grid[1, 0], valley)
    for axes, values, limit, title in (
        (grid[0, 1], constant, 1 / (1 - ALPHA), "length of a step over lr: the gradient stays 1"),
        (grid[1, 1], np.abs(alternating), 1 / (1 + ALPHA), "the gradient is 1 and -1 in turn"),
    ):
        plot.style(axes, title, "step")
        axes.plot(1 + np.arange(SUMS), values, color=plot.COLORS[0], linewidth=1.8, label="momentum 0.9")
        axes.plot(1 + np.arange(SUMS), np.ones(SUMS), color=plot.COLORS[1], linewidth=1.8, label="plain")
        axes.axhline(limit, color=plot.INK, linewidth=1, linestyle=":", label=f"{limit:.4g}")
        axes.set_ylim(bottom=0)
        panels.legend(axes)


def _paint_sketch(axes: Any, sketch: Any) -> None:
    """The loss with its two regions, and where each rule stands after equal numbers of steps."""
    w = np.linspace(-0.2, 3.2, 800)
    plot.style(axes, f"region A is flat, region B sharp: a point every 50 steps, lr {SKETCH_LR:g}", "weight")
    axes.plot(w, _loss(w), color=plot.INK, linewidth=1.6)
    axes.axvspan(w[0], EDGE, color=plot.COLORS[0], alpha=0.07, linewidth=0)
    axes.axvspan(EDGE, w[-1], color=plot.COLORS[1], alpha=0.09, linewidth=0)
    for rule, shift in zip(RULES, (0.04, 0.10), strict=True):
        at = sketch[rule][:2501:50]
        axes.plot(at, _loss(at) + shift, "o", color=COLORS[rule], markersize=4.5, label=rule)
    for place, name in ((EDGE / 2, "A"), (w[-1] - 0.2, "B")):
        axes.text(place, 0.2, name, fontsize=13, color=plot.INK, ha="center")
    axes.set_xlim(w[0], w[-1])
    axes.set_ylim(0, 1.4)
    panels.legend(axes, "lower left")


def _paint_valley(axes: Any, valley: Any) -> None:
    plot.style(axes, f"a valley {VALLEY[1]:g} times as steep across as along: 40 steps, lr {VALLEY_LR:g}", "along")
    x, y = np.meshgrid(np.linspace(-8.6, 5.5, 200), np.linspace(-1.7, 1.7, 200))
    axes.contour(
        x, y, (VALLEY[0] * x**2 + VALLEY[1] * y**2) / 2, np.geomspace(0.5, 150, 8), colors=plot.QUIET, linewidths=0.8
    )
    for rule, path in valley.items():
        axes.plot(*path[:41].T, color=COLORS[rule], linewidth=1.4, marker="o", markersize=3, label=rule)
    axes.plot(0, 0, "+", color=plot.INK, markersize=10)
    panels.legend(axes, "lower right")
