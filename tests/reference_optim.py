"""What kilter's optimizers compute, in plain float64 NumPy: slow, short, obvious. See reference.py.

Each rule returns the weights after each step. A gradient of None is a skipped step: schedules go on, state does not.
Options that kilter does not offer are forms found elsewhere; the docstrings name where.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

Schedule = float | Callable[[int], float]


def at(value: Schedule, call: int) -> float:
    return value(call) if callable(value) else value


def walk(p, grads: Sequence, move, maximize=False):
    """The weights after each step; `move(call, p, g)` returns the next ones."""
    p, path = np.asarray(p, np.float64), []
    for call, g in enumerate(grads):
        if g is not None:
            p = move(call, p, np.asarray(g, np.float64) * (-1 if maximize else 1))
        path.append(p)
    return path


def clip(grads, *, clip_value=None, clip_norm=None):
    """The gradients of one step, limited element by element, or all together by their joint norm."""
    grads = [np.asarray(g, np.float64) for g in grads]
    if clip_value is not None:
        grads = [np.clip(g, -clip_value, clip_value) for g in grads]
    if clip_norm is not None:
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1.0, clip_norm / norm) for g in grads]
    return grads


# --------------------------------------------------------------------------- velocity


def sgd(
    p,
    grads,
    lr: Schedule = 1e-3,
    *,
    momentum: Schedule = 0.0,
    dampening=0.0,
    weight_decay: Schedule = 0.0,
    nesterov=False,
    lr_inside=False,
    maximize=False,
):
    """velocity = momentum * velocity + (1 - dampening) * g, at first g;  p -= lr * velocity."""
    s = SimpleNamespace(velocity=None)

    def move(call, p, g):
        rate, mu = at(lr, call), at(momentum, call)
        scaled = (g + at(weight_decay, call) * p) * (rate if lr_inside else 1)
        s.velocity = scaled if s.velocity is None else mu * s.velocity + (1 - dampening) * scaled
        step = scaled + mu * s.velocity if nesterov else s.velocity if mu else scaled
        return p - step * (1 if lr_inside else rate)

    return walk(p, grads, move, maximize)


def lion(p, grads, lr: Schedule = 1e-4, *, betas=(0.9, 0.99), weight_decay: Schedule = 0.0, maximize=False):
    s = SimpleNamespace(m=0.0)

    def move(call, p, g):
        beta1 = at(betas[0], call)
        step = np.sign(beta1 * s.m + (1 - beta1) * g)
        s.m = betas[1] * s.m + (1 - betas[1]) * g
        return p * (1 - at(lr, call) * at(weight_decay, call)) - at(lr, call) * step

    return walk(p, grads, move, maximize)


# --------------------------------------------------------------------------- squares


def adagrad(
    p,
    grads,
    lr: Schedule = 1e-2,
    *,
    lr_decay=0.0,
    weight_decay: Schedule = 0.0,
    initial_accumulator_value=0.0,
    eps=1e-10,
    inside=False,
    lagged=False,
    maximize=False,
):
    """inside: eps under the root (Keras, optax); lagged: squares up to t - 1 only, the textbook's form."""
    s = SimpleNamespace(total=initial_accumulator_value, t=0)

    def move(call, p, g):
        g = g + at(weight_decay, call) * p
        now = s.total + g**2
        r = s.total if lagged else now
        rate = at(lr, call) / (1 + s.t * lr_decay)
        s.total, s.t = now, s.t + 1
        return p - rate * g / (np.sqrt(r + eps) if inside else np.sqrt(r) + eps)

    return walk(p, grads, move, maximize)


def rmsprop(
    p,
    grads,
    lr: Schedule = 1e-2,
    *,
    alpha=0.99,
    eps=1e-8,
    weight_decay: Schedule = 0.0,
    momentum: Schedule = 0.0,
    centered=False,
    window=None,
    always=False,
    inside=False,
    maximize=False,
):
    """inside: eps under the root (optax); always: a window of L divides by L before it is full, too."""
    s = SimpleNamespace(v=0.0, mean=0.0, velocity=0.0, squares=[])

    def move(call, p, g):
        g = g + at(weight_decay, call) * p
        if window is None:
            s.v, s.mean = alpha * s.v + (1 - alpha) * g**2, alpha * s.mean + (1 - alpha) * g
            v = s.v - s.mean**2 if centered else s.v
        else:
            s.squares = [*s.squares, g**2][-window:]
            v = alpha * sum(s.squares) / (window if always else len(s.squares)) + (1 - alpha) * g**2
        s.velocity = at(momentum, call) * s.velocity + g / (np.sqrt(v + eps) if inside else np.sqrt(v) + eps)
        return p - at(lr, call) * s.velocity

    return walk(p, grads, move, maximize)


def adadelta(
    p,
    grads,
    lr: Schedule = 1.0,
    *,
    rho=0.9,
    eps=1e-6,
    weight_decay: Schedule = 0.0,
    window=None,
    literal=False,
    maximize=False,
):
    """literal: the textbook's windowed form, without eps in the numerator and with L - 1 updates over L."""
    s = SimpleNamespace(v=0.0, u=0.0, squares=[], updates=[])

    def numerator():
        if not s.updates:
            return 0.0
        *older, last = s.updates
        older = older[-(window - 1) :] if window > 1 else []
        if literal:
            return rho * sum(older) / window + (1 - rho) * last
        return rho * (np.mean(older, 0) if older else last) + (1 - rho) * last

    def move(call, p, g):
        g = g + at(weight_decay, call) * p
        if window is None:
            s.v = rho * s.v + (1 - rho) * g**2
        else:
            s.squares = [*s.squares, g**2][-window:]
            s.v, s.u = rho * np.mean(s.squares, 0) + (1 - rho) * g**2, numerator()
        d = np.sqrt(s.u + (0 if literal else eps)) / np.sqrt(s.v + eps) * g
        s.u, s.updates = rho * s.u + (1 - rho) * d**2, [*s.updates, d**2]
        return p - at(lr, call) * d

    return walk(p, grads, move, maximize)


# --------------------------------------------------------------------------- moments


def adam(
    p,
    grads,
    lr: Schedule = 1e-3,
    *,
    betas: tuple[Schedule, float] = (0.9, 0.999),
    eps=1e-8,
    weight_decay: Schedule = 0.0,
    amsgrad: bool | str = False,
    decay="l2",
    maximize=False,
    eps_hat=False,
    bias_correction=True,
    first=1,
):
    """decay: "l2" (in the gradient), "lr" (decoupled, times lr), "independent" (decoupled, not times lr).

    amsgrad: True takes the maximum of the raw v; "corrected" that of the corrected v (optax). eps_hat: eps outside the
    uncorrected root (Keras). No bias_correction (MLX). first: the exponent of the betas at the first step, 2 with
    Flower; k for a parameter that joins at step k where the steps of a group are counted (apex, DeepSpeed).
    """
    p = np.asarray(p, np.float64)
    s = SimpleNamespace(m=np.zeros_like(p), v=np.zeros_like(p), vmax=np.zeros_like(p), product1=1.0, t=first - 1)

    def move(call, p, g):
        rate, wd, beta1, beta2 = at(lr, call), at(weight_decay, call), at(betas[0], call), betas[1]
        s.t += 1
        s.product1 *= beta1 if s.t > first else beta1**first
        bias1, bias2 = (1 - s.product1, 1 - beta2**s.t) if bias_correction else (1.0, 1.0)
        g = g + wd * p if decay == "l2" else g
        p = p * {"l2": 1.0, "lr": 1 - rate * wd, "independent": 1 - wd}[decay]
        s.m = beta1 * s.m + (1 - beta1) * g
        s.v = beta2 * s.v + (1 - beta2) * g**2
        s.vmax = np.maximum(s.vmax, s.v / bias2 if amsgrad == "corrected" else s.v)
        second = s.vmax if amsgrad else s.v
        root = np.sqrt(second if amsgrad == "corrected" or eps_hat else second / bias2)
        return p - rate / bias1 * (np.sqrt(bias2) if eps_hat else 1) * s.m / (root + eps)

    return walk(p, grads, move, maximize)


def adamw(p, grads, lr: Schedule = 1e-3, *, weight_decay: Schedule = 1e-2, decay="lr", **options):
    return adam(p, grads, lr, weight_decay=weight_decay, decay=decay, **options)


def adamax(
    p, grads, lr: Schedule = 2e-3, *, betas=(0.9, 0.999), eps=1e-8, weight_decay: Schedule = 0.0, maximize=False
):
    s = SimpleNamespace(m=0.0, u=0.0, product=1.0)

    def move(call, p, g):
        beta1, g = at(betas[0], call), g + at(weight_decay, call) * p
        s.product *= beta1
        s.m, s.u = beta1 * s.m + (1 - beta1) * g, np.maximum(betas[1] * s.u, np.abs(g) + eps)
        return p - at(lr, call) / (1 - s.product) * s.m / s.u

    return walk(p, grads, move, maximize)


def nadam(
    p,
    grads,
    lr: Schedule = 2e-3,
    *,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay: Schedule = 0.0,
    momentum_decay=4e-3,
    plain=False,
    maximize=False,
):
    """Keras has a momentum_decay of 1; plain: without the 0.96 (optax)."""
    s = SimpleNamespace(m=0.0, v=0.0, product=1.0, t=0)

    def move(call, p, g):
        beta1, beta2 = at(betas[0], call), betas[1]
        s.t += 1
        mu, following = (beta1 * (1 if plain else 1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (s.t, s.t + 1))
        s.product *= mu
        g = g + at(weight_decay, call) * p
        s.m, s.v = beta1 * s.m + (1 - beta1) * g, beta2 * s.v + (1 - beta2) * g**2
        step = following * s.m / (1 - s.product * following) + (1 - mu) * g / (1 - s.product)
        return p - at(lr, call) * step / (np.sqrt(s.v / (1 - beta2**s.t)) + eps)

    return walk(p, grads, move, maximize)


def yogi(p, grads, lr=1e-2, *, betas=(0.9, 0.999), eps=1e-3, start=1e-6):
    """Zaheer et al. 2018, as optax has it: both moments start at 1e-6."""
    s = SimpleNamespace(m=start, v=start)

    def move(call, p, g):
        s.m = betas[0] * s.m + (1 - betas[0]) * g
        s.v = s.v - (1 - betas[1]) * np.sign(s.v - g**2) * g**2
        root = np.sqrt(s.v / (1 - betas[1] ** (call + 1)))
        return p - lr * s.m / (1 - betas[0] ** (call + 1)) / (root + eps)

    return walk(p, grads, move)


# --------------------------------------------------------------------------- curvature


def newton(p, grads, lr: Schedule = 1.0, *, curvatures=None, damping=1e-4, beta=0.99, clip=None, maximize=False):
    """One curvature per step, None where a step has none; without `curvatures` it is 2 at every step."""
    s = SimpleNamespace(h=0.0, k=0)

    def move(call, p, g):
        c = 2.0 if curvatures is None else curvatures[call]
        if c is not None:
            s.h, s.k = beta * s.h + (1 - beta) * np.abs(np.asarray(c, np.float64)), s.k + 1
        step = at(lr, call) * g / (s.h / (1 - beta**s.k) + damping)
        return p - (step if clip is None else np.clip(step, -clip, clip))

    return walk(p, grads, move, maximize)
