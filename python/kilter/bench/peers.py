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

WRITTEN = ("adamw", "momentum")  # rules that `step` knows
FUSED = ("SGD", "Adagrad", "Adam", "AdamW")  # classes of PyTorch that have a fused step on the CPU
TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": LR}),
    "momentum": ("SGD", {"lr": LR, "momentum": MOMENTUM}),
    "nesterov": ("SGD", {"lr": LR, "momentum": MOMENTUM, "nesterov": True}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop centered, momentum": ("RMSprop", {"centered": True, "momentum": MOMENTUM}),
    "adadelta": ("Adadelta", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "adamax": ("Adamax", {}),
    "nadam": ("NAdam", {}),
}


class Peer(Protocol):
    """A library."""

    name: str

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> dict[str, Work]:
        """Returns "forward" and "backward" in training and "inference"; nothing where it has no such dtype."""

    def row_norm(self, x: Any, dy: Any, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """Returns both passes of layer norm, or of RMS norm where beta is None; None where it has no such dtype."""

    def group_norm(self, x: Any, dy: Any, groups: int, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """Returns both passes; None where it has no such dtype."""

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """Returns its ways to take a step of a rule of `kilter.bench.optim`, by name; none where it has none."""

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


def row_forward(xp: Any, x: Any, gamma: Any, beta: Any) -> tuple[Any, Any, Any]:
    """Returns y, mean and rstd of layer norm, or of RMS norm where beta is None: there the mean is 0."""
    mean = 0.0 if beta is None else xp.mean(x, axis=-1, keepdims=True)
    rstd = 1 / xp.sqrt(xp.mean((x - mean) ** 2, axis=-1, keepdims=True) + EPS)
    return (x - mean) * rstd * gamma + (0.0 if beta is None else beta), mean, rstd


def row_backward(xp: Any, dy: Any, x: Any, mean: Any, rstd: Any, gamma: Any, centred: bool) -> Any:
    """Returns dx, dgamma and dbeta."""
    x_hat, g = (x - mean) * rstd, dy * gamma
    first = xp.mean(g, axis=-1, keepdims=True) if centred else 0.0
    dx = rstd * (g - first - x_hat * xp.mean(g * x_hat, axis=-1, keepdims=True))
    return dx, xp.sum(dy * x_hat, axis=0), xp.sum(dy, axis=0)


def in_groups(x: Any, groups: int, axis: int, arrays: Sequence[Any]) -> tuple[tuple[int, ...], list[Any]]:
    """Returns the axes of a group where x's channel axis is two, and the arrays in that form."""
    at = axis % x.ndim
    shape = [*x.shape[:at], groups, x.shape[at] // groups, *x.shape[at + 1 :]]
    vector = [size if i in (at, at + 1) else 1 for i, size in enumerate(shape)]
    axes = tuple(i for i in range(1, len(shape)) if i != at)
    return axes, [a.reshape(vector if a.ndim == 1 else shape) for a in arrays]


def group_backward(xp: Any, dy: Any, x: Any, mean: Any, rstd: Any, gamma: Any, axes: tuple[int, ...]) -> Any:
    """Returns dx, dgamma and dbeta of arrays in groups, of which `axes` are the axes of one."""
    x_hat, g = (x - mean) * rstd, dy * gamma
    dx = rstd * (g - xp.mean(g, axis=axes, keepdims=True) - x_hat * xp.mean(g * x_hat, axis=axes, keepdims=True))
    every = tuple(i for i, size in enumerate(gamma.shape) if size == 1)
    return dx, xp.sum(dy * x_hat, axis=every), xp.sum(dy, axis=every)


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

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> dict[str, Work]:
        """See `Peer`."""
        if x.dtype != np.float32:
            return {}
        axes, (g, b) = aligned(x, axis, (gamma, beta))
        _, mean, rstd = forward(np, x, g, b, axes)
        return {
            "forward": lambda: forward(np, x, g, b, axes),
            "inference": lambda: (x - mean) * (rstd * g) + b,
            "backward": lambda: backward(np, dy, x, mean, rstd, g, axes),
        }

    def row_norm(self, x: Any, dy: Any, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        if x.dtype != np.float32:
            return None
        _, mean, rstd = row_forward(np, x, gamma, beta)
        centred = beta is not None
        return lambda: row_forward(np, x, gamma, beta), lambda: row_backward(np, dy, x, mean, rstd, gamma, centred)

    def group_norm(self, x: Any, dy: Any, groups: int, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        if x.dtype != np.float32:
            return None
        axes, (x, dy, g, b) = in_groups(x, groups, axis, (x, dy, gamma, beta))
        _, mean, rstd = forward(np, x, g, b, axes)
        return lambda: forward(np, x, g, b, axes), lambda: group_backward(np, dy, x, mean, rstd, g, axes)

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """See `Peer`."""
        if rule not in WRITTEN:
            return {}
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

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> dict[str, Work]:
        """See `Peer`."""
        x, dy, g, b = (self.tensor(array) for array in (x, dy, gamma, beta))
        if axis == -1:  # what torch calls channels_last: NCHW in shape, NHWC in memory
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
        aten = self.torch.ops.aten
        _, mean, rstd = aten.native_batch_norm(x, g, b, None, None, True, 0.1, EPS)
        norm, every = self.torch.nn.functional.batch_norm, [True, True, True]
        zeros, ones = self.torch.zeros_like(g), self.torch.ones_like(g)
        return {
            "forward": lambda: norm(x, None, None, g, b, True, 0.1, EPS),
            "inference": lambda: norm(x, zeros, ones, g, b, False, 0.1, EPS),
            "backward": lambda: aten.native_batch_norm_backward(dy, x, g, None, None, mean, rstd, True, EPS, every),
        }

    def row_norm(self, x: Any, dy: Any, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        x, dy, g = (self.tensor(array) for array in (x, dy, gamma))
        functions, aten, shape = self.torch.nn.functional, self.torch.ops.aten, [x.shape[-1]]
        g = g.to(x.dtype)
        if beta is not None:
            b = self.tensor(beta).to(x.dtype)
            _, mean, rstd = aten.native_layer_norm(x, shape, g, b, EPS)
            return (
                lambda: functions.layer_norm(x, shape, g, b, EPS),
                lambda: aten.native_layer_norm_backward(dy, x, shape, mean, rstd, g, b, [True, True, True]),
            )
        inputs = [v.detach().requires_grad_() for v in (x, g)]
        y = functions.rms_norm(inputs[0], shape, inputs[1], EPS)
        return (
            lambda: functions.rms_norm(x, shape, g, EPS),
            lambda: self.torch.autograd.grad(y, inputs, dy, retain_graph=True),
        )

    def group_norm(self, x: Any, dy: Any, groups: int, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        x, dy, g, b = (self.tensor(array) for array in (x, dy, gamma, beta))
        if axis == -1:
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
        g, b = g.to(x.dtype), b.to(x.dtype)
        aten, sizes = self.torch.ops.aten, (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
        _, mean, rstd = aten.native_group_norm(x, g, b, *sizes, EPS)
        return (
            lambda: self.torch.nn.functional.group_norm(x, groups, g, b, EPS),
            lambda: aten.native_group_norm_backward(dy, x, mean, rstd, g, *sizes, [True, True, True]),
        )

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """See `Peer`."""

        if rule not in TORCH:
            return {}
        name, options = TORCH[rule]

        def optimizer(**more: bool) -> Work:
            tensors = [self.torch.nn.Parameter(self.tensor(p.copy())) for p in params]
            for p, g in zip(tensors, grads, strict=True):
                p.grad = self.tensor(g)
            work: Work = getattr(self.torch.optim, name)(tensors, **options, **more).step
            return work

        ways = {self.name: optimizer(), f"{self.name} foreach": optimizer(foreach=True)}
        return ways | {f"{self.name} fused": optimizer(fused=True)} if name in FUSED else ways

    def fill(self, kind: str, out: Any) -> Work:
        """See `Peer`."""
        tensor = self.tensor(out)
        work: Work = tensor.normal_ if kind == "normal" else tensor.uniform_
        return work

    def epoch(self, x: Any, y: Any, sizes: Sequence[int], batch: int) -> Work:
        """Returns an epoch of an MLP with batch norm and ReLU after each hidden layer, by fused AdamW.

        Like `fit`, it sums losses and counts right answers.
        """
        torch, nn = self.torch, self.torch.nn
        layers: list[Any] = []
        for before, size in pairwise(sizes[:-1]):
            layers += [nn.Linear(before, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(*sizes[-2:]))
        loss, optimizer = nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), LR, fused=True)
        x, y = self.tensor(x), self.tensor(y)

        def work() -> None:
            total, right = 0.0, 0
            for rows in torch.randperm(len(x)).split(batch):
                labels = y[rows]
                logits = model(x[rows])
                value = loss(logits, labels)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.item() * len(rows)
                right += int((logits.argmax(1) == labels).sum())

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

    def batch_norm(self, x: Any, dy: Any, axis: int, gamma: Any, beta: Any) -> dict[str, Work]:
        """See `Peer`."""
        if x.dtype != np.float32:
            return {}
        xp = self.jax.numpy
        axes, (g, b) = aligned(x, axis, (gamma, beta))
        _, mean, rstd = forward(np, x, g, b, axes)
        given = (dy, x, mean, rstd, g)
        return {
            "forward": self.compiled(lambda x, g, b: forward(xp, x, g, b, axes), x, g, b),
            "inference": self.compiled(lambda x, m, r, g, b: (x - m) * (r * g) + b, x, mean, rstd, g, b),
            "backward": self.compiled(lambda dy, x, m, r, g: backward(xp, dy, x, m, r, g, axes), *given),
        }

    def row_norm(self, x: Any, dy: Any, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        if x.dtype != np.float32:
            return None
        xp, centred = self.jax.numpy, beta is not None
        _, mean, rstd = row_forward(np, x, gamma, beta)
        given = (x, gamma, beta) if centred else (x, gamma)
        return (
            self.compiled(lambda x, g, b=None: row_forward(xp, x, g, b), *given),
            self.compiled(lambda dy, x, m, r, g: row_backward(xp, dy, x, m, r, g, centred), dy, x, mean, rstd, gamma),
        )

    def group_norm(self, x: Any, dy: Any, groups: int, axis: int, gamma: Any, beta: Any) -> tuple[Work, Work] | None:
        """See `Peer`."""
        if x.dtype != np.float32:
            return None
        xp = self.jax.numpy
        axes, (x, dy, g, b) = in_groups(x, groups, axis, (x, dy, gamma, beta))
        _, mean, rstd = forward(np, x, g, b, axes)
        return (
            self.compiled(lambda x, g, b: forward(xp, x, g, b, axes), x, g, b),
            self.compiled(lambda dy, x, m, r, g: group_backward(xp, dy, x, m, r, g, axes), dy, x, mean, rstd, g),
        )

    def steps(self, rule: str, params: list[Any], grads: list[Any]) -> dict[str, Work]:
        """See `Peer`."""
        if rule not in WRITTEN:
            return {}
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
