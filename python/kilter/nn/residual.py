"""Residual connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kilter._backend import backend_of
from kilter._check import fail
from kilter.nn.activations import ReLU
from kilter.nn.containers import Sequential, backward_through, forward_through
from kilter.nn.module import Array, Module
from kilter.nn.norms import BatchNorm


class Residual(Module):
    """y = activation(body(x) + shortcut(x)).

    Parameters
    ----------
    body
        A module.
    shortcut
        A module whose output has the shape of the body's; None is x itself.
    activation
        None or "relu".

    Raises
    ------
    KilterError
        An argument is not as above; in a forward, the two outputs differ in shape or dtype.

    Notes
    -----
    Where the body is a Sequential that ends in a BatchNorm without activation, the sum and the activation are part of
    that layer's one pass over memory.

    References
    ----------
    He, Zhang, Ren, Sun, 2015, arXiv:1512.03385.
    """

    def __init__(self, body: Module, shortcut: Module | None = None, *, activation: str | None = None) -> None:
        super().__init__()
        for argument, module in (("body", body), ("shortcut", shortcut)):
            if not isinstance(module, Module) and (argument == "body" or module is not None):
                fail(argument, "a Module", type(module).__name__)
        if activation not in (None, "relu"):
            fail("activation", "None or 'relu'", repr(activation))
        self.body, self.shortcut = body, shortcut
        self.activation = ReLU() if activation == "relu" else None

    def forward(self, x: Array) -> Array:
        """y, of the body's shape and dtype."""
        side = x if self.shortcut is None else self.shortcut(x)
        norm = self._last_norm()
        if norm is not None:
            return norm.add(forward_through(self._inner(), x), side, None if self.activation is None else "relu")
        y = self.body(x)
        if y.shape != side.shape or y.dtype != side.dtype:
            fail("shortcut", f"{y.dtype} of shape {y.shape}, as the body", f"{side.dtype} of shape {side.shape}")
        y = backend_of(y, side).xp.add(y, side, out=self.buffer("y", y))
        return y if self.activation is None else self.activation(y)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx, the sum of what comes back through body and shortcut."""
        norm = self._last_norm()
        if norm is not None:
            upstream, side = norm.add_backward(dy)
            dx = backward_through(self._inner(), upstream, need_dx)
        else:
            side = dy if self.activation is None else self.activation.backward(dy)
            dx = self.body.backward(side, need_dx=need_dx)
        if self.shortcut is not None:
            side = self.shortcut.backward(side, need_dx=need_dx)
        return backend_of(dx, side).xp.add(dx, side, out=self.buffer("dx", dx)) if need_dx else None

    def _last_norm(self) -> BatchNorm | None:
        """The BatchNorm that ends the body, where it can add and cut by itself."""
        if isinstance(self.body, Sequential) and len(self.body) and isinstance(self.body[-1], BatchNorm):
            return self.body[-1] if self.body[-1].activation is None else None
        return None

    def _inner(self) -> Sequence[Module]:
        """The layers of the body before its last."""
        return self.body.layers[:-1] if isinstance(self.body, Sequential) else ()
