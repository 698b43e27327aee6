"""Estimates of the diagonal of the curvature, for `DiagonalNewton`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kilter import _check
from kilter._backend import Backend, backend_of
from kilter._check import fail
from kilter.optim import structure

__all__ = ["gauss_newton_bartlett", "hutchinson"]

# The order of the data takes the words of these streams in attempt 0.
_STREAM, _SIGNS, _LABELS = 2**30, 1, 2


def hutchinson(hvp: Callable[[Any], Any], like: Any, *, seed: int, probes: int = 1) -> Any:
    """Estimates the diagonal of the Hessian H from products with random signs: mean of v * (H v), each v_i = ±1.

    The estimate has no bias, is exact where H is diagonal, and its variance is the sum of the squares of the other
    entries of the row, divided by `probes`.

    Args:
        hvp: takes a v of the structure, shapes and dtypes of `like`, and returns H v in the same structure.
        like: the parameters, or arrays like them: a list, a dict name -> array, or a list of groups of these.
        seed: of the signs; a new one for each estimate.
        probes: how many products are averaged, from 1 to 2**30.

    Returns:
        The estimate, in the structure of `like`: float64 for float64 arrays, else float32. It may be negative.

    Raises:
        KilterError: an argument or what `hvp` returned does not fit; the message names the entry.

    References:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Bekas, Kokiopoulou, Saad 2007,
        "An estimator for the diagonal of a matrix".
    """
    if not isinstance(probes, int) or isinstance(probes, bool) or not 1 <= probes <= 2**30:
        fail("probes", "a whole number from 1 to 2**30", repr(probes))
    seed, _ = _check.seed_and_stream(seed, 0)
    named = structure.named("like", like)
    backend = structure.backend("like", named)
    total = [backend.xp.zeros(a.shape, _check.arithmetic(name, a.dtype)) for name, a in named.items()]
    for probe in range(probes):
        signs = _signs(backend, list(named.values()), seed, _STREAM + probe)
        products = structure.matched("hvp(v)", hvp(structure.rebuilt(like, [v.copy() for v in signs])), named)
        for h, v, product in zip(total, signs, products, strict=True):
            h += v.astype(h.dtype) * product.astype(h.dtype)
    for h in total:
        h /= probes
    return structure.rebuilt(like, total)


def gauss_newton_bartlett(model: Any, x: Any, *, seed: int) -> Any:
    """Estimates the diagonal of the Gauss-Newton matrix of softmax cross-entropy by one backward pass.

    Labels y are drawn from the model's own softmax p; with g the gradient of the mean loss against them, the estimate
    is h = batch * g². It has no bias where the samples of a batch do not act on each other.

    Args:
        model: has `model(x)` (logits of shape (N, K)), `model.backward(dlogits, need_dx=False)` and `model.grads()`, as
            the modules of `kilter.nn`.
        x: a batch of inputs.
        seed: of the labels; a new one for each estimate.

    Returns:
        The estimate, in the structure of `model.grads()`, never negative: float64 for float64 gradients, else float32.

    Raises:
        KilterError: an argument does not fit.

    Notes:
        Costs a forward and a backward pass, in the mode the model is in: in training mode batch norm moves its running
        statistics once more, and dropout draws. `model.grads()` are left as they were; what a forward pass keeps for
        its backward is not: take the estimate before the forward pass of the step, or after its backward.

    References:
        Liu, Li, Hall, Liang, Ma 2024, arXiv:2305.14342, algorithm 2.
    """
    seed, _ = _check.seed_and_stream(seed, 0)
    logits = model(x)
    backend = backend_of(logits, names=("model(x)",))
    if logits.ndim != 2 or 0 in logits.shape:
        fail("model(x)", "logits of shape (N, K)", f"shape {logits.shape}")
    dlogits = _sampled(backend, logits, seed)
    grads = structure.named("model.grads()", model.grads())
    kept = [g.copy() for g in grads.values()]
    model.backward(dlogits, need_dx=False)
    curvature = {}
    for (name, g), old in zip(grads.items(), kept, strict=True):
        wide = g.astype(_check.arithmetic(name, g.dtype))
        wide *= wide
        curvature[name] = wide
        g[...] = old
    return structure.rebuilt(model.grads(), curvature.values())


def _signs(backend: Backend, like: list[Any], seed: int, stream: int) -> list[Any]:
    """Returns arrays of random signs, of the shapes and dtypes of `like`."""
    xp, ops = backend
    words = xp.empty(sum(a.size for a in like), "uint32")
    ops.philox(words, seed, stream, _SIGNS)
    signs, start = [], 0
    for a in like:
        part = words[start : start + a.size] >> 31
        signs.append((1.0 - 2.0 * part).astype(a.dtype).reshape(a.shape))
        start += a.size
    return signs


def _sampled(backend: Backend, logits: Any, seed: int) -> Any:
    """Returns (p - onehot(y)) / sqrt(N), y drawn from p = softmax(logits): the squared gradient is then batch * g²."""
    xp, ops = backend
    samples, classes = logits.shape
    z = logits.astype("float64")
    p = xp.exp(z - z.max(axis=1, keepdims=True))
    sums = xp.cumsum(p, axis=1)
    words = xp.empty(samples, "uint32")
    ops.philox(words, seed, _STREAM, _LABELS)
    # Half a unit in the middle keeps u strictly between 0 and 1: a class of probability 0 is never drawn.
    u = ((words.astype("float64") + 0.5) * 2.0**-32)[:, None] * sums[:, -1:]
    y = (sums < u).sum(axis=1)
    p /= sums[:, -1:]
    p[xp.arange(samples), xp.minimum(y, classes - 1)] -= 1.0
    return (p / math.sqrt(samples)).astype(logits.dtype)
