"""Every schedule in one figure: small multiples over the same 100 steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter import schedule
from kilter.experiments.report import NOTES, TRICKS, Claim, Result, Table
from kilter.train import plot

STEPS = np.arange(101)
FINE = np.linspace(0, 100, 2001)  # for the figure, where jumps shall be steep
COLUMNS = 5


def curves() -> dict[str, Any]:
    """One of each schedule; a pair is (lr, momentum) of one cycle."""
    s = schedule
    smooth, three = s.one_cycle(1.0, 101), s.one_cycle(1.0, 101, anneal="linear", three_phase=True)
    return {
        "constant": s.constant(1.0),
        "step": s.step(1.0, 25, 0.5),
        "multistep": s.multistep(1.0, (30, 60, 90), 0.3),
        "exponential": s.exponential(1.0, 0.97),
        "linear": s.linear(1.0, 0.1, 80),
        "polynomial": s.polynomial(1.0, 0.0, 100, 3.0),
        "cosine": s.cosine(1.0, 100),
        "cosine_restarts": s.cosine_restarts(1.0, 14, 2, end=0.05),
        "inverse_sqrt": s.inverse_sqrt(1.0, 10),
        "hold_linear_hold": s.hold_linear_hold(1.0, 0.01, 100),
        "sawtooth": s.sawtooth(1.0, 0.1, 20),
        "piecewise": s.piecewise(((0, 0.2), (20, 1.0), (50, 0.6), (50, 0.3), (100, 0.0))),
        "triangular": s.triangular(0.1, 1.0, 10),
        "triangular2": s.triangular(0.1, 1.0, 10, mode="triangular2"),
        "exp_range": s.triangular(0.1, 1.0, 10, mode="exp_range", gamma=0.98),
        "one_cycle": smooth,
        "one_cycle, three phases": three,
        "warmup": s.warmup(s.cosine(1.0, 80), 20),
        "join": s.join((s.linear(0.0, 1.0, 20), 20), (s.constant(1.0), 60), (s.exponential(1.0, 0.93), 100)),
    }


def plateau(steps: Any) -> tuple[Any, Any]:
    """A loss that falls in three stages, and the value of a Plateau that follows it."""
    loss = 0.25 + 0.75 * np.exp(-steps / 12) - 0.12 * np.clip(steps - 45, 0, 10) / 10
    follower, values = schedule.Plateau(1.0, 0.4, patience=5, threshold=0.01), []
    for metric in loss:
        values.append(follower(0))
        follower.update(metric)
    return np.array(values), loss


def run(seed: int, quick: bool = False) -> Result:
    """Draw all schedules and check what is said of them; `seed` and `quick` change nothing, as nothing is random."""
    del seed, quick
    values = {name: _at(curve, STEPS) for name, curve in curves().items()}
    lines = {name: _at(curve, FINE) for name, curve in curves().items()}
    follower, loss = plateau(STEPS)
    values["Plateau"], lines["Plateau"] = (follower, None), (follower[FINE.astype(int)], None)
    columns = ("schedule", "at 0", "at 25", "at 50", "at 75", "at 100", "lowest")
    rows = [(name, *(float(x) for x in (*v[:101:25], v.min()))) for name, (v, _) in values.items()]
    lr = {name: v for name, (v, _) in values.items()}
    claims = _claims(lr, values["one_cycle"][1])
    return Result(Table(columns, rows), claims, lambda figure: _paint(figure, lines, loss), (14, 9))


def _at(curve: Any, steps: Any) -> tuple[Any, Any]:
    """The values at the steps, and those of momentum where there are some."""
    if isinstance(curve, schedule.OneCycle):
        return curve.lr(steps), curve.momentum(steps)
    return curve(steps), None


def _phases(epochs: int) -> tuple[int, int, int]:
    """How long hold_linear_hold stays, falls, and stays."""
    value = schedule.hold_linear_hold(1.0, 0.01, epochs)(np.arange(epochs + 1))
    first, last = int(np.flatnonzero(value == 1)[-1]), int(np.flatnonzero(value == value[-1])[0])
    return first, last - first, epochs - last


def _claims(lr: dict[str, Any], momentum: Any) -> tuple[Claim, ...]:
    saw, peak, cycle, low = lr["sawtooth"], lr["triangular2"], lr["one_cycle"], int(np.argmin(momentum))
    each, every = schedule.exponential(1.0, 0.5)(STEPS[1:]), schedule.step(1.0, 25, 0.5)(STEPS[1:])
    rise, phases = np.diff(lr["warmup"]), {epochs: _phases(epochs) for epochs in (3, 7, 33, 100)}
    return (
        Claim(
            NOTES,
            "a sawtooth falls to its end in each cycle",
            bool(saw.min() <= 0.1),
            f"lowest {saw.min():.3f} of 1 to 0.1 every 20 steps: it starts again one step before",
            "",
        ),
        Claim(
            NOTES,
            "the piecewise-linear schedule stays, falls and stays for 20, 60 and 20 % of the epochs, of any number",
            all(np.allclose(parts, (0.2 * n, 0.6 * n, 0.2 * n)) for n, parts in phases.items()),
            "cut to whole epochs: " + ", ".join(f"{n} are {' + '.join(map(str, p))}" for n, p in phases.items()),
            "",
        ),
        Claim(
            TRICKS,
            "one cycle moves momentum against the learning rate",
            bool(np.argmax(cycle) == low and (np.diff(cycle) * np.diff(momentum) <= 0).all()),
            f"highest rate at step {np.argmax(cycle)}, lowest momentum at step {low}",
            "",
        ),
        Claim(
            TRICKS,
            "the bound of triangular2 halves its distance with each cycle",
            bool(np.allclose(peak[10:100:20] - 0.1, 0.9 * 0.5 ** np.arange(5))),
            "peaks " + " ".join(f"{p:.3f}" for p in peak[10:100:20]),
            "",
        ),
        Claim(
            NOTES,
            "a factor at every few steps is gamma^t",
            bool(np.allclose(each, every)),
            f"factor 0.5, every 25 steps: {every[-1]:g} at step 100; every step: {each[-1]:.1g}",
            "",
        ),
        Claim(
            TRICKS,
            "warm-up rises, and the decay follows",
            bool((rise[:20] > 0).all() and (rise[20:] < 0).all()),
            f"from {lr['warmup'][0]:g} to {lr['warmup'].max():g} at step {np.argmax(lr['warmup'])}",
            "",
        ),
    )


def _paint(figure: Any, lines: dict[str, tuple[Any, Any]], loss: Any) -> None:
    panels = figure.subplots(-(-len(lines) // COLUMNS), COLUMNS, sharex=True, sharey=True)
    blue, red = plot.COLORS[:2]
    for axes, (name, (value, momentum)) in zip(panels.flat, lines.items(), strict=False):
        plot.style(axes, name)
        jumps = np.append(np.abs(np.diff(value)) > 0.01, False)  # gaps
        axes.plot(FINE, np.where(jumps, np.nan, value), color=blue, linewidth=1.8)
        if momentum is not None:
            axes.plot(FINE, momentum, color=red, linewidth=1.4)
            axes.text(99, 0.78, "momentum", color=red, fontsize=8, ha="right", va="top")
        if name == "Plateau":
            axes.plot(STEPS, loss, color=plot.QUIET, linewidth=1.4)
            axes.text(22, 0.45, "the metric", color="#7f7f7f", fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=9, color=plot.INK)
    for axes in panels.flat[len(lines) :]:
        axes.set_visible(False)
    panels.flat[0].set(xlim=(-1, 101), ylim=(-0.02, 1.06))
