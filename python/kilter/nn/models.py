"""Ready-made networks."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import DTypeLike

from kilter._check import KilterError
from kilter.nn.activations import ReLU
from kilter.nn.containers import Flatten, Sequential
from kilter.nn.dropout import Dropout
from kilter.nn.linear import Linear
from kilter.nn.module import Module
from kilter.nn.norms import BatchNorm


def mlp(
    features: int,
    classes: int,
    *,
    hidden: Sequence[int] = (256, 128),
    norm: str = "batch",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: DTypeLike = "float32",
) -> Sequential:
    """Multi-layer perceptron: Flatten, then per hidden layer Linear, norm, ReLU, Dropout, then Linear.

    Parameters
    ----------
    features
        Values per sample.
    classes
        Size of the output.
    hidden
        Sizes of the hidden layers, any number of them.
    norm
        "batch": batch norm before each ReLU, and no bias in front of it. "none": biases alone.
    dropout
        Probability, after each hidden layer; 0 adds no layer.
    seed
        Of the weights and the dropout masks; each layer has a stream of its own.
    dtype
        Of the layers.

    Returns
    -------
    Sequential

    Raises
    ------
    KilterError
        A size below 1, an unknown norm, a probability outside [0, 1).
    """
    if norm not in ("batch", "none"):
        raise KilterError(f"norm: expected 'batch' or 'none', got {norm!r}")
    layers: list[Module] = [Flatten()]
    before = features
    for i, size in enumerate(hidden):
        layers.append(Linear(before, size, bias=norm == "none", seed=seed, stream=i, dtype=dtype))
        layers.append(BatchNorm(size, activation="relu", dtype=dtype) if norm == "batch" else ReLU())
        if dropout:
            layers.append(Dropout(dropout, seed=seed, stream=i))
        before = size
    layers.append(Linear(before, classes, seed=seed, stream=len(hidden), dtype=dtype))
    return Sequential(*layers)
