"""The operations of the Rust core on NumPy arrays.

Every operation fills arrays that are given to it and returns None. Arrays are C-contiguous, aligned and of
native byte order; written ones share memory with no other. Data are float64, float32, float16 or bfloat16.
gamma, beta, hi, lo, rstd, weights, running statistics and optimizer state have the dtype of the arithmetic:
float64 for float64, else float32; optimizer state may be bfloat16 instead of float32. count, mean, m2, sums and
h are float64. Scalars that change from step to step travel in the vector h.
"""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

__all__ = [
    "CHECK_ONLY",
    "KilterError",
    "LayoutError",
    "__version__",
    "after_fork",
    "bn_apply",
    "bn_backward",
    "bn_backward_apply",
    "bn_backward_reduce",
    "bn_finish",
    "bn_infer",
    "bn_stats",
    "bn_train",
    "ema",
    "fill_normal",
    "fill_uniform",
    "gn_backward",
    "gn_forward",
    "grad_scan",
    "ln_backward",
    "ln_forward",
    "num_threads",
    "philox",
    "probe_copy",
    "probe_update",
    "simd_level",
    "softmax_cross_entropy",
    "step",
]

_Array: TypeAlias = np.ndarray[Any, Any]

__version__: Final[str]
CHECK_ONLY: Final[int]
"""The bit of `flags` that says: check every argument, change nothing."""

class KilterError(ValueError):
    """An argument does not fit; the message names it."""

class LayoutError(KilterError):
    """An input would have to be copied first; Python does that."""

def simd_level() -> str:
    """Returns the level of SIMD instructions in use: baseline, avx2 or avx512."""

def num_threads() -> int:
    """Returns the number of threads in use."""

def after_fork() -> None:
    """Replaces the thread pool; to be called in a child process right after a fork."""

def bn_stats(x: _Array, axis: int, weights: _Array | None, count: _Array, mean: _Array, m2: _Array) -> None:
    """Fills count, mean and centred second moment of each channel; weights has one value per position."""

def bn_finish(
    count: _Array,
    mean: _Array,
    m2: _Array,
    h: _Array,
    hi: _Array,
    lo: _Array,
    rstd: _Array,
    running_mean: _Array | None,
    running_var: _Array | None,
) -> None:
    """Fills mean = hi + lo and rstd, moves the running statistics; h = (eps, momentum, unbiased)."""

def bn_apply(
    x: _Array,
    axis: int,
    hi: _Array,
    lo: _Array,
    rstd: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    residual: _Array | None,
    relu: bool,
    y: _Array,
) -> None:
    """Fills y = ((x - hi) - lo) * (gamma * rstd) + beta (+ residual), cut off below zero with relu."""

def bn_infer(
    x: _Array,
    axis: int,
    eps: float,
    gamma: _Array | None,
    beta: _Array | None,
    residual: _Array | None,
    relu: bool,
    running_mean: _Array,
    running_var: _Array,
    mean: _Array,
    hi: _Array,
    lo: _Array,
    rstd: _Array,
    y: _Array,
) -> None:
    """Fills y, mean = hi + lo and rstd from the running statistics, as bn_finish and bn_apply do."""

def bn_train(
    x: _Array,
    axis: int,
    weights: _Array | None,
    h: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    residual: _Array | None,
    relu: bool,
    count: _Array,
    mean: _Array,
    m2: _Array,
    hi: _Array,
    lo: _Array,
    rstd: _Array,
    running_mean: _Array | None,
    running_var: _Array | None,
    y: _Array,
) -> None:
    """Fills what bn_stats, bn_finish and bn_apply fill, same bits, in fewer passes over memory."""

def bn_backward_reduce(
    dy: _Array,
    x: _Array,
    axis: int,
    hi: _Array,
    lo: _Array,
    rstd: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    residual: _Array | None,
    relu: bool,
    sum_dy: _Array,
    sum_dy_xhat: _Array,
) -> None:
    """Fills the gradients of beta and gamma: sums of dz and dz * x̂; dz is dy behind the ReLU's mask."""

def bn_backward_apply(
    dy: _Array,
    x: _Array,
    axis: int,
    weights: _Array | None,
    count: _Array,
    hi: _Array,
    lo: _Array,
    rstd: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    residual: _Array | None,
    relu: bool,
    sum_dy: _Array,
    sum_dy_xhat: _Array,
    dx: _Array,
    dresidual: _Array | None,
) -> None:
    """Fills dx, and dz into dresidual, from the sums; sums of zero take the statistics as constant."""

def bn_backward(
    dy: _Array,
    x: _Array,
    axis: int,
    weights: _Array | None,
    count: _Array,
    hi: _Array,
    lo: _Array,
    rstd: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    residual: _Array | None,
    relu: bool,
    sum_dy: _Array,
    sum_dy_xhat: _Array,
    dx: _Array,
    dresidual: _Array | None,
) -> None:
    """Fills what bn_backward_reduce and bn_backward_apply fill, same bits, in fewer passes over memory.

    On the CPU either sum may be float32: rounded from its float64.
    """

def gn_forward(
    x: _Array,
    axis: int,
    groups: int,
    h: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    mean: _Array,
    m2: _Array,
    y: _Array,
) -> None:
    """Fills mean and m2 of each group of each sample, and y; axis is 1 or the last; h = (eps,)."""

def gn_backward(
    dy: _Array,
    x: _Array,
    axis: int,
    groups: int,
    h: _Array,
    mean: _Array,
    m2: _Array,
    gamma: _Array | None,
    sum_dy: _Array,
    sum_dy_xhat: _Array,
    dx: _Array,
) -> None:
    """Fills the gradients of beta, gamma and x from what gn_forward filled; h = (eps,)."""

def ln_forward(
    x: _Array,
    residual: _Array | None,
    h: _Array,
    gamma: _Array | None,
    beta: _Array | None,
    hi: _Array | None,
    lo: _Array | None,
    rstd: _Array,
    sum: _Array | None,
    y: _Array,
) -> None:
    """Fills mean = hi + lo and rstd of each row of a matrix (h = (eps,)), y, and sum = x + residual.

    Without hi and lo: y = x * rstd * gamma + beta, where rstd is that of the mean square.
    """

def ln_backward(
    dy: _Array,
    x: _Array,
    gamma: _Array | None,
    hi: _Array | None,
    lo: _Array | None,
    rstd: _Array,
    dsum: _Array | None,
    sum_dy: _Array,
    sum_dy_xhat: _Array,
    dx: _Array,
) -> None:
    """Fills the gradients of beta, gamma and x from what ln_forward filled; dsum is added to dx."""

def ema(s: _Array, x: _Array, h: _Array) -> None:
    """Moves s to s + momentum * (x - s); h = (momentum,)."""

def step(
    rule: str,
    names: Sequence[str],
    params: Sequence[_Array],
    grads: Sequence[_Array],
    state: Sequence[_Array],
    masters: _Array | None,
    h: _Array,
    flags: int,
) -> None:
    """Updates params, state and masters by a rule; h = (scale and limit of gradients, oldest, scalars of the rule).

    Arrays of float16, bfloat16 and float32 may stand beside each other. State is flat, one element per parameter; that
    of windows has two axes, a row for each of the last steps, of which `oldest` is replaced. Masters are flat. The
    rules and their scalars, with the windows (w) and other slots that each has:

    sgd (lr, l2); momentum (l2, momentum, rate, size, look): 1; rmsprop (lr, l2, eps, rate, pull, lagged, momentum): 1,
    rmsprop_momentum and rmsprop_centered likewise: 2, rmsprop_centered_momentum: 3; rmsprop_window (lr, l2, eps, past,
    now, momentum): w, rmsprop_window_momentum: w + 1; adadelta (lr, l2, eps, rho): 2; adadelta_window (lr, l2, eps,
    past, now, older, last): w + w + 1; adam and nadam (l2, keep, beta1, beta2, eps, bias2, size, look): 2, amsgrad: 3;
    adamax (l2, beta1, beta2, eps, size): 2; lion (lr, keep, beta1, beta2): 1; newton (lr, damping, inverse, clip): 1;
    curvature (rate): 0, params are the averages and grads the curvature.
    """

def grad_scan(names: Sequence[str], grads: Sequence[_Array], out: _Array) -> None:
    """Fills out with the sum of the squares of all gradients, and 1 or 0 for whether all are finite."""

def softmax_cross_entropy(
    logits: _Array,
    targets: _Array,
    weights: _Array | None,
    on: float,
    off: float,
    dlogits: _Array,
) -> float:
    """Returns the loss and fills dlogits (N, K), from float64 or float32 logits and targets, float64: labels (N,) or
    probabilities (N, K). on and off are the smoothing; weights (N,), float64, are 1 / N where they are missing.
    """

def philox(out: _Array, seed: int, stream: int, attempt: int = 0) -> None:
    """Fills a uint32 array with Philox4x32-10 words."""

def fill_uniform(out: _Array, seed: int, stream: int, h: _Array) -> None:
    """Fills out with shift + scale * u, u uniform on [0, 1); h = (shift, scale)."""

def fill_normal(out: _Array, seed: int, stream: int, h: _Array, attempt: int = 0) -> None:
    """Fills out with shift + scale * z, z standard normal; h = (shift, scale)."""

def probe_copy(source: _Array, target: _Array) -> None:
    """Fills target with source, float32: the yardstick of what writes a new array."""

def probe_update(inputs: Sequence[_Array], arrays: Sequence[_Array]) -> None:
    """Adds the sum of inputs to each of one to four float32 arrays: the yardstick of an optimizer with as many."""
