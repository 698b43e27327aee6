"""The command `kilter`: train, experiment, info, bench."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from kilter._check import KilterError
from kilter.cli import bench, experiment, info, train
from kilter.cli.parser import Parser
from kilter.dist import from_environment, together

INTERRUPTED = 130  # as a shell reports SIGINT
USAGE_ERROR = 2
BENCHES = bench.PARTS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 when it worked, 2 after a mistake of the user or the file system (one line on stderr), 130 after Ctrl-C. Under
    mpiexec, all ranks run it, and one speaks.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports on its font cache
    try:
        comm = from_environment()
        with together(comm, quiet=True), warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *place, **more: say(str(message))
            options = _parser().parse_args(argv)
            options.comm = comm
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except KilterError as error:
        return _fail(str(error))
    except BrokenPipeError:
        _mute()  # the reader left
        return 1
    except OSError as error:
        _mute()
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except MemoryError as error:
        return _fail(f"out of memory: {error}")
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted", INTERRUPTED)


def say(message: str) -> None:
    """Print one line on stderr."""
    print("kilter:", " ".join(message.split()), file=sys.stderr)


def _fail(message: str, status: int = USAGE_ERROR) -> int:
    say(message)
    return status


def _mute() -> None:
    """Let nothing more be written to stdout, not even at exit, if it takes nothing any more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kilter", description="Training for NumPy code: train, experiment, info, bench.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in (train, experiment, info, bench):
        command.add_to(commands)
    return parser
