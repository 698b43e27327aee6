"""Batch norm over all ranks of a run."""

from __future__ import annotations

from typing import TypeVar

from kilter import _check
from kilter._check import fail
from kilter.dist import Communicator
from kilter.nn.module import Module
from kilter.nn.norms import BatchNorm

M = TypeVar("M", bound=Module)


def convert_sync_batchnorm(model: M, comm: Communicator | None) -> M:
    """Make every BatchNorm of a model take its statistics over all ranks.

    Parameters
    ----------
    model
        Changed where it is: parameters, running statistics, names and modes stay.
    comm
        This rank's communicator, of `kilter.dist`. None undoes the conversion.

    Returns
    -------
    Module
        `model` itself.

    Raises
    ------
    KilterError
        An argument is not as above; nothing has changed then.

    Notes
    -----
    Every training step then exchanges, for each layer, count, mean and m2 in the forward pass and two vectors in
    the backward pass: all ranks must take it together, one with an empty batch too. Eval mode exchanges nothing.
    """
    if not isinstance(model, Module):
        fail("model", "a Module", type(model).__name__)
    _check.communicator(comm)
    for _, module in model.modules():
        if isinstance(module, BatchNorm):
            module.comm = comm
    return model
