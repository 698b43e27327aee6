"""The data sets kilter brings along or knows where to find."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilter._check import fail
from kilter.data.idx import read_idx

DIGITS_TRAIN = 1437  # the embedded samples are stored training part first
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


class Dataset(NamedTuple):
    """Images and labels for training and testing.

    Images are float32 in 0..1 of shape (N, 1, H, W), channels first as convolutions read them; for dense
    layers flatten with `x.reshape(len(x), -1)`, which copies nothing. Labels are int64 of shape (N,).
    """

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]


def digits() -> Dataset:
    """Load the embedded handwritten digits: 1,437 training and 360 test images of 8 x 8 pixels, 10 classes.

    Returns
    -------
    Dataset
        Images of shape (N, 1, 8, 8). The split is fixed and has the same share of each class in both parts.

    References
    ----------
    E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    CC BY 4.0; `digits.md` beside the data says what was changed.
    """
    folder = Path(__file__).parent
    x = _scaled(np.ascontiguousarray(read_idx(folder / "digits-images-idx3-ubyte.gz").T), 16.0)
    y = read_idx(folder / "digits-labels-idx1-ubyte.gz").astype(np.int64)
    return Dataset(x[:DIGITS_TRAIN], y[:DIGITS_TRAIN], x[DIGITS_TRAIN:], y[DIGITS_TRAIN:])


def fashion_mnist(path: str | os.PathLike[str] | None = None) -> Dataset:
    """Load Fashion-MNIST from its four IDX files: 60,000 training and 10,000 test images, 10 classes.

    Parameters
    ----------
    path
        The folder of the four files, and then the only one that is looked at. None looks in `$KILTER_DATA`
        and its subfolder `fashion-mnist`, `/usr/share/datasets/fashion-mnist` (where Debian's package
        `dataset-fashion-mnist` puts them), and `kilter/fashion-mnist` in `$XDG_CACHE_HOME` or `~/.cache`.

    Returns
    -------
    Dataset
        Images of shape (N, 1, 28, 28).

    Raises
    ------
    KilterError
        No folder has all four files (the message says how to get them), or a file is damaged.

    Notes
    -----
    Any data in the format of MNIST loads the same way: images of 28 x 28 bytes, labels 0..9.

    References
    ----------
    H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747. MIT licence.
    """
    folders = _places() if path is None else [Path(path)]
    for folder in folders:
        files = [folder / name for name in FASHION_MNIST]
        if all(file.is_file() for file in files):
            return Dataset(*_labelled(*files[:2]), *_labelled(*files[2:]))
    fail(
        "path",
        f"a folder with {', '.join(FASHION_MNIST)}",
        f"none in {', '.join(map(str, folders))}. Install the data with "
        "`apt-get install dataset-fashion-mnist`, or put the four files into a folder and name it by the "
        "environment variable KILTER_DATA or by path=",
    )


def _places() -> list[Path]:
    """List the folders of `fashion_mnist`, in the order of search."""
    own = os.environ.get("KILTER_DATA")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [
        *([Path(own), Path(own, "fashion-mnist")] if own else []),
        SYSTEM_FOLDER,
        Path(cache, "kilter", "fashion-mnist"),
    ]


def _labelled(images: Path, labels: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x, y = read_idx(images), read_idx(labels)
    if x.dtype != np.uint8 or x.shape[1:] != (28, 28):
        fail("path", "uint8 images of shape (N, 28, 28)", f"{x.dtype} {x.shape} in {images}")
    if y.dtype != np.uint8 or y.shape != x.shape[:1]:
        fail("path", f"{len(x)} uint8 labels", f"{y.dtype} {y.shape} in {labels}")
    if y.size and y.max() > 9:
        fail("path", "labels 0..9", f"{y.max()} in {labels}")
    return _scaled(x, 255.0), y.astype(np.int64)


def _scaled(images: NDArray[Any], white: float) -> NDArray[np.float32]:
    """Turn (N, H, W) bytes into (N, 1, H, W) float32 with `white` as 1."""
    x = images[:, np.newaxis].astype(np.float32)
    x /= np.float32(white)
    return x
