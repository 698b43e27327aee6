"""Gradient descent and the diagonal Newton method where directions differ in scale.

First quadratics of growing condition number, with axes along the coordinates and turned by 45 degrees. Then a network
on digits whose pixels were scaled by factors from 0.01 to 1: the same task, badly conditioned. Each rule has the best
learning rate of a grid, chosen with the first seed by its final training loss; the numbers come from the seeds after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kilter import data, nn, optim
from kilter.data import Batches, Dataset
from kilter.experiments import panels
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import OWN, SURVEY, Claim, Result, Table, seeds
from kilter.experiments.task import rows
from kilter.train import plot

CONDITIONS = (1.0, 10.0, 100.0, 1e3, 1e4)
NEAR, MOST = 1e-6, 200_000  # the norm that is to be reached, and steps at most
HIDDEN, BATCH, CURVATURE = (64,), 64, 10  # the network; steps between two estimates of the curvature
GRID = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # times the rate that stands with each rule
SCALES = {"pixels as they are": 0.0, "pixels scaled by 0.01 to 1": -2.0}  # the lowest power of ten
WINDOW = 20  # steps over which the loss is averaged
PROBES, ESTIMATES = (1, 2, 5, 10, 20, 50, 100), 20  # of `hutchinson`


class Rule(NamedTuple):
    """An optimizer, the middle of its grid, and its color."""

    make: Callable[..., Any]
    lr: float
    color: str


RULES = {
    "gradient descent": Rule(optim.SGD, 0.5, plot.COLORS[1]),
    "diagonal Newton": Rule(
        lambda params, lr: optim.DiagonalNewton(params, lr, damping=1e-4, clip=0.1), 0.05, plot.COLORS[0]
    ),
    "Adam": Rule(optim.Adam, 0.02, plot.COLORS[2]),
}


class Size(NamedTuple):
    """Seeds after the first, images, steps, largest condition number."""

    seeds: int
    images: int
    steps: int
    condition: float


FULL, QUICK = Size(5, 1437, 300, 1e4), Size(2, 200, 25, 100.0)


def run(seed: int, quick: bool = False) -> Result:
    """Count steps on quadratics, and train the network with every rule at both scales."""
    size = QUICK if quick else FULL
    conditions = [kappa for kappa in CONDITIONS if kappa <= size.condition]
    steps = {
        (axes, rule): [count(kappa, rule, turned=axes == "turned") for kappa in conditions]
        for axes in ("along the axes", "turned")
        for rule in ("gradient descent", "diagonal Newton")
    }
    found = rows(data.digits(), size.images)
    best = {(scale, rule): _best(found, scale, rule, size, seed) for scale in SCALES for rule in RULES}
    table: list[tuple[Any, ...]] = [
        (f"quadratic {axes}, condition {kappa:g}", rule, n, None, None)
        for (axes, rule), counts in steps.items()
        for kappa, n in zip(conditions, counts, strict=True)
    ]
    table += [
        (scale, rule, None, lr, float(np.mean([losses[-1] for losses in runs])))
        for (scale, rule), (lr, runs) in best.items()
    ]
    columns = ("task", "rule", f"steps to {NEAR:g}", "lr", "training loss")
    errors = _hutchinson(seed)
    claims = (
        *_claims_on_quadratics(steps, conditions),
        _storage(),
        *_claims_on_network(best, seeds(seed + 1, size.seeds)),
        _claim_on_hutchinson(errors, seeds(seed, ESTIMATES)),
    )
    return Result(
        Table(columns, table), claims, lambda figure: _paint(figure, steps, conditions, best, errors), (15, 8)
    )


def count(kappa: float, rule: str, *, turned: bool = False) -> int | None:
    """Steps from (1, 1) to a norm of 1e-6 on a quadratic of this condition number; None if it takes too many.

    Gradient descent has its best constant rate, 2 / (kappa + 1). The diagonal Newton has the exact diagonal of the
    Hessian; turned, where the diagonal is (kappa + 1) / 2 throughout, it is gradient descent.
    """
    h = np.diag([kappa, 1.0])
    if turned:
        q = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
        h = q @ h @ q.T
    w = np.ones(2)
    if turned:
        w = q @ w
    newton = rule == "diagonal Newton"
    optimizer: Any = optim.DiagonalNewton([w], damping=0.0) if newton else optim.SGD([w], 2 / (kappa + 1))
    more = {"curvature": [np.diag(h).copy()]} if newton else {}
    while np.linalg.norm(w) > NEAR:
        if optimizer.calls == MOST:
            return None
        optimizer.step([h @ w], **more)
    return int(optimizer.calls)


def _best(found: Dataset, scale: str, rule: str, size: Size, seed: int) -> tuple[float, list[Any]]:
    """The best rate of the grid, and the averaged losses of the runs with it."""
    rates = [RULES[rule].lr * factor for factor in GRID]
    ends = [_train(found, scale, rule, rate, size, seed)[-1] for rate in rates]
    lr = rates[int(np.argmin(np.nan_to_num(ends, nan=np.inf)))]
    return lr, [_train(found, scale, rule, lr, size, seed + 1 + i) for i in range(size.seeds)]


def _train(found: Dataset, scale: str, rule: str, lr: float, size: Size, seed: int) -> Any:
    """The training loss of each step, averaged over a window."""
    factors = 10 ** np.random.default_rng(seed).uniform(SCALES[scale], 0, found.x_train.shape[1])
    x_train = (found.x_train * factors).astype("float32")
    model = nn.mlp(x_train.shape[1], 10, hidden=HIDDEN, norm="none", seed=seed).reuse_buffers()
    optimizer = RULES[rule].make(model.params(), lr)
    batches = Batches(x_train, found.y_train, BATCH, seed=seed, drop_last=True)
    losses: list[float] = []
    with np.errstate(over="ignore", invalid="ignore"):  # too large a rate of the grid may diverge
        while len(losses) < size.steps:
            for x, y in batches.epoch(len(losses) // len(batches)):
                more = {}
                if rule == "diagonal Newton" and len(losses) % CURVATURE == 0:
                    more["curvature"] = optim.gauss_newton_bartlett(model, x, seed=len(losses))
                loss, dlogits = nn.softmax_cross_entropy(model(x), y)
                model.backward(dlogits, need_dx=False)
                optimizer.step(model.grads(), **more)
                losses.append(loss)
    return np.convolve(losses[: size.steps], np.full(WINDOW, 1 / WINDOW), "valid")


def _hutchinson(seed: int) -> Any:
    """The relative error of the estimated diagonal of a positive matrix, by the number of probes, over 20 estimates."""
    a = np.random.default_rng(seed).standard_normal((50, 50))
    h = a @ a.T / 50 + np.eye(50)
    like, truth = [np.zeros(50)], np.diag(h)

    def error(probes: int) -> float:
        estimates = [
            optim.hutchinson(lambda v: [h @ v[0]], like, seed=seed + i, probes=probes)[0] for i in range(ESTIMATES)
        ]
        return float(np.sqrt(np.mean(np.square(np.array(estimates) - truth).sum(1)) / (truth @ truth)))

    return np.array([error(probes) for probes in PROBES])


def _claims_on_quadratics(steps: dict[tuple[str, str], list[int | None]], conditions: list[float]) -> list[Claim]:
    plain, newton = steps["along the axes", "gradient descent"], steps["along the axes", "diagonal Newton"]
    turned = steps["turned", "diagonal Newton"]
    shown = ", ".join(f"{n or np.nan:,.0f}" for n in plain)
    growth = (plain[-1] or np.inf) / (plain[-2] or 1)
    return [
        Claim(
            SURVEY,
            "the condition number says how hard a problem is for gradient descent",
            bool(8 < growth < 12),
            f"steps at conditions {', '.join(f'{k:g}' for k in conditions)}: {shown}, with the best rate",
            "",
        ),
        Claim(
            SURVEY,
            "a preconditioner of 1 over the diagonal of the Hessian takes the difficulty away",
            newton == [1] * len(newton),
            f"{newton[-1]} step at every condition number, axes along the coordinates",
            "",
        ),
        Claim(
            OWN,
            "the diagonal is of no use where the axes are turned by 45 degrees",
            bool((turned[-1] or MOST) >= 0.9 * (plain[-1] or MOST)),
            f"{turned[-1] or MOST:,} steps at {conditions[-1]:g}, gradient descent {plain[-1] or MOST:,}",
            "",
        ),
    ]


def _storage() -> Claim:
    model = nn.mlp(784, 10, hidden=(128,), norm="none")
    d = sum(p.size for p in model.params().values())
    return Claim(
        SURVEY,
        "a full preconditioner has d² entries: too many for a network; a diagonal one has d",
        d * d * 4 > 2**34,
        f"d = {d:,}: {d * d * 4 / 1e9:,.0f} GB against {d * 4 / 1e6:.1f} MB",
        "",
    )


def _claims_on_network(best: dict[tuple[str, str], tuple[float, list[Any]]], drawn: str) -> list[Claim]:
    ends = {key: [float(losses[-1]) for losses in runs] for key, (_, runs) in best.items()}
    even, uneven = SCALES
    gap = difference(ends[uneven, "diagonal Newton"], ends[uneven, "gradient descent"])
    claims = [
        Claim(
            SURVEY,
            "the diagonal Newton with estimated curvature trains a badly scaled network faster",
            gap.below,
            f"training loss {mean_and_spread(ends[uneven, 'diagonal Newton'])}, gradient descent "
            f"{mean_and_spread(ends[uneven, 'gradient descent'])}, {gap}",
            drawn,
        ),
    ]
    loss = {rule: (np.mean(ends[even, rule]), np.mean(ends[uneven, rule])) for rule in RULES}
    ratio = {rule: float(b / a) for rule, (a, b) in loss.items()}
    text = ", ".join(f"{rule} {a:.3f} to {b:.3f}" for rule, (a, b) in loss.items())
    return [
        *claims,
        Claim(
            OWN,
            "bad scaling costs gradient descent more than the diagonal Newton and Adam",
            ratio["gradient descent"] > max(ratio["diagonal Newton"], ratio["Adam"]),
            f"training loss {text}",
            drawn,
        ),
    ]


def _claim_on_hutchinson(errors: Any, drawn: str) -> Claim:
    slope = float(np.polyfit(np.log(PROBES), np.log(errors), 1)[0])
    return Claim(
        OWN,
        "random signs estimate the diagonal with an error that falls as 1 / sqrt(probes)",
        abs(slope + 0.5) < 0.15,
        f"error {errors[0]:.2f} with 1 probe, {errors[-1]:.3f} with {PROBES[-1]}: exponent {slope:.2f}",
        drawn,
    )


def _paint(figure: Any, steps: Any, conditions: list[float], best: Any, errors: Any) -> None:
    grid = panels.grid(figure, 2, 2)
    plot.style(grid[0, 0], f"quadratics: steps to {NEAR:g}", "condition number")
    lines = {
        ("along the axes", "gradient descent"): (plot.COLORS[1], "-", 4),
        ("along the axes", "diagonal Newton"): (plot.COLORS[0], "-", 1.8),
        ("turned", "diagonal Newton"): (plot.COLORS[0], "--", 1.8),
    }
    for (axes, rule), (color, line, width) in lines.items():
        counts = [n or np.nan for n in steps[axes, rule]]
        grid[0, 0].loglog(conditions, counts, line, color=color, linewidth=width, label=f"{rule}, {axes}")
    plot.style(grid[1, 0], "diagonal from products with random signs: relative error", "probes")
    grid[1, 0].loglog(PROBES, errors, color=plot.COLORS[0], linewidth=1.8, marker="o", markersize=4, label="measured")
    fall = errors[0] / np.sqrt(PROBES)
    grid[1, 0].loglog(PROBES, fall, ":", color=plot.INK, label="that of 1 probe / sqrt(probes)")
    plot.plain_log(grid[1, 0])
    for axes in grid[:, 0]:
        panels.legend(axes, handlelength=3)
        axes.minorticks_off()
    for axes, scale in zip(grid[:, 1], SCALES, strict=True):
        plot.style(axes, f"digits, {scale}: training loss", "step")
        for name, kind in RULES.items():
            lr, runs = best[scale, name]
            at = WINDOW + np.arange(len(runs[0]))
            panels.band(axes, at, runs, kind.color, f"{name}, lr {lr:.3g}")
        plot.plain_log(axes)
        panels.legend(axes)
