"""What a call allocates: its results and little else."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from kilter import init
from kilter.norm import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from kilter.stats import RunningStats, moments
from optimizers import KINDS as OPTIMIZERS
from optimizers import Newton
from support import DTYPES, arithmetic


def largest_allocation(work):
    """Bytes that NumPy held at most during work(), over what it held before."""
    work()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", ["channels first", "channels last", "channels-last memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_copies_nothing(rng, dtype, layout):
    x, r, dy, out, dx = (rng.normal(size=(8, 16, 64, 64)).astype(dtype) for _ in range(5))
    axis = -1 if layout == "channels last" else 1
    if layout == "channels-last memory":
        x, r, dy, out, dx = (a.transpose(0, 3, 1, 2) for a in (x, r, dy, out, dx))
    gamma, beta = np.ones((2, x.shape[axis]), arithmetic(dtype))
    running = RunningStats(x.shape[axis], dtype=arithmetic(dtype))
    options = {"axis": axis, "residual": r, "activation": "relu", "running": running}

    def train():
        _, cache = batch_norm(x, gamma, beta, **options, out=out)
        batch_norm_backward(dy, cache, out=dx)

    limit = x.nbytes / 20
    # dresidual is a result of its own: as large as x, and the only one.
    assert largest_allocation(train) < x.nbytes + limit
    options["residual"] = None
    assert largest_allocation(train) < limit
    assert largest_allocation(lambda: batch_norm(x, gamma, beta, **options, training=False, out=out)) < limit
    assert largest_allocation(lambda: moments(x, axis)) < limit


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (lambda x, *affine, **options: group_norm(x, 1, *affine, **options), group_norm_backward),
        (instance_norm, instance_norm_backward),
    ],
    ids=["group", "instance"],
)
@pytest.mark.parametrize("layout", ["channels first", "channels last", "channels-last memory"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_samples_copy_nothing(rng, dtype, layout, forward, backward):
    x, dy, out, dx = (rng.normal(size=(8, 16, 64, 64)).astype(dtype) for _ in range(4))
    axis = -1 if layout == "channels last" else 1
    if layout == "channels-last memory":
        x, dy, out, dx = (a.transpose(0, 3, 1, 2) for a in (x, dy, out, dx))
    gamma, beta = np.ones((2, x.shape[axis]), arithmetic(dtype))

    def train():
        backward(dy, forward(x, gamma, beta, axis=axis, out=out)[1], out=dx)

    assert largest_allocation(train) < x.nbytes / 20


@pytest.mark.parametrize("shape", [(8, 32, 4096), (16384, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_norms_copy_nothing(rng, dtype, shape):
    x, r, dy, out, dx = (rng.normal(size=shape).astype(dtype) for _ in range(5))
    gamma, beta = np.ones((2, shape[-1]), arithmetic(dtype))

    def train():
        layer_norm_backward(dy, layer_norm(x, gamma, beta, out=out)[1], out=dx)
        rms_norm_backward(dy, rms_norm(x, gamma, out=out)[1], out=dx)

    def added():
        layer_norm_backward(dy, layer_norm(x, gamma, beta, residual=r, out=out)[1], dsum=r, out=dx)

    limit = x.nbytes / 20 + 4 * 8 * x.size // shape[-1]  # and three statistics per row
    assert largest_allocation(train) < limit
    assert largest_allocation(added) < x.nbytes + limit  # the sum is a result of its own


@pytest.mark.parametrize("optimizer", [kind for kind in OPTIMIZERS.values() if kind is not Newton])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_copies_nothing(dtype, optimizer):
    p, g = np.ones((2, 500, 1000), dtype)
    opt = optimizer([p], clip_norm=1.0, skip_nonfinite=True)
    address = p.__array_interface__["data"]
    assert largest_allocation(lambda: opt.step([g])) < p.nbytes / 20
    assert p.__array_interface__["data"] == address


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fill_copies_nothing(dtype):
    out = np.empty((500, 1000), dtype)
    for fill in (init.he_normal, init.he_uniform):
        assert largest_allocation(lambda fill=fill: fill((500, 1000), seed=0, dtype=dtype, out=out)) < out.nbytes / 20


MEMORY = """
import resource, numpy as np
from kilter.norm import batch_norm, batch_norm_backward
from kilter.optim import Adam
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x, y, dx = (np.ones((32, 64, 90, 90), np.float32) for _ in range(3))  # 66 MB each
x[::2] += 1
p, g = np.ones((2, 8_000_000), np.float32)
opt, small = Adam([p]), np.ones((8, 64, 9, 9), np.float32)
small[0] = 2
batch_norm_backward(small, batch_norm(small)[1])
opt.step([g])
start = peak()
batch_norm_backward(x, batch_norm(x, out=y, activation="relu")[1], out=dx)
opt.step([g])
print(peak() - start)
"""


def test_the_core_copies_nothing_either():
    """Memory that NumPy does not see: the peak of a whole process."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8e6
