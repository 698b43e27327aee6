"""What large calls take from the system, in a process of their own: how far the peak of memory rises, page faults."""

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


STEPS = """
import resource, sys
import numpy as np
from kilter import nn, optim, train
from kilter.data import Batches

class Faults(train.Callback):
    def __init__(self):
        self.seen = []

    def on_step(self, state):
        self.seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        if sys.argv[2] == "fresh":
            state.model.reuse_buffers(False)

x = np.random.default_rng(0).standard_normal((4 * 64, 1, 28, 28), np.float32)
model, faults = nn.MODELS[sys.argv[1]](x.shape[1:], 10), Faults()
batches = Batches(x, np.arange(len(x)) % 10, 64, seed=0)
optimizer = optim.AdamW(model.params())
train.fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=5, progress=False, callbacks=[faults])
print((faults.seen[-1] - faults.seen[7]) / (len(faults.seen) - 8))
"""


@pytest.mark.parametrize(
    ("model", "buffers"), [("mlp", "reused"), ("cnn", "reused"), ("resnet", "reused"), ("cnn", "fresh")]
)
def test_page_faults_of_a_steady_training_step(model, buffers):
    """Next to none: every large array is that of the step before."""
    arguments = [sys.executable, "-c", STEPS, model, buffers]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) < 5) == (buffers == "reused"), done.stdout
