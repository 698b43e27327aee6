"""Soft labels: label smoothing in both forms and of every strength, and mixup.

A network without norm learns few images for many epochs, so that it could learn them by heart.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kilter import nn, optim
from kilter.data import Batches, Dataset, mixup
from kilter.experiments import panels
from kilter.experiments.compare import difference, mean_and_spread
from kilter.experiments.report import OWN, TRICKS, Claim, Result, Table, seeds
from kilter.experiments.task import Curve, Watch, images
from kilter.train import Callback, fit, plot

HIDDEN, LR, BATCH, CLASSES = (128, 128), 1e-3, 64, 10
FORMS = {"uniform": plot.COLORS[0], "rest": plot.COLORS[1]}
USUAL, ALPHA = 0.1, 0.2
POINT = 1.0  # of test accuracy: more counts as a loss


class Size(NamedTuple):
    """Seeds, images, epochs, strengths of smoothing and of mixup (beside none)."""

    seeds: int
    images: int
    epochs: int
    smoothing: tuple[float, ...]
    mixing: tuple[float, ...]


FULL = Size(5, 2000, 12, (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0), (0.1, 0.2, 0.5, 1.0))
QUICK = Size(2, 200, 2, (0.1, 0.9, 1.0), (0.2,))


class Run(NamedTuple):
    """The curve on test images, and the mean of the largest probability that the network gives at the end."""

    curve: Curve
    confidence: float

    @property
    def accuracy(self) -> float:
        """At the end, %."""
        return float(100 * self.curve.accuracy[-1])


def run(seed: int, quick: bool = False) -> Result:
    """Train with every strength of every form, and compute the targets themselves."""
    size = QUICK if quick else FULL
    name, found = images(size.images)
    hard = [_train(found, size, seed + i) for i in range(size.seeds)]
    smooth = {
        (form, eps): [_train(found, size, seed + i, form=form, eps=eps) for i in range(size.seeds)]
        for form in FORMS
        for eps in size.smoothing
    }
    mixed = {alpha: [_train(found, size, seed + i, alpha=alpha) for i in range(size.seeds)] for alpha in size.mixing}
    named = {("hard labels", ""): hard}
    named |= {(f"smoothing, {form}", f"{eps:g}"): some for (form, eps), some in smooth.items()}
    named |= {("mixup", f"{alpha:g}"): some for alpha, some in mixed.items()}
    table = []
    for (labels, strength), some in named.items():
        accuracy = [one.accuracy for one in some]
        entropy = None if labels == "mixup" else _entropy(*_target(labels.split()[-1], float(strength or 0)))
        confidence = float(np.mean([one.confidence for one in some]))
        table.append((labels, strength, entropy, float(np.mean(accuracy)), float(np.std(accuracy, ddof=1)), confidence))
    columns = ("labels", "strength", "entropy of a target", "test accuracy %", "spread", "confidence")
    drawn = seeds(seed, size.seeds)
    claims = (
        *_claims_on_targets(),
        _claim_on_mixing(seed),
        *_claims_on_training(hard, smooth, mixed, drawn),
    )
    return Result(
        Table(columns, table), claims, lambda figure: _paint(figure, hard, smooth, mixed, size, name), (15, 8)
    )


class Certainty(Callback):
    """The mean of the largest probability on some images, in the end."""

    def __init__(self, x: Any) -> None:
        self.x, self.mean = x, 0.0

    def on_end(self, state: Any) -> None:
        """Ask the model."""
        z = state.model.eval()(self.x).astype(np.float64)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        self.mean = float((1 / p.sum(axis=1)).mean())


def _train(
    found: Dataset, size: Size, seed: int, *, form: str = "uniform", eps: float = 0.0, alpha: float | None = None
) -> Run:
    model = nn.mlp(found.x_train.shape[1], CLASSES, hidden=HIDDEN, norm="none", seed=seed)
    mixing = None if alpha is None else partial(mixup, alpha=alpha, classes=CLASSES)
    batches = Batches(found.x_train, found.y_train, BATCH, seed=seed, transform=mixing)
    watch = Watch(found.x_test, found.y_test, every=max(size.epochs * len(batches) // 24, 1))
    certainty = Certainty(found.x_test)
    fit(
        model,
        optim.Adam(model.params(), LR),
        partial(nn.softmax_cross_entropy, label_smoothing=eps, smooth_others=form),
        batches,
        epochs=size.epochs,
        callbacks=[watch, certainty],
        progress=False,
    )
    return Run(watch.curve(), certainty.mean)


def _target(form: str, eps: float, classes: int = CLASSES) -> tuple[float, float]:
    """The probability of the true class and of each other one, read off the gradient of the loss at even logits."""
    z = np.zeros((1, classes))
    _, dlogits = nn.softmax_cross_entropy(
        z, np.zeros(1, np.int64), label_smoothing=eps, smooth_others=form if form in FORMS else "uniform"
    )
    q = 1 / classes - dlogits[0]
    return float(q[0]), float(q[1])


def _entropy(on: float, off: float, classes: int = CLASSES) -> float:
    q = np.array([on] + [off] * (classes - 1))
    q = q[q > 1e-12]
    return float(abs((q * np.log(q)).sum()))


def _claims_on_targets() -> list[Claim]:
    (uniform, others), (rest, left) = (_target(form, USUAL, 4) for form in FORMS)
    scaled = _target("uniform", USUAL * 4 / 3, 4)
    fine = np.linspace(0, 1, 101)
    entropy = {form: np.array([_entropy(*_target(form, eps)) for eps in fine]) for form in FORMS}
    rising = {form: bool((np.diff(values) > 0).all()) for form, values in entropy.items()}
    even = fine[entropy["rest"].argmax()]
    on, off = _target("rest", 1.0)
    return [
        Claim(
            TRICKS,
            "giving eps to the other labels and mixing with the uniform distribution are the same",
            bool(np.isclose(uniform, rest)),
            f"4 classes, eps {USUAL:g}: {rest:.4f} and {left:.4f} against {uniform:.4f} and {others:.4f}",
            "",
        ),
        Claim(
            OWN,
            "the two forms differ by a factor of eps alone: K / (K - 1)",
            bool(np.allclose(scaled, (rest, left))),
            f"uniform with eps {USUAL * 4 / 3:.4f} gives {scaled[0]:.4f} and {scaled[1]:.4f}",
            "",
        ),
        Claim(
            TRICKS,
            "the larger eps, the flatter the labels: mixing with the uniform distribution",
            rising["uniform"],
            f"entropy rises from {entropy['uniform'][0]:.2f} to {entropy['uniform'][-1]:.3f} (ln 10)",
            "",
        ),
        Claim(
            TRICKS,
            "the larger eps, the flatter the labels: giving eps to the others",
            rising["rest"],
            f"flat at eps {even:g}; beyond, the true label is the least likely: {on:.2g} and {off:.3f} at 1",
            "",
        ),
    ]


def _claim_on_mixing(seed: int) -> Claim:
    """The weight that mixup took for a label is the one it took for the input."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((200, 30)), np.arange(200)
    mixed, targets = mixup(x, y, 1.0, classes=200, seed=seed)
    off = float(np.abs(mixed - targets @ x).max())
    total = float(np.abs(targets.sum(axis=1) - 1).max())
    pairs = int((targets > 0).sum(axis=1).max())
    return Claim(
        TRICKS,
        "mixup mixes pairs, and the labels by the weight of the inputs",
        off < 1e-6 and total < 1e-6 and pairs == 2,
        f"inputs made again from the mixed labels are off by {off:.1g}; labels sum to 1 within {total:.1g}",
        f"{seed}",
    )


def _claims_on_training(hard: list[Run], smooth: Any, mixed: Any, drawn: str) -> list[Claim]:
    base = [one.accuracy for one in hard]
    claims = []
    others = [(f"label smoothing ({form}, {USUAL:g})", smooth[form, USUAL]) for form in FORMS]
    for what, some in (*others, (f"mixup ({ALPHA:g})", mixed[ALPHA])):
        accuracy = [one.accuracy for one in some]
        gap = difference(accuracy, base)
        numbers = f"{mean_and_spread(accuracy)} %, hard labels {mean_and_spread(base)} %, {gap}"
        claims.append(Claim(TRICKS, f"{what} raises the test accuracy", gap.above, numbers, drawn))
    target = 0.95 * float(np.mean(base)) / 100
    steps = {
        what: [(one.curve.reached(target) or (np.inf, 0.0))[0] for one in some]
        for what, some in (("hard", hard), ("soft", smooth["uniform", USUAL]))
    }
    reached = bool(np.isfinite(steps["hard"] + steps["soft"]).all())
    faster = difference(steps["soft"], steps["hard"]) if reached else None
    claims.append(
        Claim(
            TRICKS,
            f"a network learns faster from soft targets: fewer steps to {100 * target:.1f} %",
            faster is not None and faster.below,
            f"{np.mean(steps['soft']):.0f} and {np.mean(steps['hard']):.0f} steps" + (f", {faster}" if faster else ""),
            drawn,
        )
    )
    wild = {form: [one.accuracy for one in smooth[form, 0.9]] for form in FORMS}
    end = [one.accuracy for one in smooth["rest", 1.0]]
    loss = {form: difference(values, base) for form, values in wild.items()}
    numbers = "; ".join(f"{form} {mean_and_spread(wild[form])} %" for form in FORMS)
    numbers += f"; hard labels {mean_and_spread(base)} %; at 1 {np.mean(end):.1f} % where the others share all"
    text = "too large an eps harms: at 0.9 more than a point of test accuracy is lost, in both forms"
    lost = all(gap.mean + gap.half < -POINT for gap in loss.values())
    claims.append(Claim(TRICKS, text, lost, numbers, drawn))
    sure = [np.mean([one.confidence for one in some]) for some in (hard, smooth["uniform", USUAL])]
    text = "smoothed labels make a network less sure of itself"
    claims.append(
        Claim(OWN, text, bool(sure[1] < sure[0]), f"mean confidence {sure[1]:.3f}, hard {sure[0]:.3f}", drawn)
    )
    return claims


def _paint(figure: Any, hard: list[Run], smooth: Any, mixed: Any, size: Size, name: str) -> None:
    grid = panels.grid(figure, 2, 2)
    plot.style(grid[0, 0], "entropy of a target, 10 classes", "eps")
    fine = np.linspace(0, 1, 101)
    for form, color in FORMS.items():
        grid[0, 0].plot(fine, [_entropy(*_target(form, e)) for e in fine], color=color, linewidth=1.8, label=form)
    grid[0, 0].axhline(np.log(10), color=plot.QUIET, linewidth=1, linestyle=":", label="ln 10")
    at = (0.0, *size.smoothing)
    for axes, title, value in (
        (grid[0, 1], f"{name}: test accuracy, %", "accuracy"),
        (grid[1, 0], "confidence of the network on test images", "confidence"),
    ):
        plot.style(axes, title, "eps")
        for form, color in FORMS.items():
            columns = [hard, *(smooth[form, eps] for eps in size.smoothing)]
            panels.band(axes, at, np.array([[getattr(one, value) for one in some] for some in columns]).T, color, form)
    grid[0, 1].set_ylim(np.mean([one.accuracy for one in hard]) - 4, None)  # beyond, it falls to chance
    plot.style(grid[1, 1], f"{name}: test accuracy, %", "step")
    shown = {"hard labels": hard, f"smoothing {USUAL:g}": smooth["uniform", USUAL]}
    shown |= {f"mixup {alpha:g}": mixed[alpha] for alpha in (ALPHA, size.mixing[-1])}
    for color, (label, some) in zip(plot.COLORS, shown.items(), strict=False):
        panels.band(grid[1, 1], some[0].curve.steps, [100 * one.curve.accuracy for one in some], color, label)
    low = min(float(np.percentile(100 * one.curve.accuracy, 15)) for some in shown.values() for one in some)
    grid[1, 1].set_ylim(bottom=low)
    for axes in grid.flat:
        panels.legend(axes, "lower right" if axes is grid[1, 1] else "best")
