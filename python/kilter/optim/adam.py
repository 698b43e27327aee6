"""Adam and its kin: first and second moments of the gradients, corrected for their start at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilter._check import fail
from kilter.optim.arrays import Rule, Slot
from kilter.optim.base import Optimizer
from kilter.optim.options import Number, check_betas, check_flags, check_numbers

__all__ = ["Adam", "AdamW", "Adamax", "NAdam"]


MOMENTS = (Slot("m"), Slot("v"))
MOMENTS_AND_LARGEST = (*MOMENTS, Slot("v_max"))


class _Moments(Optimizer):
    """Optimizers whose clock counts the products of the betas, which correct the moments."""

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_numbers(options, "lr", "eps", "weight_decay")
        check_betas(options)

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        return MOMENTS

    def _start(self) -> dict[str, float]:
        return {"t": 0, "product1": 1.0, "product2": 1.0}

    def _advance(self, options: Mapping[str, Any], clock: dict[str, float]) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        return {
            "t": clock["t"] + 1,
            "product1": clock["product1"] * beta1,
            "product2": clock["product2"] * beta2,
        }


def _adam(options: Mapping[str, Any], clock: dict[str, float], l2: float, keep: float) -> Rule:
    size = options["lr"] / (1.0 - clock["product1"])
    name = "amsgrad" if options["amsgrad"] else "adam"
    return Rule(name, (l2, keep, *options["betas"], options["eps"], 1.0 - clock["product2"], size, 0.0))


class _Largest(_Moments):
    """Those that may use the largest second moment."""

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        check_flags(options, "amsgrad")

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        return MOMENTS_AND_LARGEST if options["amsgrad"] else MOMENTS


class Adam(_Largest):
    """Adam.

    With g the gradient plus `weight_decay` times the parameter, and t the number of applied steps, this one included:

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g²,
    p <- p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).

    With `amsgrad`, v in the last line is the largest v so far, taken before it is corrected. With a schedule for beta1,
    beta1^t is the product of those used.

    Args:
        params: a list, a dict name -> array, or a list of group dicts with "params" and options of their own. Float64,
            float32, float16 or bfloat16 arrays, C-contiguous; they are updated in place.
        lr: learning rate, a number or a function of the number of calls so far.
        betas: decay of the first and of the second moment; the first may be a function of the number of calls so far.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient; a number or a function of the number of calls so far.
        amsgrad: use the largest second moment.
        state_dtype: "float32" or "bfloat16" for the moments of parameters that are not float64; None means float32.

    The other arguments are those of `SGD`.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 28 bytes per float32 parameter, 36 with `amsgrad`; 20 and 24 with moments in bfloat16. Moments smaller
        than 1e-30 in float32 are set to zero: subnormal numbers would make the step several times slower.

        Bfloat16 has 8 significant bits: a change of less than 1/512 is rounded away. With a beta2 above 0.996, v in
        bfloat16 never falls, whatever the gradients: take 0.99 or less.

    References:
        Kingma, Ba 2015, arXiv:1412.6980, algorithm 1; Reddi, Kale, Kumar 2018, arXiv:1904.09237.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        *,
        betas: tuple[Number, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        amsgrad: bool = False,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        return _adam(options, clock, options["weight_decay"], 1.0)


class AdamW(_Largest):
    """Adam with decoupled weight decay.

    As `Adam`, but the decay is no part of the gradient: before the step, p <- (1 - lr weight_decay) p; with
    `decay="independent"`, p <- (1 - weight_decay) p, whatever the learning rate.

    The arguments are those of `Adam`, and

    Args:
        weight_decay: what is taken off, a number or a function of the number of calls so far.
        decay: "lr", as in PyTorch, or "independent".

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    References:
        Loshchilov, Hutter 2019, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        *,
        betas: tuple[Number, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        decay: str = "lr",
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decay": decay,
        }
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        if options["decay"] not in ("lr", "independent"):
            fail("decay", "'lr' or 'independent'", repr(options["decay"]))

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        times = options["lr"] if options["decay"] == "lr" else 1.0
        return _adam(options, clock, 0.0, 1.0 - times * options["weight_decay"])


class Adamax(_Moments):
    """Adam with the largest gradient in place of the root of the squares.

    With g, m and t as in `Adam`: u <- max(beta2 u, |g| + eps),  p <- p - lr (m / (1 - beta1^t)) / u.

    The arguments are those of `Adam` but for `amsgrad`; `eps` is added to |g|.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 28 bytes per float32 parameter.

    References:
        Kingma, Ba 2015, arXiv:1412.6980, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 2e-3,
        *,
        betas: tuple[Number, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        return (Slot("m"), Slot("u"))

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        size = options["lr"] / (1.0 - clock["product1"])
        return Rule("adamax", (options["weight_decay"], *options["betas"], options["eps"], size))


class NAdam(_Moments):
    """Adam with Nesterov's look ahead.

    With g, m, v, t as in `Adam`, mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2), and M_t the product of mu_1 to mu_t:

    p <- p - lr (mu_(t+1) m / (1 - M_t mu_(t+1)) + (1 - mu_t) g / (1 - M_t)) / (sqrt(v / (1 - beta2^t)) + eps).

    The arguments are those of `Adam` but for `amsgrad`, and

    Args:
        momentum_decay: how fast mu rises from half of beta1 to beta1.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 28 bytes per float32 parameter. This is PyTorch's form. Keras has 0.96^t in place of 0.96^(t
        momentum_decay), optax neither factor: mu is beta1 there.

    References:
        Dozat 2016, "Incorporating Nesterov momentum into Adam".
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 2e-3,
        *,
        betas: tuple[Number, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 0.0,
        momentum_decay: float = 4e-3,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay}
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        check_numbers(options, "momentum_decay")

    def _start(self) -> dict[str, float]:
        return {"t": 0, "mu_product": 1.0, "product2": 1.0}

    def _advance(self, options: Mapping[str, Any], clock: dict[str, float]) -> dict[str, float]:
        t = clock["t"] + 1
        return {
            "t": t,
            "mu_product": clock["mu_product"] * _mu(options, t),
            "product2": clock["product2"] * options["betas"][1],
        }

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        mu, following, product = _mu(options, clock["t"]), _mu(options, clock["t"] + 1), clock["mu_product"]
        size = options["lr"] * following / (1.0 - product * following)
        look = options["lr"] * (1.0 - mu) / (1.0 - product)
        scalars = (*options["betas"], options["eps"], 1.0 - clock["product2"], size, look)
        return Rule("nadam", (options["weight_decay"], 1.0, *scalars))


def _mu(options: Mapping[str, Any], t: float) -> float:
    mu: float = options["betas"][0] * (1.0 - 0.5 * 0.96 ** (t * options["momentum_decay"]))
    return mu
