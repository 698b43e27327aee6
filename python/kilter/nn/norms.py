"""Normalisation layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from kilter._backend import backend_of, host, place
from kilter._check import KilterError, arithmetic, dtype_of, ready
from kilter.dist import Communicator
from kilter.nn.module import Array, Module, State
from kilter.norm import batch_norm, batch_norm_backward
from kilter.norm.steady import Backward, Forward
from kilter.schedule import Schedule
from kilter.stats import Moments, RunningStats


class BatchNorm(Module):
    """y = activation(gamma (x - mean) / sqrt(var + eps) + beta), per channel over the batch.

    Parameters
    ----------
    features
        Number of channels.
    axis
        The channel axis: 1, or -1 for channels-last.
    eps
        Added to the variance.
    momentum
        Weight of the new batch in the running statistics; None is the cumulative average; or a schedule.
    affine
        Whether there are `gamma` (ones at first) and `beta` (zeros).
    unbiased
        Whether the running variance is n/(n-1)-corrected.
    activation
        None or "relu", fused.
    dtype
        Of x. Parameters and statistics have the dtype of the arithmetic: float64 for float64, else float32.

    Notes
    -----
    In `eval()`, and while frozen, the running statistics normalise and do not change. A batch of one value
    per channel raises a KilterError in training. `comm`, None at first, is a communicator of `kilter.dist`:
    statistics are then those of all ranks (see `convert_sync_batchnorm`).

    References
    ----------
    Ioffe, Szegedy, 2015, arXiv:1502.03167.
    """

    def __init__(
        self,
        features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | Schedule | None = 0.1,
        affine: bool = True,
        unbiased: bool = True,
        activation: str | None = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__()
        if activation not in (None, "relu"):
            raise KilterError(f"activation: expected None or 'relu', got {activation!r}")
        real = arithmetic("dtype", dtype_of("dtype", dtype))
        self.axis, self.eps, self.activation = axis, eps, activation
        self.comm: Communicator | None = None
        self._make_running = partial(RunningStats, features, momentum=momentum, unbiased=unbiased)
        self.running = self._make_running(dtype=real)
        if affine:
            self.add_param("gamma", np.ones(features, real))
            self.add_param("beta", np.zeros(features, real))

    def forward(self, x: Array) -> Array:
        """y, of x's shape and dtype."""
        return self.add(x, None, self.activation)

    def add(self, x: Array, residual: Array | None, activation: str | None) -> Array:
        """activation(norm(x) + residual), in one pass; the layer's own activation is not used."""
        gamma, beta, running = self.own_params.get("gamma"), self.own_params.get("beta"), self.running
        training = self.training and not self.frozen
        options = (self.axis, self.eps, activation, training, self.comm)
        given = (x, gamma, beta, residual, running, running.mean, running.var, *options)
        again: Forward | None = self._scratch.get("forward")
        if again is not None and again.fits(given):
            self._cache = again.cache
            return again()
        self.forget("forward", "backward")
        y: Array
        y, self._cache = batch_norm(
            x,
            gamma,
            beta,
            axis=self.axis,
            eps=self.eps,
            running=running,
            training=training,
            activation=activation,
            residual=residual,
            comm=self.comm,
            out=self.buffer("y", x) if self._reuse else None,
        )
        if self._reuse and Forward.possible(self._cache):
            self._scratch["forward"] = Forward(given, y, self._cache, running, self.eps)
        return y

    @property
    def moments(self) -> Moments | None:
        """Count, mean and m2 of the last batch in training (of all ranks), float64; None before the first."""
        return self._cache.moments if self._cache is not None else None

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """dx, through the batch statistics in training; fills the gradients of gamma and beta."""
        dx, _ = self.add_backward(dy)
        return dx if need_dx else None

    def add_backward(self, dy: Array) -> tuple[Array, Array | None]:
        """dx and the gradient of the residual of the last `add`; fills the gradients of gamma and beta."""
        cache = self.cache()
        again: Backward | None = self._scratch.get("backward")
        if again is not None and again.fits(dy, cache):
            return again()
        x, out, out_residual = cache.x, None, None
        if self._reuse:
            out = self.buffer("dx", x)
            if cache.residual is not None and cache.relu:
                out_residual = self.buffer("dresidual", x)
        found = batch_norm_backward(dy, cache, out=out, out_residual=out_residual)
        self.keep_grads(gamma=found.dgamma, beta=found.dbeta)
        if self._reuse and Forward.possible(cache) and ready(dy) and place(dy) != place(found.dx):
            grads = self.own_grads
            self._scratch["backward"] = Backward(dy, cache, found, grads.get("gamma"), grads.get("beta"))
        return found.dx, found.dresidual

    def convert(self, dtype: np.dtype[Any]) -> None:
        """Parameters and statistics in the dtype of the arithmetic."""
        real = arithmetic("dtype", dtype)
        super().convert(real)
        self._renew(real, backend_of(self.running.mean).xp)

    def move(self, xp: Any) -> None:
        """Parameters and statistics as arrays of the library `xp`."""
        super().move(xp)
        self._renew(self.running.mean.dtype, xp)

    def _renew(self, dtype: np.dtype[Any], xp: Any) -> None:
        state, self.running = self.extra_state(), self._make_running(dtype=dtype, xp=xp)
        self.load_extra_state({name: host(v) if hasattr(v, "shape") else v for name, v in state.items()})

    def extra_state(self) -> State:
        """The running statistics."""
        return {f"running.{name}": value for name, value in self.running.state_dict().items()}

    def load_extra_state(self, state: State) -> None:
        """Take the running statistics back."""
        xp = backend_of(self.running.mean).xp
        given = {name.removeprefix("running."): value for name, value in state.items()}
        self.running.load_state_dict(given | {name: xp.asarray(given[name]) for name in ("mean", "var")})
