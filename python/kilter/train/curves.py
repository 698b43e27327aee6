"""The picture of a run: loss, accuracy and learning rate over the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from kilter.train import plot
from kilter.train.plot import INK
from kilter.train.state import Row


def draw(file: IO[bytes], history: Sequence[Row], lr: tuple[Any, Any], *, title: str = "") -> None:
    """Write a PNG with three panels.

    Parameters
    ----------
    file
        Open for binary writing.
    history
        Rows of `fit`; may be empty.
    lr
        Epochs and the learning rates there.
    title
        Above the panels.
    """
    plot.draw(file, (12, 3.8), lambda figure: _panels(figure, history, lr), title=title)


def _panels(figure: Any, history: Sequence[Row], lr: tuple[Any, Any]) -> None:
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = len(history)
    _pair(loss, history, "loss", 1, "{:.3f}")
    _pair(accuracy, history, "accuracy", 100, "{:.1f} %")
    rate.plot(*lr, color=INK, linewidth=1.8, marker="o" if len(lr[0]) == 1 else None, markersize=4)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy, %"), (rate, "learning rate")):
        _style(axes, name, epochs)


def _pair(axes: Any, rows: Sequence[Row], key: str, unit: float, label: str) -> None:
    """Train and test curve, each named at its end."""
    ends: list[tuple[float, str, float, str]] = []
    settled: list[float] = []
    for column, name, color in ((key, "train", plot.COLORS[0]), (f"valid_{key}", "test", plot.COLORS[1])):
        points = [(row["epoch"] or 0, unit * value) for row in rows if (value := row[column]) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, linewidth=1.8, marker="o" if len(x) < 30 else None, markersize=3)
            ends.append((y[-1], f"{name} {label.format(y[-1])}", x[-1], color))
            settled.extend(y[1:] if len(y) > 9 else y)
    if not ends:
        return
    if key == "loss" and min(settled) > 0:
        plot.plain_log(axes)
    if key == "accuracy" and max(settled) > min(settled):
        room = 0.08 * (max(settled) - min(settled))  # the first epoch may lie far below: cut it off
        axes.set_ylim(min(settled) - room, max(settled) + room)
    for (_, text, x_end, color), height in zip(sorted(ends), _apart(axes, sorted(end[0] for end in ends)), strict=True):
        axes.annotate(
            text,
            (x_end, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=9,
            annotation_clip=False,
        )


def _apart(axes: Any, ends: Sequence[float]) -> list[float]:
    """Heights of the labels, rising: those of the curves, moved apart where they would overlap."""
    scale = axes.yaxis.get_transform()  # labels are moved on the screen, not in the units of the data
    low, high = scale.transform(axes.get_ylim())
    heights = [float(scale.transform(end)) for end in ends]
    if len(heights) == 2:
        gap = max(heights[1] - heights[0], 0.075 * (high - low))
        middle = sum(heights) / 2
        heights = [middle - gap / 2, middle + gap / 2]
    return [float(scale.inverted().transform(height)) for height in heights]


def _style(axes: Any, name: str, epochs: int) -> None:
    plot.style(axes, name, "epoch")
    plot.whole_steps(axes)
    if epochs:
        first = 0 if name == "learning rate" else min(1, epochs - 1)
        axes.set_xlim(first - 0.02 * (epochs - first), epochs + 0.02 * (epochs - first))
    else:
        axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no whole epoch", ha="center", va="center", color=INK, fontsize=9)
    if epochs and name == "learning rate":
        axes.set_ylim(bottom=0)
