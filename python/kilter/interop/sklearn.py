"""The optimizers behind scikit-learn's multi-layer perceptrons, with kilter's kernels.

`MLPClassifier` and `MLPRegressor` take the place of scikit-learn's, whose subclasses they are:

    from kilter.interop.sklearn import MLPClassifier

    MLPClassifier(hidden_layer_sizes=(256, 128), solver="adam").fit(x, y)

They find the same weights within rounding. With `solver="lbfgs"` they are scikit-learn's. Estimators of one's own that
derive from scikit-learn's get the optimizers by deriving from `KilterOptimizers` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import neural_network

from kilter import optim
from kilter._check import fail, number

__all__ = ["AdamOptimizer", "KilterOptimizers", "MLPClassifier", "MLPRegressor", "SGDOptimizer"]

TOO_SMALL = 1e-6  # a learning rate that "adaptive" divides no further


class BaseOptimizer:
    """What both share; its methods are those that `MLPClassifier.fit` calls.

    Attributes:
        learning_rate: of the last step, or of the next one; see the classes.
    """

    def __init__(self, params: Sequence[Any], learning_rate_init: float) -> None:
        self.learning_rate_init = number("learning_rate_init", learning_rate_init, 0.0, open_low=True)
        self.learning_rate = self.learning_rate_init
        self._optimizer = self._made(list(params))

    def update_params(self, params: Sequence[Any], grads: Sequence[Any]) -> None:
        """Takes a step.

        Args:
            params: the arrays to update; usually those of construction. Others of the same shapes take their place, and
                go on with their state.
            grads: their gradients; rounded where their dtype is another.

        Raises:
            KilterError: an array does not fit; nothing has changed then.
        """
        own = self._params()
        if len(params) != len(own) or any(a is not b for a, b in zip(params, own, strict=True)):
            moved = self._made(list(params))
            moved.load_state_dict(self._optimizer.state_dict())
            self._optimizer = moved
        if len(grads) == len(params):
            grads = [np.asarray(g, p.dtype) for g, p in zip(grads, params, strict=True)]
        self._step(list(grads))

    def iteration_ends(self, time_step: int) -> None:
        """Is called after each epoch with the number of samples seen so far."""

    def trigger_stopping(self, msg: str, verbose: bool) -> bool:
        """Says whether to stop, now that training gets no further; with `verbose`, prints `msg` and what is done."""
        if verbose:
            print(msg + " Stopping.")
        return True

    def _made(self, params: list[Any]) -> optim.Optimizer:
        """Returns an optimizer of kilter for these parameters."""
        raise NotImplementedError

    def _step(self, grads: list[Any]) -> None:
        self._optimizer.step(grads)

    def _params(self) -> list[Any]:
        return list(self._optimizer.groups[0]["params"].values())

    def _state(self, slot: str) -> list[Any]:
        """Returns copies of a kind of state, one array per parameter."""
        state = self._optimizer.state_dict()
        return [state[f"state.{index}.{slot}"] for index in range(len(self._params()))]

    def __getstate__(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.__dict__.items() if key != "_optimizer"}
        return {**plain, "params": self._params(), "state": self._optimizer.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        params, own = state["params"], state["state"]
        self.__dict__.update({key: value for key, value in state.items() if key not in ("params", "state")})
        self._optimizer = self._made(params)
        self._optimizer.load_state_dict(own)


class SGDOptimizer(BaseOptimizer):
    """Gradient descent with momentum, the learning rate inside the velocity.

    v <- momentum v + lr g,  p <- p - v;  with `nesterov`, p <- p - (momentum v + lr g).

    Args:
        params: arrays, updated in place.
        learning_rate_init: lr at the start.
        lr_schedule: "constant"; "invscaling", lr = learning_rate_init / (samples seen + 1)^power_t from epoch to epoch;
            "adaptive", lr / 5 whenever training gets no further, down to 1e-6.
        momentum: in [0, 1].
        nesterov: look ahead.
        power_t: the exponent of "invscaling".

    Attributes:
        learning_rate: of the next step.
        velocities: copies of -v, as scikit-learn has it; zeros without momentum.

    Raises:
        KilterError: an argument does not fit.
    """

    def __init__(
        self,
        params: Sequence[Any],
        learning_rate_init: float = 0.1,
        lr_schedule: str = "constant",
        momentum: float = 0.9,
        nesterov: bool = True,
        power_t: float = 0.5,
    ) -> None:
        if lr_schedule not in ("constant", "invscaling", "adaptive"):
            fail("lr_schedule", "'constant', 'invscaling' or 'adaptive'", repr(lr_schedule))
        self.lr_schedule, self.momentum, self.nesterov = lr_schedule, momentum, nesterov
        self.power_t = number("power_t", power_t)
        super().__init__(params, learning_rate_init)

    @property
    def velocities(self) -> list[Any]:
        """Copies of what was last added to each parameter by the rule without `nesterov`."""
        return [-v for v in self._state("velocity")] if self.momentum else [0 * p for p in self._params()]

    def iteration_ends(self, time_step: int) -> None:
        """Lowers the learning rate of "invscaling", after an epoch; `time_step` samples have been seen."""
        if self.lr_schedule == "invscaling":
            self.learning_rate = self.learning_rate_init / (time_step + 1) ** self.power_t

    def trigger_stopping(self, msg: str, verbose: bool) -> bool:
        """Says whether to stop, now that training gets no further; "adaptive" goes on with a fifth of the rate."""
        if self.lr_schedule != "adaptive":
            return super().trigger_stopping(msg, verbose)
        if self.learning_rate <= TOO_SMALL:
            return super().trigger_stopping(msg + " Learning rate too small.", verbose)
        self.learning_rate /= 5.0
        if verbose:
            print(msg + f" Setting learning rate to {self.learning_rate:f}")
        return False

    def _made(self, params: list[Any]) -> optim.Optimizer:
        # Without momentum there is nothing to look ahead along.
        nesterov = bool(self.nesterov and self.momentum)
        return optim.SGD(params, self.learning_rate, momentum=self.momentum, nesterov=nesterov, lr_inside=True)

    def _step(self, grads: list[Any]) -> None:
        self._optimizer.groups[0]["lr"] = self.learning_rate
        super()._step(grads)


class AdamOptimizer(BaseOptimizer):
    """Adam, with epsilon beside the root of the moment that is not corrected.

    lr_t = learning_rate_init sqrt(1 - beta_2^t) / (1 - beta_1^t),  p <- p - lr_t m / (sqrt(v) + epsilon)

    Args:
        params: arrays, updated in place.
        learning_rate_init: the learning rate.
        beta_1: decay of the first moment m, in [0, 1).
        beta_2: decay of the second moment v, in [0, 1).
        epsilon: at least 0.

    Attributes:
        learning_rate: lr_t of the last step.
        t: the number of steps.
        ms, vs: copies of the moments.

    Raises:
        KilterError: an argument does not fit.

    References:
        Kingma, Ba 2015, arXiv:1412.6980, section 2, the order of computation that it calls more efficient.
    """

    def __init__(
        self,
        params: Sequence[Any],
        learning_rate_init: float = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        self.beta_1, self.beta_2, self.t = beta_1, beta_2, 0
        self.epsilon = number("epsilon", epsilon, 0.0)
        super().__init__(params, learning_rate_init)

    @property
    def ms(self) -> list[Any]:
        """Copies of the first moments."""
        return self._state("m")

    @property
    def vs(self) -> list[Any]:
        """Copies of the second moments."""
        return self._state("v")

    def _made(self, params: list[Any]) -> optim.Optimizer:
        return optim.Adam(params, self.learning_rate_init, betas=(self.beta_1, self.beta_2), eps=self.epsilon)

    def _step(self, grads: list[Any]) -> None:
        root = (1 - self.beta_2 ** (self.t + 1)) ** 0.5
        # Beside the root of the corrected moment, which is larger by 1 / root.
        self._optimizer.groups[0]["eps"] = self.epsilon / root
        super()._step(grads)
        self.t += 1
        self.learning_rate = self.learning_rate_init * root / (1 - self.beta_1**self.t)


class KilterOptimizers:
    """Makes an estimator that derives from one of scikit-learn's perceptrons train with kilter's optimizers.

    >>> class Mine(KilterOptimizers, neural_network.MLPClassifier): ...
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # Where `fit` keeps the optimizer that it has made for coefs_ and intercepts_.
        if name == "_optimizer" and not isinstance(value, BaseOptimizer):
            value = _taken_over(value, [*self.coefs_, *self.intercepts_])  # type: ignore[attr-defined]
        super().__setattr__(name, value)


class MLPClassifier(KilterOptimizers, neural_network.MLPClassifier):
    """`sklearn.neural_network.MLPClassifier` with kilter's optimizers."""


class MLPRegressor(KilterOptimizers, neural_network.MLPRegressor):
    """`sklearn.neural_network.MLPRegressor` with kilter's optimizers."""


def _taken_over(theirs: Any, params: list[Any]) -> BaseOptimizer:
    """Returns the optimizer of this module that goes on like one of scikit-learn's that has not begun."""
    if type(theirs).__name__ == "SGDOptimizer":
        schedule, moving = (theirs.learning_rate_init, theirs.lr_schedule), (theirs.momentum, theirs.nesterov)
        return SGDOptimizer(params, *schedule, *moving, theirs.power_t)
    if type(theirs).__name__ == "AdamOptimizer":
        return AdamOptimizer(params, theirs.learning_rate_init, theirs.beta_1, theirs.beta_2, theirs.epsilon)
    return fail("_optimizer", "an optimizer of scikit-learn", type(theirs).__name__)
