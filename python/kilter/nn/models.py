"""Ready-made networks."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import DTypeLike

from kilter._check import KilterError
from kilter.nn.activations import ReLU
from kilter.nn.containers import Flatten, Sequential
from kilter.nn.dropout import Dropout
from kilter.nn.group_norms import GroupNorm
from kilter.nn.linear import Linear
from kilter.nn.module import Module
from kilter.nn.norms import BatchNorm
from kilter.nn.row_norms import LayerNorm, RMSNorm

NORMS = {
    "batch": "batch norm",
    "layer": "layer norm",
    "group": "group norm",
    "rms": "RMS norm",
    "none": "no norm",
}


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
        "batch": batch norm before each ReLU, and no bias in front of it. "layer", "group", "rms": that norm in its
        place, behind biases; up to 32 groups of at least 8 values. "none": biases alone.
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
    if norm not in NORMS:
        raise KilterError(f"norm: expected {' or '.join(map(repr, NORMS))}, got {norm!r}")
    layers: list[Module] = [Flatten()]
    before = features
    for i, size in enumerate(hidden):
        layers.append(Linear(before, size, bias=norm != "batch", seed=seed, stream=i, dtype=dtype))
        layers += _activated(norm, size, dtype)
        if dropout:
            layers.append(Dropout(dropout, seed=seed, stream=i))
        before = size
    layers.append(Linear(before, classes, seed=seed, stream=len(hidden), dtype=dtype))
    return Sequential(*layers)


def _activated(norm: str, size: int, dtype: DTypeLike) -> list[Module]:
    """A norm, if any, and ReLU."""
    if norm == "batch":
        return [BatchNorm(size, activation="relu", dtype=dtype)]
    if norm == "none":
        return [ReLU()]
    if norm == "group":
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if g == 1 or size % (8 * g) == 0)
        return [GroupNorm(groups, size, dtype=dtype), ReLU()]
    return [(LayerNorm if norm == "layer" else RMSNorm)(size, dtype=dtype), ReLU()]
