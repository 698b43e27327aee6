"""Experiments: claims about training, each checked by a program with its table and its figure.

`kilter experiment NAME` runs one of `NAMES`, `kilter experiment all` runs them all and collects their claims. Each
writes a folder: table.csv, figure.png and claims.csv, and prints the table and whether each claim held.

An experiment is a module of this package with the name it has in `NAMES`. It has one public function,

    def run(seed: int) -> Result

which computes everything (a minute or two on two cores), prints nothing and writes nothing. `seed` is the first seed;
an experiment that takes several uses seed, seed + 1, ... and says so in its claims (`report.seeds`). A `Result` (of
`kilter.experiments.report`) has a table (column names, and rows of strings, numbers and None), claims (what was
claimed, whether it held, the numbers that say so, the seeds, "" where nothing is random), a function that paints a
matplotlib figure, and its size. `kilter.train.plot` has the colours and the style of axes, `kilter.experiments.task` a
real task. To add an experiment, write the module and add a line to `NAMES`.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from kilter._check import fail, seed_and_stream
from kilter.experiments import report
from kilter.train._extra import extra

__all__ = ["NAMES", "run"]

NAMES = {
    "norms": "what batch norm does to activations, and how steady its running statistics are",
    "schedules": "every schedule in one figure",
    "optimizers": "every update rule on one task",
    "precision": "16-bit weights with and without float32 masters",
}


def run(names: Sequence[str], out: str | os.PathLike[str], seed: int = 0) -> None:
    """Run experiments, write their folders into `out`, and print what came out.

    With more than one, `out`/claims.csv collects their claims.

    Raises
    ------
    KilterError
        A name is unknown, the seed is out of range, or matplotlib is not installed; nothing has been run then.
    """
    for name in names:
        if name not in NAMES:
            fail("experiment", ", ".join(NAMES), repr(name))
    seed, _ = seed_and_stream(seed, 0)
    extra("matplotlib")
    claims = []
    for name in names:
        print(f"{name}: {NAMES[name]}", flush=True)
        start = time.perf_counter()
        result = importlib.import_module(f"kilter.experiments.{name}").run(seed)
        folder = Path(out, name)
        report.write(folder, result)
        print(report.text(result.table), report.verdicts(result.claims), sep="\n\n")
        print(f"\n{time.perf_counter() - start:.1f} s; {folder}: {', '.join(report.FILES)}\n", flush=True)
        claims += [(name, *claim) for claim in result.claims]
    if len(names) > 1:
        held = sum(claim[2] for claim in claims)
        table = report.Table(("experiment", *report.Claim._fields), claims)
        report.write_csv(Path(out, "claims.csv"), table)
        print(f"{held} of {len(claims)} claims held; {Path(out, 'claims.csv')}")
