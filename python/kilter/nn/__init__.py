"""Layers with an explicit backward, and losses that return `(loss, gradient)`."""

from kilter.nn.activations import ReLU
from kilter.nn.containers import Flatten, Sequential
from kilter.nn.dropout import Dropout
from kilter.nn.linear import Linear
from kilter.nn.losses import bce_with_logits, mse, softmax_cross_entropy
from kilter.nn.models import mlp
from kilter.nn.module import LoadReport, Module
from kilter.nn.norms import BatchNorm

__all__ = [
    "BatchNorm",
    "Dropout",
    "Flatten",
    "Linear",
    "LoadReport",
    "Module",
    "ReLU",
    "Sequential",
    "bce_with_logits",
    "mlp",
    "mse",
    "softmax_cross_entropy",
]
