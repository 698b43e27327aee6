"""Layers made of layers, and the reshaping between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Self, overload

from kilter import _check
from kilter._backend import backend_of
from kilter._check import KilterError
from kilter.nn.module import Array, Module, expect, is_channels_last


class Flatten(Module):
    """(N, ...) to (N, product of the rest)."""

    def forward(self, x: Array) -> Array:
        """x itself where it is (N, K); a view of any other x in C order, a copy of the rest."""
        if not _check.array("x", x).ndim:
            raise KilterError("x: expected at least one axis, got shape ()")
        self._cache = x
        if x.ndim == 2:
            return x
        if is_channels_last(x):
            y = self.buffer("y", x, x.shape)
            backend_of(x).xp.copyto(y, x)
            x = y
        return x.reshape(len(x), math.prod(x.shape[1:]))

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dy in x's shape."""
        if not need_dx:
            return None
        x = self.cache()
        expect(dy, (len(x), math.prod(x.shape[1:])), None, "dy")
        if not is_channels_last(x):
            return dy.reshape(x.shape)
        dx = self.buffer("dx", x, dtype=dy.dtype)
        backend_of(x, dy, names=("x", "dy")).xp.copyto(dx, dy.reshape(x.shape))
        return dx


class Sequential(Module):
    """Layers one after the other, named "0", "1", ...; `model[i]`, `len(model)` and iteration work.

    A slice is a Sequential of the same layers: `Sequential(*model[:-1], Linear(64, 5, seed=1))` has a new head.

    Raises
    ------
    KilterError
        One module stands twice, or two layers draw equal random numbers (same seed and stream).
    """

    def __init__(self, *layers: Module) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise KilterError(f"layers[{i}]: expected a Module, got {type(layer).__name__}")
        self.layers = layers
        seen: dict[object, str] = {}
        for prefix, module in self.modules():
            for key in (id(module), getattr(module, "random_key", None)):
                if key in seen and key is not None:
                    same = "is the same module as" if key == id(module) else "has the same seed and stream as"
                    raise KilterError(f"layers: {prefix[:-1]} {same} {seen[key]}")
                seen[key] = prefix[:-1]

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Module:
        return type(self)(*self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.layers)

    def children(self) -> dict[str, Module]:
        """The layers by position."""
        return {str(i): layer for i, layer in enumerate(self.layers)}

    def forward(self, x: Array) -> Array:
        """Output of the last layer."""
        return forward_through(self.layers, x)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx of the first layer; `need_dx=False` stops at the first layer that has something to train."""
        return backward_through(self.layers, dy, need_dx)


def forward_through(layers: Sequence[Module], x: Array) -> Array:
    """What comes out of the last of these layers."""
    for layer in layers:
        x = layer.forward(x)
    return x


def backward_through(layers: Sequence[Module], dy: Array, need_dx: bool) -> Any:
    """dx of the first of these layers, or None."""
    first = 0
    if not need_dx:
        while first < len(layers) and not _trains(layers[first]):
            first += 1
    for i in range(len(layers) - 1, first - 1, -1):
        dy = layers[i].backward(dy, need_dx=need_dx or i > first)
    return dy if need_dx else None


def _trains(module: Module) -> bool:
    return bool(module.own_params and not module.frozen) or any(map(_trains, module.children().values()))
