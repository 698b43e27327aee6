"""The command `kilter`: train, experiment, info, bench."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from kilter._check import KilterError

INTERRUPTED = 130  # as a shell reports SIGINT
USAGE_ERROR = 2
BENCHES = ("norms", "optim", "init", "train")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise KilterError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 when it worked, 2 after a mistake of the user or the file system (one line on stderr), 130 after Ctrl-C.
    """
    try:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except KilterError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # the reader left; nothing more can be said to it, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except MemoryError as error:
        return _fail(f"out of memory: {error}")
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _fail(message: str, status: int = USAGE_ERROR) -> int:
    print("kilter:", " ".join(message.split()), file=sys.stderr)
    return status


def _train(options: argparse.Namespace) -> int:
    from kilter.train.job import Config, Job

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports on its font cache
    given = {name: value for name, value in vars(options).items() if name not in ("run", "out", "command")}
    job = Job(Config(**{name: value for name, value in given.items() if value is not None}), options.out)
    try:
        job.run()
    except KeyboardInterrupt:
        done = f"interrupted after {len(job.history)} of {job.config.epochs} epochs"
        return _fail(f"{done}; the run so far is in {job.folder.path}", INTERRUPTED)
    print(job.summary())
    return 0


def _experiment(options: argparse.Namespace) -> int:
    from kilter import experiments

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports on its font cache
    names = tuple(experiments.NAMES) if options.name == "all" else (options.name,)
    experiments.run(names, options.out, options.seed)
    return 0


def _info(options: argparse.Namespace) -> int:
    import platform
    from importlib import metadata

    import numpy as np

    import kilter
    from kilter import _kilter

    rows = [
        ("kilter", kilter.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("numpy", f"{np.__version__}, BLAS {_blas()}"),
        ("CPU level", f"{_kilter.simd_level()} (KILTER_SIMD={os.environ.get('KILTER_SIMD', 'not set')})"),
        (
            "threads",
            f"{_kilter.num_threads()} (KILTER_NUM_THREADS={os.environ.get('KILTER_NUM_THREADS', 'not set')})",
        ),
    ]
    for package in ("ml_dtypes", "safetensors", "matplotlib", "tqdm", "torch"):
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    for name, value in rows:
        print(f"{name:<12} {value}")
    return 0


def _blas() -> str:
    import numpy as np

    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _bench(options: argparse.Namespace) -> int:
    for what in options.what:
        if what not in BENCHES:
            raise KilterError(f"bench: expected {', '.join(BENCHES)}, got {what!r}")
    from kilter import bench

    results = {what: bench.main(what) for what in options.what or BENCHES}
    if options.json is not None:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.replace("-", ",").split(",") if part)
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes such as 256,128, got {text!r}")
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kilter", description="Training for NumPy code: train, experiment, info, bench.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a network on images",
        description="Train a network on images and write a run folder: config.json, metrics.csv, curves.png, "
        "model.safetensors. Without options: an MLP with batch norm on the embedded handwritten digits.",
    )
    _train_options(train)
    experiment = commands.add_parser(
        "experiment",
        help="check claims about training",
        description="Run an experiment, or all of them, and write its table, its figure and its claims into a folder.",
    )
    _experiment_options(experiment)
    info = commands.add_parser("info", help="show versions, CPU level, threads and optional packages")
    info.set_defaults(run=_info)
    bench = commands.add_parser(
        "bench",
        help="measure speed",
        description="Measure kilter on this machine, beside its memory bandwidth; by default all parts.",
    )
    bench.add_argument("what", nargs="*", metavar="PART", help=", ".join(BENCHES))
    bench.add_argument("--json", metavar="FILE", help="write the numbers to a file as well")
    bench.set_defaults(run=_bench)
    return parser


def _experiment_options(parser: argparse.ArgumentParser) -> None:
    from kilter.experiments import NAMES

    known = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
    parser.add_argument("name", choices=(*NAMES, "all"), metavar="NAME", help=f"{known}; or all")
    out = "runs/experiments"
    parser.add_argument("--out", default=out, metavar="DIR", help=f"where each gets a folder (default {out})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (default 0)")
    parser.set_defaults(run=_experiment)


def _train_options(parser: argparse.ArgumentParser) -> None:
    from kilter.nn.models import NORMS
    from kilter.train.choices import OPTIMIZERS, SCHEDULES
    from kilter.train.job import MODELS, SETS, Config

    def add(flag: str, what: str, default: object = None, **more: Any) -> None:
        text = what if default is None else f"{what} (default {default})"
        parser.add_argument(flag, help=text.replace("%", "%%"), **more)

    rates = ", ".join(f"{name} {choice.lr:g}" for name, choice in OPTIMIZERS.items())
    sizes, epochs = (
        "; ".join(f"{name} {value}" for name, value in values)
        for values in (
            [(name, ",".join(map(str, hidden))) for name, (_, hidden) in SETS.items()],
            [(name, count) for name, (count, _) in SETS.items()],
        )
    )
    files = "or an .npz file with x_train, y_train, x_test, y_test"
    add("--data", f"{', '.join(SETS)}, {files}", Config.data, metavar="DATA")
    add("--model", "kind of network", Config.model, choices=MODELS)
    add("--hidden", "sizes of the hidden layers, such as 256,128", sizes, type=_sizes, metavar="SIZES")
    add("--norm", "normalisation of the hidden layers", Config.norm, choices=NORMS)
    add("--dropout", "probability of dropout after each hidden layer", Config.dropout, type=float, metavar="P")
    add("--optimizer", "update rule; sgd and nesterov have momentum 0.9", Config.optimizer, choices=tuple(OPTIMIZERS))
    add("--lr", "peak learning rate", rates, type=float, metavar="LR")
    add("--weight-decay", "weight decay", Config.weight_decay, type=float, metavar="W")
    add("--schedule", "of the learning rate; one_cycle moves momentum too", Config.schedule, choices=tuple(SCHEDULES))
    add(
        "--warmup",
        "let the learning rate rise from 0 at first",
        "1, one_cycle 0",
        type=float,
        metavar="EPOCHS",
    )
    add("--batch-size", "samples per step", Config.batch_size, type=int, metavar="N")
    add("--epochs", "how often to go through the data", epochs, type=int, metavar="N")
    add("--label-smoothing", "part of each label to spread over all classes", 0, type=float, metavar="EPS")
    add("--seed", "of weights, order of the data and dropout", Config.seed, type=int, metavar="N")
    add("--out", "run folder", "runs/<data>-<model>-<norm>-<time>", metavar="RUN_DIR")
    parser.set_defaults(run=_train)
