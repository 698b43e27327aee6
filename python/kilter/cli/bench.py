"""`kilter bench`."""

from __future__ import annotations

import argparse
import json

from kilter._check import KilterError
from kilter.cli.parser import Commands

PARTS = ("norms", "optim", "init", "train")


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="measure speed",
        description="Measure kilter on this machine, beside its memory bandwidth; by default all parts.",
    )
    parser.add_argument("what", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file as well")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure the parts, and print them as they come."""
    for what in options.what:
        if what not in PARTS:
            raise KilterError(f"bench: expected {', '.join(PARTS)}, got {what!r}")
    from kilter import bench

    results = {what: bench.main(what) for what in options.what or PARTS}
    if options.json is not None:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    return 0
