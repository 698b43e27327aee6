"""Layers with an explicit backward, and losses that return `(loss, gradient)`."""

from kilter.nn.activations import LeakyReLU, ReLU
from kilter.nn.containers import Flatten, Sequential
from kilter.nn.conv import Conv2d
from kilter.nn.dropout import Dropout
from kilter.nn.group_norms import GroupNorm, InstanceNorm
from kilter.nn.linear import Linear
from kilter.nn.losses import bce_with_logits, mse, softmax_cross_entropy
from kilter.nn.models import MODELS, cnn, mlp, resnet
from kilter.nn.module import LoadReport, Module
from kilter.nn.norms import BatchNorm
from kilter.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from kilter.nn.residual import Residual
from kilter.nn.row_norms import LayerNorm, RMSNorm
from kilter.nn.smooth import GELU, Sigmoid, SiLU, Tanh
from kilter.nn.sync import convert_sync_batchnorm

__all__ = [
    "GELU",
    "MODELS",
    "AvgPool2d",
    "BatchNorm",
    "Conv2d",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LoadReport",
    "MaxPool2d",
    "Module",
    "RMSNorm",
    "ReLU",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Tanh",
    "bce_with_logits",
    "cnn",
    "convert_sync_batchnorm",
    "mlp",
    "mse",
    "resnet",
    "softmax_cross_entropy",
]
