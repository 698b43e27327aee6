"""16-bit training: with float32 masters it is float32 training, without them it stalls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kilter import nn
from kilter._check import dtype_of
from kilter.data import Batches, Dataset
from kilter.experiments.compare import spread
from kilter.experiments.report import TRICKS, Claim, Result, Table, seeds
from kilter.experiments.task import images
from kilter.optim import SGD, Adam, LossScaler
from kilter.schedule import cosine
from kilter.train import Callback, State, fit, plot

BATCH = 128
LR = 2e-4  # of Adam: small steps are what 16-bit weights lose
SCALE = 1024.0


class Size(NamedTuple):
    """Seeds, images, epochs, hidden layers."""

    seeds: int
    images: int
    epochs: int
    hidden: tuple[int, ...]


FULL, QUICK = Size(4, 40_000, 5, (128,)), Size(2, 1300, 3, (8,))


class Variant(NamedTuple):
    """How weights, activations and gradients are kept, and drawn."""

    dtype: str
    masters: bool
    scaler: bool
    color: str
    line: str
    width: float


BLUE, RED, GREEN = plot.COLORS[:3]
VARIANTS = {
    "float32": Variant("float32", True, False, plot.QUIET, "-", 8),
    "bfloat16, masters": Variant("bfloat16", True, False, BLUE, "-", 4.5),
    "float16, masters, scaler": Variant("float16", True, True, RED, "-", 2.5),
    "float16, masters": Variant("float16", True, False, GREEN, "-", 1),
    "bfloat16 alone": Variant("bfloat16", False, False, BLUE, "--", 1.8),
    "float16 alone, scaler": Variant("float16", False, True, RED, "--", 1.8),
}


class Run(NamedTuple):
    """One training run: by epoch the training loss; test accuracy; shares of elements of the first weight matrix."""

    losses: list[float]
    accuracy: float
    moved: float  # changed by a step
    empty: float  # gradient exactly zero


class Probe(Callback):
    """Looks at the first weight matrix every 20 steps."""

    def __init__(self) -> None:
        self.moved: list[float] = []
        self.empty: list[float] = []
        self._before: Any = None

    def on_step(self, state: State) -> None:
        """Keep the weights, or compare them with those of the step before."""
        if state.step % 20 > 1:
            return
        weight, grad = (next(a for a in d.values() if a.ndim == 2) for d in (state.model.params(), state.model.grads()))
        if state.step % 20 == 0:
            self._before = weight.copy()
        elif self._before is not None:
            self.moved.append(float(np.mean(weight != self._before)))
            self.empty.append(float(np.mean(grad == 0)))


def run(seed: int, quick: bool = False) -> Result:
    """Train the same network in every precision, each with several seeds."""
    size = QUICK if quick else FULL
    _, data = images(size.images)
    runs = {name: _runs(variant, data, size, seed) for name, variant in VARIANTS.items()}
    columns = ("weights", "test accuracy %", "spread", "training loss", "weights moved %", "zero gradients %")
    rows = []
    for name, some in runs.items():
        accuracy = [100 * one.accuracy for one in some]
        means = [
            float(np.mean(values)) for values in zip(*((r.losses[-1], r.moved, r.empty) for r in some), strict=True)
        ]
        rows.append((name, float(np.mean(accuracy)), spread(accuracy), means[0], 100 * means[1], 100 * means[2]))
    claims = (_loop_claim(loop()), *_claims(runs, seeds(seed, size.seeds)))
    return Result(Table(columns, rows), claims, lambda figure: _paint(figure, runs), (16, 4.6))


class Loop(NamedTuple):
    """One number on its way through a step of mixed precision."""

    master: float
    copy: float
    lost: float  # the gradient in float16, were the loss not scaled
    scaled: float
    unscaled: float
    after: float


def loop() -> Loop:
    """A weight of 0.1 with the gradient 2^-25, by SGD at a rate of 1."""
    w, gradient = np.array([0.1], np.float16), 2.0**-25
    optimizer = SGD([w], 1.0)
    before = float(_master(optimizer))
    copy, scaled = float(w[0]), np.array([gradient * SCALE], np.float16)
    optimizer.step([scaled], scaler=LossScaler(SCALE))
    after = float(_master(optimizer))
    return Loop(before, copy, float(np.float16(gradient)), float(scaled[0]), float(scaled[0]) / SCALE, after)


def _master(optimizer: SGD) -> Any:
    return next(a for name, a in optimizer.state_dict().items() if "master" in name)[0]


def _runs(variant: Variant, data: Dataset, size: Size, seed: int) -> list[Run]:
    dtype = dtype_of("dtype", variant.dtype)
    data = data._replace(x_train=data.x_train.astype(dtype), x_test=data.x_test.astype(dtype))
    return [_train(variant, data, size, seed + i) for i in range(size.seeds)]


def _train(variant: Variant, data: Dataset, size: Size, seed: int) -> Run:
    model = nn.mlp(data.x_train.shape[1], 10, hidden=size.hidden, seed=seed, dtype=variant.dtype)
    batches = Batches(data.x_train, data.y_train, BATCH, seed=seed, drop_last=True)
    lr = cosine(LR, size.epochs * len(batches))
    optimizer = Adam(model.params(), lr, master_dtype="auto" if variant.masters else None)
    probe = Probe()
    history = fit(
        model,
        optimizer,
        nn.softmax_cross_entropy,
        batches,
        epochs=size.epochs,
        valid=(data.x_test, data.y_test),
        scaler=LossScaler(SCALE) if variant.scaler else None,
        callbacks=[probe],
        progress=False,
    )
    losses = [float(row["loss"] or 0.0) for row in history]
    accuracy = float(history[-1]["valid_accuracy"] or 0.0)
    return Run(losses, accuracy, float(np.mean(probe.moved)), float(np.mean(probe.empty)))


def _loop_claim(found: Loop) -> Claim:
    moved = found.master - found.after
    return Claim(
        TRICKS,
        "a tiny gradient has to be inflated by the loss, and a float32 master keeps what it changes",
        found.lost == 0 and bool(np.isclose(found.unscaled, 2.0**-25) and 0 < moved < 2e-7),
        f"2^-25 is {found.lost:g} in float16 and {found.scaled:.3g} times {SCALE:g}; the master moves by {moved:.2g}, "
        f"the float16 copy stays {found.copy:.5f}",
        "",
    )


def _claims(runs: dict[str, list[Run]], drawn: str) -> tuple[Claim, ...]:
    exact = [100 * one.accuracy for one in runs["float32"]]
    noise = spread(exact)
    claims = []
    for name in ("bfloat16, masters", "float16, masters, scaler"):
        gap = float(np.mean([100 * one.accuracy for one in runs[name]]) - np.mean(exact))
        numbers = f"{np.mean(exact) + gap:.2f} % and {np.mean(exact):.2f} %, spread of float32 {noise:.2f}"
        text = f"{name}: reaches the accuracy of float32 within the spread over seeds"
        claims.append(Claim(TRICKS, text, abs(gap) <= noise, numbers, drawn))
    for name, whole in (("bfloat16 alone", "bfloat16, masters"), ("float16 alone, scaler", "float16, masters, scaler")):
        ends, best = ([one.losses[-1] for one in runs[key]] for key in (name, whole))
        share = np.mean([one.moved for one in runs[name]])
        numbers = f"loss {np.mean(ends):.3f}, with masters {np.mean(best):.3f}; a step moves {share:.0%} of the weights"
        text = f"{name}: the risk to accuracy: it stalls above the loss that masters reach"
        claims.append(Claim(TRICKS, text, min(ends) > max(best), numbers, drawn))
    with_scaler, without = (
        np.mean([one.empty for one in runs[name]]) for name in ("float16, masters, scaler", "float16, masters")
    )
    numbers = f"zero are {without:.2%} without, {with_scaler:.2%} with a scale of {SCALE:g}"
    text = "float16 gradients that round to zero come back with a loss scale"
    claims.append(Claim(TRICKS, text, bool(with_scaler < without), numbers, drawn))
    return tuple(claims)


def _paint(figure: Any, runs: dict[str, list[Run]]) -> None:
    circle, loss, moved = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    _paint_loop(circle, loop())
    plot.style(loss, f"training loss, mean of {len(next(iter(runs.values())))} seeds", "epoch")
    for name, some in runs.items():
        variant = VARIANTS[name]
        mean = np.mean([one.losses for one in some], axis=0)
        epochs = np.arange(1, len(mean) + 1)
        loss.plot(epochs, mean, variant.line, color=variant.color, linewidth=variant.width, label=name)
    plot.plain_log(loss)
    plot.whole_steps(loss)
    loss.legend(frameon=False, fontsize=8, labelcolor=plot.INK)
    plot.style(moved, "share of the weights that a step moves, %")
    names = list(runs)[::-1]
    shares = [100 * float(np.mean([one.moved for one in runs[name]])) for name in names]
    moved.barh(names, shares, color=[VARIANTS[name].color for name in names], height=0.55)
    for place, share in enumerate(shares):
        moved.text(share + 1, place, f"{share:.0f}", va="center", fontsize=8, color=plot.INK)
    moved.set_xlim(0, 110)
    moved.grid(visible=False, axis="y")


def _paint_loop(axes: Any, found: Loop) -> None:
    """The loop of mixed precision, clockwise from the master, with the numbers of one weight."""
    axes.set_title("mixed precision: one step of one weight", loc="left", fontsize=10, color=plot.INK)
    axes.set_axis_off()
    boxes = (
        ("float32 master", f"{found.master:.8f}", BLUE),
        ("float16 copy", f"{found.copy:.8f}", RED),
        (f"forward; loss x {SCALE:g}", "float16", RED),
        ("float16 gradient", f"{found.scaled:.4g}  (unscaled: {found.lost:g})", RED),
        (f"float32 gradient, / {SCALE:g}", f"{found.unscaled:.4g}", BLUE),
        ("new master", f"{found.after:.8f}", BLUE),
    )
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(boxes)) / len(boxes)
    places = np.stack([1.25 * np.cos(angles), np.sin(angles)], axis=1)
    for (name, number, color), (x, y) in zip(boxes, places, strict=True):
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color, "linewidth": 1.4}
        axes.text(x, y, f"{name}\n{number}", ha="center", va="center", fontsize=8, color=plot.INK, bbox=box, zorder=3)
    for (x, y), (to_x, to_y) in zip(places, np.roll(places, -1, axis=0), strict=True):
        axes.annotate(
            "",
            (x + 0.62 * (to_x - x), y + 0.62 * (to_y - y)),
            (x, y),
            zorder=1,
            arrowprops={"arrowstyle": "-|>", "color": plot.QUIET, "linewidth": 1.6},
        )
        axes.plot([x, to_x], [y, to_y], color=plot.QUIET, linewidth=1.6, zorder=0)
    axes.set_xlim(-2.0, 2.0)
    axes.set_ylim(-1.3, 1.3)
