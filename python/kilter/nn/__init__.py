"""Layers with an explicit backward, and losses that return `(loss, gradient)`."""

from kilter.nn.activations import ReLU
from kilter.nn.containers import Flatten, Sequential
from kilter.nn.dropout import Dropout
from kilter.nn.group_norms import GroupNorm, InstanceNorm
from kilter.nn.linear import Linear
from kilter.nn.losses import bce_with_logits, mse, softmax_cross_entropy
from kilter.nn.models import mlp
from kilter.nn.module import LoadReport, Module
from kilter.nn.norms import BatchNorm
from kilter.nn.row_norms import LayerNorm, RMSNorm
from kilter.nn.sync import convert_sync_batchnorm

__all__ = [
    "BatchNorm",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Linear",
    "LoadReport",
    "Module",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "bce_with_logits",
    "convert_sync_batchnorm",
    "mlp",
    "mse",
    "softmax_cross_entropy",
]
