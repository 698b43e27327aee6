"""Fixtures shared by all tests. `backend` is where another array library joins every table test."""

import os
from itertools import combinations

import numpy as np
import pytest

import cudasim
from kilter import _backend, _kilter
from kilter._backend import backend_named


class NumpyBackend:
    """Arrays where the CPU kernels read them; `array` keeps strides, dtype and offset as they are."""

    xp, ops = np, _kilter

    @staticmethod
    def array(a):
        return a

    @staticmethod
    def numpy(a):
        return np.asarray(a)


class CudaBackend:
    """Arrays on the simulated device: every kernel that a test launches runs in several orders of its threads.

    `array` copies to the device and keeps strides, dtype and offset.
    """

    xp = cudasim.xp

    def __init__(self):
        self.runtime = cudasim.SimRuntime()
        self.ops = cudasim.install(self.runtime)

    @staticmethod
    def array(a):
        return cudasim.alike(a)

    @staticmethod
    def numpy(a):
        return cudasim.xp.asnumpy(a)


class CupyBackend:
    """Arrays on a device; `KILTER_TEST_CUPY=1 pytest` adds it to the others."""

    def __init__(self):
        self.xp, self.ops = backend_named("cuda")

    def array(self, a):
        """A copy with the strides of the original, as far from a word of 16 bytes, in native byte order."""
        a = np.asarray(a)
        dtype = a.dtype.newbyteorder("=")
        if not a.size:
            return self.xp.empty(a.shape, dtype)
        low, high = np.lib.array_utils.byte_bounds(a)
        start = low % 16 // dtype.itemsize * dtype.itemsize
        room = self.xp.empty(start + high - low, "uint8")
        first = room.data + (start + a.__array_interface__["data"][0] - low)
        there = self.xp.ndarray(a.shape, dtype, first, a.strides)
        there[...] = self.xp.asarray(np.ascontiguousarray(a, dtype))
        return there

    def numpy(self, a):
        return self.xp.asnumpy(a)


BACKENDS = {"numpy": NumpyBackend, "cuda": CudaBackend}
if os.environ.get("KILTER_TEST_CUPY") == "1":
    BACKENDS["cupy"] = CupyBackend
ON_CUDA = {
    "test_cuda_flat",
    "test_norm",
    "test_norm_edges",
    "test_norm_properties",
    "test_stats",
    "test_boundary",
    "test_layer_norm",
    "test_group_norm",
    "test_optim",
    "test_optim_averages",
    "test_optim_groups",
    "test_optim_newton",
    "test_optim_tools",
    "test_optim_rules",
    "test_optim_state",
    "test_losses",
    "test_data_augment",
}  # the files whose tests run on both


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = BACKENDS if metafunc.module.__name__ in ON_CUDA else ("numpy",)
        metafunc.parametrize("backend", names, indirect=True, scope="session")


def pytest_collection_modifyitems(config, items):
    """Of a table marked `pairs`, the simulator runs so many cases that any two values of two parameters meet."""
    tables = {}
    for item in items:
        if item.get_closest_marker("pairs") and item.callspec.params.get("backend") == "cuda":
            tables.setdefault(item.function, []).append(item)
    left_out = set()
    for cases in tables.values():
        values = {item: sorted((name, repr(value)) for name, value in item.callspec.params.items()) for item in cases}
        pairs = {item: set(combinations(values[item], 2)) for item in cases}
        missing, chosen = set().union(*pairs.values()), set()
        while missing:
            best = max(cases, key=lambda item: len(pairs[item] & missing))
            chosen.add(best)
            missing -= pairs[best]
        left_out |= set(cases) - chosen
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def backend(request, cuda):
    return cuda if request.param == "cuda" else BACKENDS[request.param]()


@pytest.fixture(scope="session")
def cuda():
    """The simulated device alone."""
    return CudaBackend()


@pytest.fixture
def recorder(cuda):
    """The simulated device with a stream that records launches, as a CUDA graph does."""
    runtime = cudasim.Recorder()
    cudasim.install(runtime)
    yield runtime
    _backend.register(cudasim.SimArray, cudasim.xp, cuda.ops)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
