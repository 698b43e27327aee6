"""A real task that is small enough to be learnt many times: images of clothes, or of digits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter import data
from kilter._check import KilterError
from kilter.data import Dataset

TEST = 5000  # test images, at most


def images(most: int, dtype: DTypeLike = "float32") -> tuple[str, Dataset]:
    """The name of the data, and at most so many training images as rows, with their test images.

    Fashion-MNIST where it is installed, else the digits that come with kilter. The mean of the pixels is taken off.
    """
    try:
        name, found = "Fashion-MNIST", data.fashion_mnist()
    except KilterError:
        name, found = "digits", data.digits()
    mean = found.x_train.mean()

    def rows(x: Any, count: int) -> Any:
        return (x[:count].reshape(-1, x[0].size) - mean).astype(dtype)

    x_train, x_test = rows(found.x_train, most), rows(found.x_test, TEST)
    return name, Dataset(x_train, found.y_train[:most], x_test, found.y_test[:TEST])


def spread(values: list[float]) -> float:
    """The standard deviation of values from several seeds, n - 1 in the denominator."""
    return float(np.std(values, ddof=1))
