"""`kilter experiment`."""

from __future__ import annotations

import argparse

from kilter.cli.parser import Commands
from kilter.experiments import NAMES


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "experiment",
        help="check claims about training",
        description="Run an experiment, or all of them, and write its table, its figure and its claims into a folder.",
    )
    known = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
    parser.add_argument("name", choices=(*NAMES, "all"), metavar="NAME", help=f"{known}; or all")
    out = "runs/experiments"
    parser.add_argument("--out", default=out, metavar="DIR", help=f"where each gets a folder (default {out})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (default 0)")
    parser.add_argument(
        "--quick", action="store_true", help="a second for each, to see that all works; the verdicts then mean nothing"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the experiments, and print their claims."""
    from kilter import experiments

    names = tuple(experiments.NAMES) if options.name == "all" else (options.name,)
    experiments.run(names, options.out, options.seed, quick=options.quick)
    return 0
