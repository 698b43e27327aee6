"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilter import _check
from kilter._check import fail
from kilter.optim.base import MOST, Number, Optimizer, Rule

__all__ = ["Adam", "AdamW"]


class _Moments(Optimizer):
    """Optimizers with a first and a second moment whose start at zero is corrected."""

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for key in ("lr", "eps", "weight_decay"):
            if not callable(options[key]):
                _check.number(key, options[key], 0.0, MOST)
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            fail("betas", "two numbers", repr(betas))
        for index, beta in enumerate(betas):
            if not (index == 0 and callable(beta)):
                _check.number(f"betas[{index}]", beta, 0.0, 1.0)
                if beta == 1.0:
                    fail(f"betas[{index}]", "a number below 1", beta)

    def _slots(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("m", "v", "v_max") if options["amsgrad"] else ("m", "v")

    def _start(self) -> dict[str, float]:
        return {"t": 0, "product1": 1.0, "product2": 1.0}

    def _advance(self, options: Mapping[str, Any], clock: dict[str, float]) -> dict[str, float]:
        beta1, beta2 = options["betas"]
        return {
            "t": clock["t"] + 1,
            "product1": clock["product1"] * beta1,
            "product2": clock["product2"] * beta2,
        }

    def _moments(
        self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[str, ...], l2: float, keep: float
    ) -> Rule:
        beta1, beta2 = options["betas"]
        name = "amsgrad" if "v_max" in slots else "adam"
        bias1, bias2 = 1.0 - clock["product1"], 1.0 - clock["product2"]
        return Rule(name, (options["lr"], l2, keep, beta1, beta2, options["eps"], bias1, bias2))


class Adam(_Moments):
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
        maximize: climb instead of descending.
        clip_norm: all gradients together are scaled to at most this Euclidean norm.
        clip_value: each element of a gradient is limited to ± this, after `clip_norm`.
        track_norm: report the norm of the gradients.
        skip_nonfinite: skip a step with a non-finite gradient; None means only with a scaler.
        master_dtype: "auto" keeps a float32 copy of 16-bit parameters, which is updated and rounded into them; None
            updates the 16-bit values themselves.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 28 bytes per float32 parameter, 36 with `amsgrad`. Moments smaller than 1e-30 in float32 are set to zero:
        subnormal numbers would make the step several times slower.

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
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad},
            maximize=maximize,
            clip_norm=clip_norm,
            clip_value=clip_value,
            track_norm=track_norm,
            skip_nonfinite=skip_nonfinite,
            master_dtype=master_dtype,
        )

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[str, ...]) -> Rule:
        return self._moments(options, clock, slots, options["weight_decay"], 1.0)


class AdamW(_Moments):
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
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "decay": decay},
            maximize=maximize,
            clip_norm=clip_norm,
            clip_value=clip_value,
            track_norm=track_norm,
            skip_nonfinite=skip_nonfinite,
            master_dtype=master_dtype,
        )

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        if options["decay"] not in ("lr", "independent"):
            fail("decay", "'lr' or 'independent'", repr(options["decay"]))

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[str, ...]) -> Rule:
        times = options["lr"] if options["decay"] == "lr" else 1.0
        return self._moments(options, clock, slots, 0.0, 1.0 - times * options["weight_decay"])
