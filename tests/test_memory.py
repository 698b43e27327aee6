"""How far the peak of resident memory rises over a large forward and backward, in a process of its own."""

import subprocess
import sys

import pytest

MIB = 2**20
SLACK = 8 * MIB  # small arrays, partial sums, stacks of threads

# VmHWM is the process's own peak; ru_maxrss would start at that of the process that started it.
PROGRAM = """
import sys
import ml_dtypes, numpy as np
from kilter.norm import batch_norm, batch_norm_backward

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

dtype, axis, reused = np.dtype(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "reused"
shape = (64, 256, 56, 56) if axis == 1 else (64, 56, 56, 256)
tile = np.random.default_rng(0).standard_normal((1, *shape[1:]), np.float32).astype(dtype)
x, dy, residual = (np.empty(shape, dtype) for _ in range(3))
for array in (x, dy, residual):
    array[...] = tile
del array, tile
y, dx = (np.zeros(shape, dtype) for _ in range(2)) if reused else (None, None)
if reused:
    y[...], dx[...] = x, x  # every page is there
gamma, beta = np.ones((2, 256), np.float32)
small = np.ones((2, 256, 4, 4), dtype)
batch_norm_backward(small, batch_norm(small)[1])
before = peak()
y, cache = batch_norm(x, gamma, beta, axis=axis, residual=residual, out=y)
dx = batch_norm_backward(dy, cache, out=dx).dx
print(peak() - before, x.nbytes)
"""


@pytest.mark.parametrize("outputs", ["fresh", "reused"])
@pytest.mark.parametrize("axis", [1, -1], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_a_large_call(dtype, axis, outputs):
    """y and dx if the call makes them, and no copy of anything, in 16 bit either."""
    arguments = [sys.executable, "-c", PROGRAM, dtype, str(axis), outputs]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    growth, array = map(int, done.stdout.split())
    assert array == 64 * 256 * 56 * 56 * (4 if dtype == "float32" else 2)
    made = 2 * array if outputs == "fresh" else 0
    assert 0.9 * made <= growth <= made + SLACK
