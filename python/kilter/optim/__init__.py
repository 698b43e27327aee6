"""Optimizers that update plain arrays in place, one call into the kernels per step."""

from kilter.optim.adam import Adam, AdamW
from kilter.optim.base import Optimizer, StepReport, decay_groups
from kilter.optim.scaler import LossScaler
from kilter.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "LossScaler", "Optimizer", "StepReport", "decay_groups"]
