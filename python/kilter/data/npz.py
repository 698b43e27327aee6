"""Data sets in NumPy's own file format."""

from __future__ import annotations

import zipfile
from typing import Any

import numpy as np

from kilter._check import KilterError
from kilter.data.sources import Dataset


def read_npz(path: str) -> Dataset:
    """Read a data set from an .npz file.

    Parameters
    ----------
    path
        A file with x_train (N, ...), y_train (N,), x_test, y_test. Inputs of uint8 are divided by 255,
        floating ones become float32 as they are. Labels are integers of at least 0.

    Raises
    ------
    KilterError
        There is no such file, or it is not as above.
    """
    names = Dataset._fields
    try:
        # np.load leaves a file open that it opened and could not read
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise KilterError(f"data: expected {', '.join(names)} in {path}, got no {missing[0]}")
            arrays = [file[name] for name in names]
    except KilterError:
        raise
    except FileNotFoundError:
        raise KilterError(f"data: expected 'digits', 'fashion-mnist' or an .npz file, got {path!r}") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise KilterError(f"data: expected an .npz file, got {path!r} ({error})") from None
    found = Dataset(
        *(_inputs(n, a) if n.startswith("x") else _labels(n, a) for n, a in zip(names, arrays, strict=True))
    )
    for x, y, part in ((found.x_train, found.y_train, "train"), (found.x_test, found.y_test, "test")):
        if len(x) != len(y) or not len(x):
            raise KilterError(f"y_{part}: expected one label for each of {len(x)} inputs, got {len(y)}")
    if found.x_train.shape[1:] != found.x_test.shape[1:]:
        raise KilterError(f"x_test: expected samples of {found.x_train.shape[1:]}, got {found.x_test.shape[1:]}")
    return found


def _inputs(name: str, x: Any) -> Any:
    if x.ndim < 2 or (x.dtype != np.uint8 and x.dtype.kind != "f"):
        raise KilterError(f"{name}: expected (N, ...) of floats or uint8, got {x.dtype} {x.shape}")
    wide = x.astype(np.float32)
    if not np.isfinite(wide).all():
        raise KilterError(f"{name}: expected finite numbers")
    return wide / np.float32(255) if x.dtype == np.uint8 else wide


def _labels(name: str, y: Any) -> Any:
    if y.ndim != 1 or y.dtype.kind not in "iu" or (y.size and y.min() < 0):
        raise KilterError(f"{name}: expected (N,) integer labels of at least 0, got {y.dtype} {y.shape}")
    return y.astype(np.int64)
