"""The same work in other libraries, on the same arrays and with as many threads.

A peer is measured as its users call it: it returns new arrays where it has no way to reuse one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from kilter import _kilter
from kilter.bench.timing import Work

EPS = 1e-5
LR, DECAY, BETA1, BETA2, ADAM_EPS, MOMENTUM = 1e-3, 1e-2, 0.9, 0.999, 1e-8, 0.9


class Peer(Protocol):
    """A library."""

    name: str

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """Returns the forward and the backward pass in training; None where it has no such dtype."""

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """Returns its ways to take a step of "adamw" or of SGD with "momentum", by name."""

    def fill(self, kind: str, out: Any) -> Work:
        """Returns the fill of an array like `out` with "normal" or "uniform" numbers."""


def installed(names: Sequence[str]) -> list[Peer]:
    """Returns the peers, out of "numpy", "torch" and "jax", that are installed."""
    kinds: dict[str, Callable[[], Peer]] = {"numpy": NumPy, "torch": Torch, "jax": Jax}
    return [kinds[name]() for name in names if find_spec(name) is not None]


# The textbook, on arrays of NumPy or JAX.


def forward(xp: Any, x: Any, gamma: Any, beta: Any, axes: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Returns y, mean and rstd; gamma and beta have x's number of axes."""
    mean = xp.mean(x, axis=axes, keepdims=True)
    rstd = 1 / xp.sqrt(xp.var(x, axis=axes, keepdims=True) + EPS)
    return (x - mean) * (rstd * gamma) + beta, mean, rstd


def backward(xp: Any, dy: Any, x: Any, mean: Any, rstd: Any, gamma: Any, axes: tuple[int, ...]) -> Any:
    """Returns dx, dgamma and dbeta."""
    x_hat = (x - mean) * rstd
    dbeta = xp.sum(dy, axis=axes, keepdims=True)
    dgamma = xp.sum(dy * x_hat, axis=axes, keepdims=True)
    count = x.size // gamma.size
    return (gamma * rstd) * (dy - dbeta / count - x_hat * (dgamma / count)), dgamma, dbeta


def step(xp: Any, rule: str, p: Any, g: Any, m: Any, v: Any, t: Any) -> tuple[Any, Any, Any]:
    """Returns the new p, m and v."""
    if rule == "momentum":
        m = MOMENTUM * m + g
        return p - LR * m, m, v
    m = m + (1 - BETA1) * (g - m)
    v = v + (1 - BETA2) * (g * g - v)
    size = LR / (1 - BETA1**t)
    return p * (1 - LR * DECAY) - size * m / (xp.sqrt(v / (1 - BETA2**t)) + ADAM_EPS), m, v


def aligned(x: Any, axis: int, vectors: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
    """Returns the axes of x that are not the channels', and the vectors with x's number of axes."""
    channel = axis % x.ndim
    shape = [-1 if i == channel else 1 for i in range(x.ndim)]
    return tuple(i for i in range(x.ndim) if i != channel), [v.reshape(shape) for v in vectors]


class NumPy:
    """NumPy, as textbooks write it."""

    name = "numpy"

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        if x.dtype != np.float32:
            return None
        axes, (g, b) = aligned(x, axis, (gamma, beta))
        _, mean, rstd = forward(np, x, g, b, axes)
        return lambda: forward(np, x, g, b, axes), lambda: backward(np, dy, x, mean, rstd, g, axes)

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """See `Peer`."""
        state = [(p.copy(), np.zeros_like(p), np.zeros_like(p)) for p in params]
        t = 0

        def work() -> None:
            nonlocal t
            t += 1
            for i, g in enumerate(grads):
                p, m, v = state[i]
                state[i] = step(np, rule, p, g, m, v, t)

        return {self.name: work}

    def fill(self, kind: str, out: Any) -> Work:
        """See `Peer`."""
        rng = np.random.default_rng(1)
        draw: Callable[..., Any] = rng.standard_normal if kind == "normal" else rng.random
        return lambda: draw(out=out, dtype=np.float32)


class Torch:
    """PyTorch on the CPU."""

    name = "torch"

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")
        self.torch.set_num_threads(_kilter.num_threads())

    def tensor(self, array: Any) -> Any:
        """The array's own memory as a tensor."""
        if array.dtype.name == "bfloat16":
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        x, dy, g, b = (self.tensor(array) for array in (x, dy, gamma, beta))
        if axis == -1:  # what torch calls channels_last: NCHW in shape, NHWC in memory
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
        aten = self.torch.ops.aten
        _, mean, rstd = aten.native_batch_norm(x, g, b, None, None, True, 0.1, EPS)
        norm, every = self.torch.nn.functional.batch_norm, [True, True, True]
        return (
            lambda: norm(x, None, None, g, b, True, 0.1, EPS),
            lambda: aten.native_batch_norm_backward(dy, x, g, None, None, mean, rstd, True, EPS, every),
        )

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """See `Peer`."""

        def optimizer(fused: bool) -> Work:
            tensors = [self.torch.nn.Parameter(self.tensor(p.copy())) for p in params]
            for p, g in zip(tensors, grads, strict=True):
                p.grad = self.tensor(g)
            kinds = self.torch.optim
            more = {"fused": True} if fused else {}
            if rule == "adamw":
                made = kinds.AdamW(tensors, LR, (BETA1, BETA2), ADAM_EPS, DECAY, **more)
            else:
                made = kinds.SGD(tensors, LR, MOMENTUM, **more)
            work: Work = made.step
            return work

        return {self.name: optimizer(False), f"{self.name} fused": optimizer(True)}

    def fill(self, kind: str, out: Any) -> Work:
        """See `Peer`."""
        tensor = self.tensor(out)
        work: Work = tensor.normal_ if kind == "normal" else tensor.uniform_
        return work

    def epoch(self, x: Any, y: Any, sizes: Sequence[int], batch: int) -> Work:
        """Returns an epoch of an MLP with batch norm and ReLU after each hidden layer, by fused AdamW."""
        torch, nn = self.torch, self.torch.nn
        layers: list[Any] = []
        for before, size in pairwise(sizes[:-1]):
            layers += [nn.Linear(before, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(*sizes[-2:]))
        loss, optimizer = nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), LR, fused=True)
        x, y = self.tensor(x), self.tensor(y)

        def work() -> None:
            for rows in torch.randperm(len(x)).split(batch):
                optimizer.zero_grad()
                loss(model(x[rows]), y[rows]).backward()
                optimizer.step()

        return work


class Jax:
    """JAX on the CPU, compiled, with the optimizer's buffers donated."""

    name = "jax"

    def __init__(self) -> None:
        self.jax: Any = import_module("jax")

    def compiled(self, function: Callable[..., Any], *arrays: Any) -> Work:
        """Returns a call of the compiled function on JAX's copies of the arrays."""
        given = [self.jax.numpy.asarray(array) for array in arrays]
        fast = self.jax.jit(function)
        return lambda: self.jax.block_until_ready(fast(*given))

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        if x.dtype != np.float32:
            return None
        xp = self.jax.numpy
        axes, (g, b) = aligned(x, axis, (gamma, beta))
        _, mean, rstd = forward(np, x, g, b, axes)
        return (
            self.compiled(lambda x, g, b: forward(xp, x, g, b, axes), x, g, b),
            self.compiled(lambda dy, x, mean, rstd, g: backward(xp, dy, x, mean, rstd, g, axes), dy, x, mean, rstd, g),
        )

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """See `Peer`."""
        xp = self.jax.numpy

        def all_of(state: Any, grads: Any, t: Any) -> Any:
            return [step(xp, rule, p, g, m, v, t) for (p, m, v), g in zip(state, grads, strict=True)]

        fast = self.jax.jit(all_of, donate_argnums=0)
        given = [xp.asarray(g) for g in grads]
        state = [(xp.array(p), xp.zeros_like(p), xp.zeros_like(p)) for p in params]
        t = 0

        def work() -> None:
            nonlocal state, t
            t += 1
            state = self.jax.block_until_ready(fast(state, given, float(t)))

        return {self.name: work}

    def fill(self, kind: str, out: Any) -> Work:
        """See `Peer`."""
        random = self.jax.random
        draw = random.normal if kind == "normal" else random.uniform
        return self.compiled(lambda key: draw(key, out.shape), random.PRNGKey(1))
