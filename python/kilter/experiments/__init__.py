"""Experiments: claims about training, each checked by a program with its table and its figure.

`kilter experiment NAME` runs one of `NAMES`, `kilter experiment all` runs them all and sums their claims up. Each
writes a folder: table.csv, figure.png and claims.csv, and prints the table and whether each claim held.

The claims are those of five texts on faster training (an essay on batch norm, a survey that compares initial weights, a
guide to batch norm over devices, notes on optimizers, seven tricks), as these make them, and some of kilter's own. A
claim about chance is checked over several seeds, with a 95 % interval (`compare`): one of forty that say "more" or
"less" without a reason would hold.

An experiment is a module of this package with the name it has in `NAMES`. It has one public function,

    def run(seed: int, quick: bool = False) -> Result

which computes everything (a minute or two on two cores), prints nothing and writes nothing. `seed` is the first seed;
an experiment that takes several uses seed, seed + 1, ... and says so in its claims (`report.seeds`). With `quick` it
takes a second, to see that it works: sizes are so small that its verdicts mean nothing. A `Result` (of
`kilter.experiments.report`) has a table (column names, and rows of strings, numbers and None), claims (the text, what
it claims, whether it held, the numbers that say so, the seeds, "" where nothing is random), a function that paints a
matplotlib figure, and its size. `kilter.train.plot` and `panels` have colours and axes, `task` a real task. To add an
experiment, write the module and add a line to `NAMES`.
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
    "pipeline": "batch norm step by step, its gradients, its place, and its relatives",
    "batchnorm": "batch norm against none, and how smooth the loss is along its gradient",
    "inference": "small batches, and the gap between training and inference",
    "sync": "batch norm over several devices, synchronised and not",
    "weights": "initial weights: Xavier, He and PyTorch's, uniform and normal",
    "momentum": "momentum on flat ground, in a narrow valley, and bouncing",
    "schedules": "every schedule in one figure",
    "optimizers": "every update rule on one task",
    "preconditioning": "gradient descent and the diagonal Newton where directions differ in scale",
    "precision": "16-bit weights with and without float32 masters",
    "parallel": "data over several ranks, large batches, linear scaling and warm-up",
    "softlabels": "label smoothing in both forms, and mixup",
    "transfer": "a trained network on new classes: frozen, fine-tuned, or from scratch",
    "tricks": "seven tricks one by one and together: accuracy and seconds to a target",
}


def run(names: Sequence[str], out: str | os.PathLike[str], seed: int = 0, *, quick: bool = False) -> None:
    """Run experiments, write their folders into `out`, and print what came out.

    With more than one, `out`/claims.csv collects their claims, and a summary of them is printed at the end.

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
    if quick:
        print("a quick run: its verdicts mean nothing\n")
    for name in names:
        print(f"{name}: {NAMES[name]}", flush=True)
        start = time.perf_counter()
        result = importlib.import_module(f"kilter.experiments.{name}").run(seed, quick)
        folder = Path(out, name)
        report.write(folder, result)
        print(report.text(result.table), report.verdicts(result.claims), sep="\n\n")
        print(f"\n{time.perf_counter() - start:.1f} s; {folder}: {', '.join(report.FILES)}\n", flush=True)
        claims += [(name, claim) for claim in result.claims]
    if len(names) > 1:
        rows = [(name, *claim) for name, claim in claims]
        report.write_csv(Path(out, report.CLAIMS), report.Table(("experiment", *report.Claim._fields), rows))
        held = sum(claim.held for _, claim in claims)
        print(report.summary([claim for _, claim in claims]))
        print(f"\n{held} of {len(claims)} claims held; {Path(out, report.CLAIMS)}")
