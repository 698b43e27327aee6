"""The sanitizers see what is planted in a kernel, beyond what the simulator sees, and say where."""

import subprocess
import sys

import pytest

import cuda_asan

PLANTED = """KT_KERNEL(64) sound(float* y, const float* x) { store<4>(y + 4 * threadIdx.x, load<4>(x)); }
KT_KERNEL(64) stores_behind(float* y, const float* x) { y[threadIdx.x + 193] = x[threadIdx.x]; }
KT_KERNEL(64) loads_behind(float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x + 193]; }
KT_KERNEL(64) loads_before(float* y, const float* x) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; }
KT_KERNEL(64) misaligned_word(float* y, const float* x) { store<4>(y, load<4>(x + 1)); }
KT_KERNEL(64) loads_shared(float* y, const float* x) {
  KT_SHARED(float, shared, 64);
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x + 1];
}
"""
FOUND = {
    "stores_behind": ("AddressSanitizer: use-after-poison", "WRITE of size 4", "planted.cu:2"),
    "loads_behind": ("AddressSanitizer: use-after-poison", "READ of size 4", "planted.cu:3"),
    "loads_before": ("AddressSanitizer: use-after-poison", "READ of size 4", "planted.cu:4"),
    "misaligned_word": ("misaligned address", "planted.cu:5"),
    "loads_shared": ("AddressSanitizer: use-after-poison", "READ of size 4", "planted.cu:10"),
}
CHILD = """
import sys, numpy as np, cudasim
from kilter.cuda import source
from kilter.cuda.launch import Launcher
kernel, text = sys.argv[1:]
text = source._file("common.cuh") + '\\n#line 1 "planted.cu"\\n' + text
source.text = lambda name: text
x, y = cudasim.xp.zeros(256, "float32"), cudasim.xp.zeros(256, "float32")
Launcher(cudasim.SimRuntime(orders=(0,))).module(source.Family("planted", {})).launch(kernel, 1, 64, y, x)
"""


def launched(kernel):
    """The exit status and what was said of a launch of one of these kernels."""
    command = [sys.executable, "-c", CHILD, kernel, PLANTED]
    done = subprocess.run(
        command, env=cuda_asan.environment(), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kernel", FOUND)
def test_faults_end_the_process(kernel):
    status, said = launched(kernel)
    assert status, said
    for words in FOUND[kernel]:
        assert words in said


def test_what_is_sound_goes_on():
    assert launched("sound") == (0, "")


def test_a_few_kernels_of_every_family():
    command = [sys.executable, cuda_asan.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{len(cuda_asan.FEW)} passed" in done.stdout
