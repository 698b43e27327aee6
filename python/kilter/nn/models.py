"""Ready-made networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from kilter._check import KilterError, fail
from kilter.nn.activations import ReLU
from kilter.nn.containers import Flatten, Sequential
from kilter.nn.conv import Conv2d
from kilter.nn.dropout import Dropout
from kilter.nn.group_norms import GroupNorm, InstanceNorm
from kilter.nn.linear import Linear
from kilter.nn.module import Module
from kilter.nn.norms import BatchNorm
from kilter.nn.pooling import GlobalAvgPool2d, MaxPool2d
from kilter.nn.residual import Residual
from kilter.nn.row_norms import LayerNorm, RMSNorm

NORMS = {
    "batch": "batch norm",
    "layer": "layer norm",
    "group": "group norm",
    "instance": "instance norm",
    "rms": "RMS norm",
    "none": "no norm",
}


class Builder(Protocol):
    """Makes a network for samples of a shape: `hidden` are the sizes of its hidden layers, or its channels."""

    def __call__(
        self,
        shape: Sequence[int],
        classes: int,
        /,
        *,
        hidden: Sequence[int] = ...,
        norm: str = ...,
        dropout: float = ...,
        seed: int = ...,
        dtype: DTypeLike = ...,
    ) -> Sequential:
        """The network, untrained."""


def mlp(
    features: int | Sequence[int],
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
        Values per sample, or the shape of a sample.
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
        A size below 1, an unknown norm or that of instances, a probability outside [0, 1).
    """
    _known(norm, *(name for name in NORMS if name != "instance"))
    layers: list[Module] = [Flatten()]
    before = math.prod(features) if isinstance(features, Sequence) else features
    for i, size in enumerate(hidden):
        layers.append(Linear(before, size, bias=norm != "batch", seed=seed, stream=i, dtype=dtype))
        layers += _normed(norm, size, dtype)
        if dropout:
            layers.append(Dropout(dropout, seed=seed, stream=i))
        before = size
    layers.append(Linear(before, classes, seed=seed, stream=len(hidden), dtype=dtype))
    return Sequential(*layers)


def cnn(
    shape: Sequence[int],
    classes: int,
    *,
    hidden: Sequence[int] = (16, 32, 64),
    norm: str = "batch",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: DTypeLike = "float32",
) -> Sequential:
    """Convolutional network: per block Conv2d 3x3, norm, ReLU, MaxPool2d 2; then Flatten, Dropout, Linear.

    Parameters
    ----------
    shape
        Of a sample: (channels, height, width).
    classes
        Size of the output.
    hidden
        Channels of the blocks. A block pools where its image has more than 7 rows and columns.
    norm
        "batch", "group", "instance": that norm before each ReLU. "layer", "rms": over the channels of each position.
        "none": none. Where the norm takes the mean of a channel away, its convolution has no bias.
    dropout
        Probability, before the last layer; 0 adds no layer.
    seed
        Of the weights and the dropout mask; each layer has a stream of its own.
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
    _known(norm, *NORMS)
    channels, *size = _image(shape)
    streams, layers = count(), list[Module]()
    for width in hidden:
        layers += _convolved(channels, width, norm, seed, next(streams), dtype)
        channels = width
        if min(size) > 7:
            layers.append(MaxPool2d(2))
            size = [n // 2 for n in size]
    layers.append(Flatten())
    if dropout:
        layers.append(Dropout(dropout, seed=seed))
    layers.append(Linear(channels * math.prod(size), classes, seed=seed, stream=next(streams), dtype=dtype))
    return Sequential(*layers)


def resnet(
    shape: Sequence[int],
    classes: int,
    *,
    hidden: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    norm: str = "batch",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: DTypeLike = "float32",
) -> Sequential:
    """Small residual network: Conv2d 3x3, norm, ReLU; stages of basic blocks; GlobalAvgPool2d, Dropout, Linear.

    A block is ReLU(body(x) + x), the body twice Conv2d 3x3 and norm with a ReLU between. The first block of every
    stage but the first halves the image, with a Conv2d 1x1 and norm in place of x. An image of more than 16 rows and
    columns is halved before the stages, by MaxPool2d 2.

    Parameters
    ----------
    shape
        Of a sample: (channels, height, width).
    classes
        Size of the output.
    hidden
        Channels of the stages, one at least.
    blocks
        How many in each stage.
    norm, dropout, seed, dtype
        As in `cnn`.

    Returns
    -------
    Sequential

    Raises
    ------
    KilterError
        A size below 1, an unknown norm, a probability outside [0, 1).

    References
    ----------
    He, Zhang, Ren, Sun, 2015, arXiv:1512.03385, section 4.2.
    """
    _known(norm, *NORMS)
    channels, *size = _image(shape)
    if not hidden:
        fail("hidden", "at least one number of channels", "none")
    if not isinstance(blocks, (int, np.integer)) or blocks < 1:
        fail("blocks", "a whole number of at least 1", repr(blocks))
    streams = count()
    layers = _convolved(channels, hidden[0], norm, seed, next(streams), dtype)
    if min(size) > 16:
        layers.append(MaxPool2d(2))
    channels = hidden[0]
    for i, width in enumerate(hidden):
        for k in range(blocks):
            layers.append(_block(channels, width, 2 if i and not k else 1, norm, seed, streams, dtype))
            channels = width
    layers.append(GlobalAvgPool2d())
    if dropout:
        layers.append(Dropout(dropout, seed=seed))
    layers.append(Linear(channels, classes, seed=seed, stream=next(streams), dtype=dtype))
    return Sequential(*layers)


MODELS: dict[str, Builder] = {"mlp": mlp, "cnn": cnn, "resnet": resnet}


def _known(norm: str, *names: str) -> None:
    if norm not in names:
        raise KilterError(f"norm: expected {' or '.join(map(repr, names))}, got {norm!r}")


def _image(shape: Sequence[int]) -> tuple[int, ...]:
    whole = isinstance(shape, Sequence) and all(isinstance(n, (int, np.integer)) and n > 0 for n in shape)
    if not whole or len(shape) != 3:
        fail("shape", "(channels, height, width)", repr(shape))
    return tuple(shape)


def _block(
    channels: int, width: int, stride: int, norm: str, seed: int, streams: Iterator[int], dtype: DTypeLike
) -> Residual:
    """A basic block; its shortcut is x itself where x has the shape of the body."""
    body = [
        *_convolved(channels, width, norm, seed, next(streams), dtype, stride=stride),
        *_convolved(width, width, norm, seed, next(streams), dtype, relu=False),
    ]
    shortcut = None
    if stride != 1 or channels != width:
        shortcut = Sequential(
            *_convolved(channels, width, norm, seed, next(streams), dtype, kernel=1, stride=stride, relu=False)
        )
    return Residual(Sequential(*body), shortcut, activation="relu")


def _convolved(
    channels: int,
    width: int,
    norm: str,
    seed: int,
    stream: int,
    dtype: DTypeLike,
    *,
    kernel: int = 3,
    stride: int = 1,
    relu: bool = True,
) -> list[Module]:
    """A convolution that keeps the size of the image but for the stride, a norm, if any, and ReLU."""
    conv = Conv2d(
        channels,
        width,
        kernel,
        stride=stride,
        padding=kernel // 2,
        bias=norm not in ("batch", "instance"),
        seed=seed,
        stream=stream,
        dtype=dtype,
    )
    return [conv, *_normed(norm, width, dtype, relu)]


def _normed(norm: str, size: int, dtype: DTypeLike, relu: bool = True) -> list[Module]:
    """A norm of the channels, if any, and ReLU."""
    if norm == "batch":
        return [BatchNorm(size, activation="relu" if relu else None, dtype=dtype)]
    layers: list[Module] = [ReLU()] if relu else []
    if norm == "group":
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if g == 1 or size % (8 * g) == 0)
        layers.insert(0, GroupNorm(groups, size, dtype=dtype))
    elif norm == "instance":
        layers.insert(0, InstanceNorm(size, dtype=dtype))
    elif norm in ("layer", "rms"):
        layers.insert(0, (LayerNorm if norm == "layer" else RMSNorm)(size, axis=1, dtype=dtype))
    return layers
