"""Runs kilter's CUDA kernels and their host code on the CPU.

`install()` registers arrays of the simulated device with kilter; `cudasim.xp` is their module.
"""

from cudasim.memory import Device, SimArray, alike, to_device, xp
from cudasim.runtime import Recorder, SimError, SimRuntime
from kilter import _backend
from kilter.cuda.ops import table

__all__ = ["Device", "Recorder", "SimArray", "SimError", "SimRuntime", "alike", "install", "to_device", "xp"]


def install(runtime=None):
    """Registers the simulator's arrays and returns the table of operations on them."""
    ops = table(runtime or SimRuntime())
    _backend.register(SimArray, xp, ops)
    return ops
