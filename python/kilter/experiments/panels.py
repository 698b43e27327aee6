"""What the panels of several experiments share: a grid, bands over seeds, strips of dots, legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kilter.train import plot


def grid(figure: Any, rows: int, columns: int, **more: Any) -> Any:
    """Panels with room between them, always a (rows, columns) array."""
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.02, hspace=0.03)
    return figure.subplots(rows, columns, squeeze=False, **more)


def band(axes: Any, x: Any, values: Any, color: str, label: str, line: str = "-") -> None:
    """The mean of values (seeds, n) as a line, and one standard deviation over the seeds to both sides."""
    values = np.asarray(values, np.float64)
    mean, sd = values.mean(axis=0), values.std(axis=0)
    axes.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)
    axes.plot(x, mean, line, color=color, linewidth=1.8, label=label)


def strips(axes: Any, groups: Mapping[str, Sequence[float]], colors: Sequence[str], form: str = "{:.1f}") -> None:
    """A row per group, the first on top: a dot per seed, a bar at the mean, and its value; none for an empty group."""
    names = list(groups)
    for place, (name, color) in enumerate(zip(names[::-1], list(colors)[::-1], strict=True)):
        values = np.asarray(groups[name], np.float64)
        if not values.size:
            continue
        axes.plot(values, np.full(values.shape, place), "o", color=color, markersize=4, alpha=0.45, markeredgewidth=0)
        axes.plot([values.mean()] * 2, [place - 0.28, place + 0.28], color=color, linewidth=2.4)
        text = form.format(values.mean())
        axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), fontsize=8, color=plot.INK, va="center")
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(visible=False, axis="y")


def legend(axes: Any, place: str = "best", **more: Any) -> None:
    """A legend without a frame."""
    axes.legend(loc=place, frameon=False, fontsize=8, labelcolor=plot.INK, **more)


def ticks(axes: Any, places: Sequence[float], names: Sequence[str] | None = None) -> None:
    """A logarithmic x axis (base 2) that names these places alone."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places] if names is None else names)
    axes.xaxis.set_minor_locator(NullLocator())
