"""Optimizers that divide by the root of the squares of the gradients: of all, of the recent, of the last few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilter._check import fail
from kilter.optim.arrays import Rule, Slot
from kilter.optim.base import Optimizer
from kilter.optim.options import Number, check_flags, check_numbers, check_window

__all__ = ["Adadelta", "Adagrad", "RMSprop"]


class Adagrad(Optimizer):
    """Adagrad.

    With g the gradient plus `weight_decay` times the parameter, and t the number of applied steps, this one included:

    s <- s + g²,  p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps);

    with `lagged`, the textbook's form, the division is by the s before this step.

    Args:
        params: a list, a dict name -> array, or a list of group dicts with "params" and options of their own.
        lr: learning rate, a number or a function of the number of calls so far.
        lr_decay: how fast the learning rate falls.
        weight_decay: L2 penalty, added to the gradient; a number or a function of the number of calls so far.
        initial_accumulator_value: s at the start.
        eps: added to the root.
        lagged: divide by the squares of the earlier steps. Needs an initial value: from zero, the first step would
            divide by eps alone and throw the parameters away.

    The other arguments are those of `SGD`.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 20 bytes per float32 parameter.

    References:
        Duchi, Hazan, Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization".
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        *,
        lr_decay: float = 0.0,
        weight_decay: Number = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        lagged: bool = False,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "lagged": lagged,
        }
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_numbers(options, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
        check_flags(options, "lagged")
        if options["lagged"] and options["initial_accumulator_value"] == 0.0:
            wanted = "an initial_accumulator_value above 0 (from 0 the first step divides by eps alone, and explodes)"
            fail("lagged", wanted, options["initial_accumulator_value"])

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        return (Slot("sum", start=float(options["initial_accumulator_value"])),)

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        lr = options["lr"] / (1.0 + (clock["t"] - 1) * options["lr_decay"])
        return Rule("rmsprop", (lr, options["weight_decay"], options["eps"], 1.0, 0.0, options["lagged"], 0.0))


class RMSprop(Optimizer):
    """RMSprop.

    With g the gradient plus `weight_decay` times the parameter:

    v <- alpha v + (1 - alpha) g²,  p <- p - lr g / (sqrt(v) + eps).

    With `centered`, the mean of the gradients, decaying likewise, is kept too, and v is the variance around it. With
    `momentum`, b <- momentum b + g / (sqrt(v) + eps), p <- p - lr b. With `window=L`, v is alpha times the mean of the
    squares of the last L gradients (of all, up to the L-th step), this one included, plus 1 - alpha times g².

    Args:
        params: a list, a dict name -> array, or a list of group dicts with "params" and options of their own.
        lr: learning rate, a number or a function of the number of calls so far.
        alpha: decay of the squares; with a window, the weight of their mean.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient; a number or a function of the number of calls so far.
        momentum: weight of the old velocity, a number or a function of the number of calls so far.
        centered: divide by the standard deviation.
        window: None, or how many steps the squares are kept for.

    The other arguments are those of `SGD`.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 20 bytes per float32 parameter, 8 more each with `centered` and `momentum`; with `window=L` 12 + 4 L, 8
        more with `momentum`, and L - 1 squares are kept per parameter. The older ones are added up anew at each step.

        The variance is kept itself, not as a difference, which would cancel.

    References:
        Hinton 2012, "Neural networks for machine learning", lecture 6; centred: Graves 2013, arXiv:1308.0850.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        momentum: Number = 0.0,
        centered: bool = False,
        window: int | None = None,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "window": window,
        }
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_numbers(options, "lr", "eps", "weight_decay")
        check_numbers(options, "alpha", "momentum", high=1.0)
        check_flags(options, "centered")
        check_window(options)
        if options["centered"] and options["window"] is not None:
            fail("centered", "no window", options["window"])

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        velocity = () if options["momentum"] == 0.0 else (Slot("velocity"),)
        if options["window"] is not None:
            return (_window("squares", options), *velocity)
        if options["centered"]:
            return (Slot("variance"), Slot("mean"), *velocity)
        return (Slot("square"), *velocity)

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        moving = "_momentum" if slots[-1].name == "velocity" else ""
        scalars = (options["lr"], options["weight_decay"], options["eps"])
        alpha, momentum, window = options["alpha"], options["momentum"], options["window"]
        if window is None:
            kind = "rmsprop_centered" if options["centered"] else "rmsprop"
            return Rule(kind + moving, (*scalars, 1.0 - alpha, 1.0, 0.0, momentum))
        weights = _weights(alpha, window, clock["t"])
        return Rule("rmsprop_window" + moving, (*scalars, *weights, momentum), _oldest(slots, clock))


class Adadelta(Optimizer):
    """Adadelta.

    With g the gradient plus `weight_decay` times the parameter:

    v <- rho v + (1 - rho) g²,  d = sqrt(u + eps) / sqrt(v + eps) g,  p <- p - lr d,  u <- rho u + (1 - rho) d².

    With `window=L`, v is rho times the mean of the squares of the last L gradients (of all, up to the L-th step), this
    one included, plus 1 - rho times g²; u is rho times the mean of the up to L - 1 squared d older than the last (of
    the last itself if there are none), plus 1 - rho times the last.

    Args:
        params: a list, a dict name -> array, or a list of group dicts with "params" and options of their own.
        lr: factor of the step, a number or a function of the number of calls so far.
        rho: decay of the squares; with a window, the weight of their mean.
        eps: added under both roots; the steps start at about its root.
        weight_decay: L2 penalty, added to the gradient; a number or a function of the number of calls so far.
        window: None, or how many steps the squares are kept for.

    The other arguments are those of `SGD`.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 28 bytes per float32 parameter; with `window=L` 20 + 8 L, and 2 L - 1 numbers are kept per parameter. The
        older squares are added up anew at each step.

    References:
        Zeiler 2012, arXiv:1212.5701.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1.0,
        *,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: Number = 0.0,
        window: int | None = None,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "window": window}
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_numbers(options, "lr", "eps", "weight_decay")
        check_numbers(options, "rho", high=1.0)
        check_window(options)

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        if options["window"] is None:
            return (Slot("square"), Slot("update"))
        return (_window("squares", options), _window("updates", options), Slot("update"))

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        rho, window, t = options["rho"], options["window"], clock["t"]
        scalars = (options["lr"], options["weight_decay"], options["eps"])
        if window is None:
            return Rule("adadelta", (*scalars, rho))
        count = min(t - 2, window - 1)  # of updates older than the last
        updates = (rho / count, 1.0 - rho) if count > 0 else (0.0, 1.0)
        return Rule("adadelta_window", (*scalars, *_weights(rho, window, t), *updates), _oldest(slots, clock))


def _window(name: str, options: Mapping[str, Any]) -> Slot:
    """Returns the slot of the older squares; with a window of one, a row that weighs nothing."""
    return Slot(name, max(options["window"] - 1, 1))


def _weights(rho: float, window: int, t: float) -> tuple[float, float]:
    """Returns the weights of each older square and of the present one in rho mean + (1 - rho) g²."""
    share = rho / min(t, window)
    return share if window > 1 else 0.0, share + 1.0 - rho


def _oldest(slots: tuple[Slot, ...], clock: dict[str, float]) -> int:
    """Returns the row of the windows that this step replaces."""
    return int(clock["t"] - 1) % (slots[0].rows or 1)
