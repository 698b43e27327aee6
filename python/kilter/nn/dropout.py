"""Dropout."""

from __future__ import annotations

from typing import Any

import numpy as np

from kilter import _check
from kilter._backend import backend_of
from kilter._check import KilterError, seed_and_stream
from kilter.nn.module import Array, Module, State, expect

_FIRST_STREAM = 2**31  # streams below belong to initialisation and to the order of the data


class Dropout(Module):
    """Sets each value to 0 with probability p in training and scales the rest by 1 / (1 - p).

    Parameters
    ----------
    p
        In [0, 1).
    seed, stream
        Which random numbers make the masks; `stream` is below 2**31. Layers of one model need different
        pairs.

    Notes
    -----
    The mask is a pure function of (seed, stream, calls, index), where `calls` counts the training forwards so
    far and is part of the state. In `eval()`, and with p = 0, the layer returns x itself.

    References
    ----------
    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, 2014, JMLR 15.
    """

    def __init__(self, p: float = 0.5, *, seed: int, stream: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise KilterError(f"p: expected a number in [0, 1), got {p!r}")
        if not 0 <= stream < _FIRST_STREAM:
            raise KilterError(f"stream: expected 0 <= stream < 2**31, got {stream!r}")
        self.p, (self.seed, self.stream) = p, seed_and_stream(seed, stream)
        self.calls = 0
        self.random_key = ("dropout", seed, stream)
        self._mask: Array | None = None

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype; x itself in eval mode or with p = 0."""
        if not self.training or self.p == 0:
            self._mask = None
            return x
        xp, ops = backend_of(_check.array("x", x))
        words = self.buffer("words", x, x.shape, np.dtype(np.uint32))
        ops.philox(words, self.seed, _FIRST_STREAM + self.stream, attempt=self.calls % 2**32)
        self.calls += 1
        kept = xp.greater_equal(words, np.uint32(self.p * 2**32), out=self.buffer("kept", x, x.shape, np.dtype(bool)))
        scale = x.dtype.type(1 / (1 - self.p))
        self._mask = xp.multiply(kept, scale, out=self.buffer("mask", x))
        return xp.multiply(x, self._mask, out=self.buffer("y", x))

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dy under the mask of the last forward."""
        mask = self._mask
        if mask is None or not need_dx:
            return dy if need_dx else None
        expect(dy, mask.shape, mask.dtype, "dy")
        return backend_of(mask, dy, names=("x", "dy")).xp.multiply(dy, mask, out=self.buffer("dx", mask))

    def extra_state(self) -> State:
        """The number of training forwards so far."""
        return {"calls": self.calls}

    def load_extra_state(self, state: State) -> None:
        """Take the number of training forwards back."""
        self.calls = int(state["calls"])
