"""What all pictures share: a canvas without a window, colours, and quiet axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

from kilter.train._extra import extra

INK, GRID, QUIET = "#333333", "#e3e3e3", "#b9b9b9"
COLORS = ("#3b6fb6", "#d1495b", "#2a9d76", "#b8860b", "#7a5195", "#8c564b")


def draw(file: IO[bytes], size: tuple[float, float], paint: Callable[[Any], None], *, title: str = "") -> None:
    """Write a PNG.

    Parameters
    ----------
    file
        Open for binary writing.
    size
        Width and height in inches, of 120 points each.
    paint
        Fills the figure it is given.
    title
        Above the panels.

    Raises
    ------
    KilterError
        matplotlib is not installed.
    """
    extra("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        plain = title.encode("ascii", "backslashreplace").decode()  # what every font has
        figure.suptitle(plain, fontsize=12, color=INK, parse_math=False)
    paint(figure)
    figure.savefig(file, format="png")


def style(axes: Any, title: str, xlabel: str = "") -> None:
    """Give a panel its title, a light grid and no frame."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    if xlabel:
        axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def plain_log(axes: Any) -> None:
    """Make the y axis logarithmic, its ticks plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def whole_steps(axes: Any, most: int = 6) -> None:
    """Put the ticks of the x axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=most))
