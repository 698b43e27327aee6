"""Optimizers that update plain arrays in place, one call into the kernels per step."""

from kilter.optim.adam import Adam, Adamax, AdamW, NAdam
from kilter.optim.adaptive import Adadelta, Adagrad, RMSprop
from kilter.optim.averages import GradAccumulator, WeightEMA
from kilter.optim.base import Optimizer, decay_groups
from kilter.optim.clip import clip_grad_norm, clip_grad_value
from kilter.optim.curvature import gauss_newton_bartlett, hutchinson
from kilter.optim.lion import Lion
from kilter.optim.newton import DiagonalNewton
from kilter.optim.report import StepReport
from kilter.optim.scaler import LossScaler
from kilter.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "DiagonalNewton",
    "GradAccumulator",
    "Lion",
    "LossScaler",
    "NAdam",
    "Optimizer",
    "RMSprop",
    "StepReport",
    "WeightEMA",
    "clip_grad_norm",
    "clip_grad_value",
    "decay_groups",
    "gauss_newton_bartlett",
    "hutchinson",
]
