"""Fixtures shared by all tests. `backend` is where another array library joins every table test."""

import numpy as np
import pytest


class NumpyBackend:
    """Arrays where the CPU kernels read them; `array` keeps strides, dtype and offset as they are."""

    xp = np

    @staticmethod
    def array(a):
        return a

    @staticmethod
    def numpy(a):
        return np.asarray(a)


BACKENDS = {"numpy": NumpyBackend}


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request):
    return BACKENDS[request.param]()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
