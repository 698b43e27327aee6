"""`kilter train`: its options are the fields of `kilter.train.config.Config`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from kilter._check import KilterError
from kilter.cli.parser import Commands
from kilter.train.config import Config
from kilter.train.job import Job

OUT, RESUME = "out", "resume"


def add_to(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a network on images",
        description="Train a network on images and write a run folder: config.json, metrics.csv, curves.png, "
        "model.safetensors, and checkpoints. Without options: an MLP with batch norm on the embedded handwritten "
        "digits. Under mpiexec, the ranks train it together.",
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{_flag(field)}", dest=field.name, help=_help(field), **_value(field))
    stem = "runs/<data>-<model>-<norm>-<time>"
    parser.add_argument("--out", metavar="RUN_DIR", help=f"run folder (default {stem})")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue the run of a folder, with its own options")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, and print a summary."""
    given = {name: value for name, value in vars(options).items() if name not in ("run", "command", "comm")}
    job = _resumed(given, options.comm) if RESUME in given else _fresh(given, options.comm)
    try:
        job.run()
    except KeyboardInterrupt:
        done = f"interrupted after {len(job.history)} of {job.config.epochs} epochs"
        raise KeyboardInterrupt(
            f"{done}; the run so far is in {job.path}, and kilter train --resume {job.path} continues it"
        ) from None
    print(job.summary())
    return 0


def _fresh(given: dict[str, Any], comm: Any) -> Job:
    out = given.pop(OUT, None)
    return Job(Config(**given), out, comm=comm)


def _resumed(given: dict[str, Any], comm: Any) -> Job:
    folder = given.pop(RESUME)
    if given:
        flags = {field.name: _flag(field) for field in dataclasses.fields(Config)}
        others = ", ".join(f"--{flags.get(name, name)}" for name in given)
        raise KilterError(f"--resume: expected no other option, as the run has its own, got {others}")
    return Job.resumed(folder, comm=comm)


def _flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata["flag"] or field.name.replace("_", "-")


def _help(field: dataclasses.Field[Any]) -> str:
    default = field.metadata["shown"] or field.default
    shown = "" if field.default is False else f" (default {default})"
    return f"{field.metadata['what']}{shown}".replace("%", "%%")


def _value(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How argparse reads the value of an option."""
    if field.default is False:
        return {"action": "store_true"}
    known = field.metadata["known"]
    if known is not None:
        return {"choices": tuple(known)}
    return {"metavar": field.metadata["metavar"], "type": _reader(field.metadata["read"])}


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read`, with a message that says what was expected where it has no words of its own."""

    def value(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            wanted = {int: "a whole number", float: "a number"}.get(read)  # type: ignore[call-overload]
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}" if wanted else str(error)) from None

    return value
