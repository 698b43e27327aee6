"""What an experiment hands over, and how it is written and summed up: tables, claims, figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kilter.train import plot
from kilter.train.checkpoint import replacing

__all__ = [
    "ESSAY",
    "FILES",
    "GUIDE",
    "NOTES",
    "OWN",
    "SURVEY",
    "TRICKS",
    "Claim",
    "Result",
    "Table",
    "seeds",
    "summary",
    "text",
    "verdicts",
    "write",
    "write_csv",
]

FILES = TABLE, FIGURE, CLAIMS = "table.csv", "figure.png", "claims.csv"

# The texts whose claims are checked, and kilter's own.
ESSAY = "essay on batch norm"
SURVEY = "survey with initial weights"
GUIDE = "guide to batch norm"
NOTES = "notes on optimizers"
TRICKS = "seven tricks"
OWN = "kilter"


class Table(NamedTuple):
    """Column names and rows of as many cells: strings, numbers, or None for what does not apply."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


class Claim(NamedTuple):
    """Who says a sentence that can fail, whether it held here, the numbers that say so, the seeds they come from."""

    text: str
    claim: str
    held: bool
    numbers: str
    seeds: str


class Result(NamedTuple):
    """What `run` of an experiment returns; `paint` fills a matplotlib figure of `size` inches."""

    table: Table
    claims: tuple[Claim, ...]
    paint: Callable[[Any], None]
    size: tuple[float, float]


def seeds(first: int, count: int) -> str:
    """The seeds in words."""
    return f"{first}" if count == 1 else f"{first} to {first + count - 1}"


def write(folder: Path, result: Result) -> None:
    """Write the table, the figure and the claims into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / TABLE, result.table)
    write_csv(folder / CLAIMS, Table(Claim._fields, result.claims))
    with replacing(folder / FIGURE) as file:
        plot.draw(file, result.size, result.paint)


def write_csv(path: Path, table: Table) -> None:
    """Write a table as CSV; None is an empty cell."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([table.columns, *table.rows])
    with replacing(path) as file:
        file.write(lines.getvalue().encode())


def text(table: Table) -> str:
    """The table for a person: four digits of each number, columns aligned."""
    cells = [[_cell(value) for value in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *cells, strict=True)]
    numeric = [any(isinstance(row[i], (int, float)) for row in table.rows) for i in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        aligned = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in aligned).rstrip()

    return "\n".join([line(table.columns), *map(line, cells)])


def verdicts(claims: Sequence[Claim]) -> str:
    """A line per claim: whether it held, the claim, its numbers."""
    lines = []
    for claim in claims:
        word = "seeds" if " " in claim.seeds else "seed"
        drawn = f"; {word} {claim.seeds}" if claim.seeds else ""
        lines.append(f"{'held    ' if claim.held else 'NOT held'}  {claim.claim} ({claim.numbers}{drawn})")
    return "\n".join(lines)


def summary(claims: Sequence[Claim]) -> str:
    """The verdicts of many experiments under the text that makes the claim, with how many held."""
    parts = []
    for name in (ESSAY, SURVEY, GUIDE, NOTES, TRICKS, OWN):
        found = [claim for claim in claims if claim.text == name]
        if found:
            held = sum(claim.held for claim in found)
            parts.append(f"{name}: {held} of {len(found)} held here\n{verdicts(found)}")
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
