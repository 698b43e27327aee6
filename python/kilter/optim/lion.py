"""Lion: steps of one size, along the sign of an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilter.optim.arrays import Rule, Slot
from kilter.optim.base import Optimizer
from kilter.optim.options import Number, check_betas, check_numbers

__all__ = ["Lion"]


class Lion(Optimizer):
    """Lion (evolved sign momentum).

    p <- (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g),  m <- beta2 m + (1 - beta2) g.

    The sign of zero is zero.

    Args:
        params: a list, a dict name -> array, or a list of group dicts with "params" and options of their own.
        lr: size of the steps, a number or a function of the number of calls so far; a third to a tenth of Adam's.
        betas: weight of the average in the step, and its decay; the first may be a function of the number of calls so
            far.
        weight_decay: decoupled decay, a number or a function of the number of calls so far; three to ten times Adam's.

    The other arguments are those of `SGD`.

    Raises:
        KilterError: an argument does not fit; the message names the parameter.

    Notes:
        Moves 20 bytes per float32 parameter.

    References:
        Chen et al. 2023, arXiv:2302.06675, program 1.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-4,
        *,
        betas: tuple[Number, float] = (0.9, 0.99),
        weight_decay: Number = 0.0,
        maximize: bool = False,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        track_norm: bool = False,
        skip_nonfinite: bool | None = None,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        common = (maximize, clip_norm, clip_value, track_norm, skip_nonfinite, master_dtype, state_dtype)
        super().__init__(params, options, *common)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_numbers(options, "lr", "weight_decay")
        check_betas(options)

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        return (Slot("m"),)

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        return Rule("lion", (options["lr"], 1.0 - options["lr"] * options["weight_decay"], *options["betas"]))
