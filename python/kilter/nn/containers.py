"""Layers made of layers, and the reshaping between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kilter._check import KilterError
from kilter.nn.module import Array, Module


class Flatten(Module):
    """(N, ...) to (N, product of the rest)."""

    def forward(self, x: Array) -> Array:
        """A view of x where its layout allows one."""
        self._shape = x.shape
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dy in x's shape."""
        return dy.reshape(self._shape) if need_dx else None


class Sequential(Module):
    """Layers one after the other, named "0", "1", ...; `model[i]`, `len(model)` and iteration work.

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

    def __getitem__(self, index: int) -> Module:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.layers)

    def children(self) -> dict[str, Module]:
        """The layers by position."""
        return {str(i): layer for i, layer in enumerate(self.layers)}

    def forward(self, x: Array) -> Array:
        """Output of the last layer."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx of the first layer; `need_dx=False` stops at the first layer that has something to train."""
        first = 0
        if not need_dx:
            while first < len(self.layers) and not _trains(self.layers[first]):
                first += 1
        for i in range(len(self.layers) - 1, first - 1, -1):
            dy = self.layers[i].backward(dy, need_dx=need_dx or i > first)
        return dy if need_dx else None


def _trains(module: Module) -> bool:
    return any(m.own_params and not m.frozen for _, m in module.modules())
