"""`kilter info`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from kilter.cli.parser import Commands


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("info", help="show versions, CPU level, threads and optional packages")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print a table."""
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
        ("CUDA", _cuda()),
    ]
    for package in ("ml_dtypes", "safetensors", "matplotlib", "tqdm", "mpi4py", "torch"):
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


def _cuda() -> str:
    from kilter._backend import backend_named
    from kilter._check import KilterError

    try:
        xp = backend_named("cuda").xp
    except KilterError as error:
        return str(error).removeprefix("device: ")
    return f"{xp.cuda.runtime.getDeviceCount()} devices, {xp.__name__} {xp.__version__}"
