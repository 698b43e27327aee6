"""Normalisation, forward and backward, as functions on arrays."""

from kilter.norm.batch import BatchNormCache, BatchNormGrads, batch_norm, batch_norm_backward
from kilter.norm.group import (
    GroupNormCache,
    GroupNormGrads,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
)
from kilter.norm.layer import (
    LayerNormCache,
    LayerNormGrads,
    RMSNormCache,
    RMSNormGrads,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)

__all__ = [
    "BatchNormCache",
    "BatchNormGrads",
    "GroupNormCache",
    "GroupNormGrads",
    "LayerNormCache",
    "LayerNormGrads",
    "RMSNormCache",
    "RMSNormGrads",
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]
