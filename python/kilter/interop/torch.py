"""Optimizers for PyTorch whose step runs kilter's kernels on the parameters' own memory.

They take the place of those in `torch.optim`, with the same arguments in the same order and the same results within
rounding; see `Optimizer` for what they share:

    optimizer = kilter.interop.torch.AdamW(model.parameters(), lr=1e-3)

`Lion`, which PyTorch does not have, keeps its average as "exp_avg".
"""

from __future__ import annotations

from typing import Any

from kilter import optim
from kilter.interop._torch import Optimizer

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "NAdam", "Optimizer", "RMSprop"]

MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}


class SGD(Optimizer):
    """`torch.optim.SGD` with the kernels of `kilter.optim.SGD`."""

    kind, entries, counts = optim.SGD, {"velocity": "momentum_buffer"}, False

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, **options, "maximize": maximize}, master_dtype, state_dtype)


class Adagrad(Optimizer):
    """`torch.optim.Adagrad` with the kernels of `kilter.optim.Adagrad`."""

    kind, entries = optim.Adagrad, {"sum": "sum"}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        start = {"initial_accumulator_value": initial_accumulator_value}
        options = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, **start, "eps": eps}
        super().__init__(params, {**options, "maximize": maximize}, master_dtype, state_dtype)


class RMSprop(Optimizer):
    """`torch.optim.RMSprop` with the kernels of `kilter.optim.RMSprop`.

    With `centered`, kilter keeps the variance, PyTorch the mean square from which it takes the squared mean: what is
    loaded from PyTorch has the rounding errors of that difference.
    """

    kind, entries = optim.RMSprop, {"square": "square_avg", "mean": "grad_avg", "velocity": "momentum_buffer"}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"eps": eps, "weight_decay": weight_decay, "momentum": momentum, "centered": centered}
        super().__init__(params, {"lr": lr, "alpha": alpha, **options, "maximize": maximize}, master_dtype, state_dtype)

    def _entries(self, part: dict[str, Any]) -> dict[str, Any]:
        entries = super()._entries(part)
        if "variance" in entries:
            entries["square_avg"] = entries["variance"] + entries["grad_avg"] ** 2
        return entries

    def _imported(self, name: str, part: dict[str, Any], entries: Any, options: Any) -> dict[str, Any]:
        if "variance" in part and "variance" not in entries and entries.get("square_avg") is not None:
            mean = entries["grad_avg"]
            entries = {**entries, "variance": (entries["square_avg"] - mean**2).clamp(min=0.0)}
        return super()._imported(name, part, entries, options)


class Adadelta(Optimizer):
    """`torch.optim.Adadelta` with the kernels of `kilter.optim.Adadelta`."""

    kind, entries = optim.Adadelta, {"square": "square_avg", "update": "acc_delta"}

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options, master_dtype, state_dtype)


class Adam(Optimizer):
    """`torch.optim.Adam` with the kernels of `kilter.optim.Adam`."""

    kind, entries, decoupled = optim.Adam, MOMENTS, False

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**options, "maximize": maximize}, master_dtype, state_dtype)


class AdamW(Optimizer):
    """`torch.optim.AdamW` with the kernels of `kilter.optim.AdamW`."""

    kind, entries, decoupled = optim.AdamW, MOMENTS, True

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**options, "maximize": maximize}, master_dtype, state_dtype)


class Adamax(Optimizer):
    """`torch.optim.Adamax` with the kernels of `kilter.optim.Adamax`."""

    kind, entries = optim.Adamax, {"m": "exp_avg", "u": "exp_inf"}

    def __init__(
        self,
        params: Any,
        lr: Any = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options, master_dtype, state_dtype)


class NAdam(Optimizer):
    """`torch.optim.NAdam` with the kernels of `kilter.optim.NAdam`; its product of the mu is float64, not float32."""

    kind, entries, decoupled = optim.NAdam, MOMENTS, False

    def __init__(
        self,
        params: Any,
        lr: Any = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay}
        super().__init__(params, {"lr": lr, **options, "maximize": maximize}, master_dtype, state_dtype)


class Lion(Optimizer):
    """`kilter.optim.Lion` for the parameters of PyTorch modules."""

    kind, entries = optim.Lion, {"m": "exp_avg"}

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master_dtype: str | None = "auto",
        state_dtype: Any = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options, master_dtype, state_dtype)
