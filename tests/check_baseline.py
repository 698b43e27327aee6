"""Runs kernels on an emulated processor without AVX2, F16C and FMA, and compares their bits with those of this one.

    python tests/check_baseline.py      needs qemu-x86_64 (Debian's qemu-user); says so where there is none

A kernel that takes an instruction which its level does not have ends the emulated process.
"""

import hashlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np

from kilter import _kilter, init, norm, optim

PROCESSOR = "max,-avx2,-f16c,-fma,-bmi1,-bmi2,-avx512f"  # NumPy itself needs AVX of an emulated one
DTYPES = ("float64", "float32", "float16", ml_dtypes.bfloat16)


def results(dtype):
    """(name, arrays) of a handful of calls."""
    x = init.normal((4, 6, 30, 30), seed=1, std=2.0, dtype=dtype)
    dy = init.normal(x.shape, seed=2, dtype=dtype)
    for axis, a, b in ((1, x, dy), (-1, x.transpose(0, 2, 3, 1).copy(), dy.transpose(0, 2, 3, 1).copy())):
        y, cache = norm.batch_norm(a, axis=axis, activation="relu")
        yield f"batch norm {axis}", (y, norm.batch_norm_backward(b, cache).dx)
        y, cache = norm.group_norm(a, 2, axis=axis)
        yield f"group norm {axis}", (y, norm.group_norm_backward(b, cache).dx)
    small = x.reshape(-1)[:7350].reshape(3, 50, 7, 7).copy()
    yield "small planes", (norm.batch_norm(small)[0],)
    y, cache = norm.layer_norm(x.reshape(24, 900))
    yield "layer norm", (y, norm.layer_norm_backward(dy.reshape(24, 900), cache).dx)
    p = x.reshape(-1)[:1003].copy()
    optim.AdamW([p]).step([dy.reshape(-1)[:1003]])
    yield "adamw", (p,)


def digests():
    """One line for each call."""
    yield f"level {_kilter.simd_level()}"
    for dtype in DTYPES:
        for name, arrays in results(dtype):
            digest = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]
            yield f"{np.dtype(dtype).name} {name}: {digest}"


def main():
    if "--digests" in sys.argv:
        print(*digests(), sep="\n")
        return 0
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        print("qemu-x86_64 is not installed: processors without AVX2 are not tried")
        return 0
    command = [sys.executable, __file__, "--digests"]
    done = subprocess.run([emulator, "-cpu", PROCESSOR, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the emulated process ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return 1
    level, *there = done.stdout.splitlines()
    here = list(digests())[1:]
    other = [f"{one}, emulated {two}" for one, two in zip(here, there, strict=True) if one != two]
    print(*other, f"{len(there)} results at {level}: {len(other)} differ", sep="\n")
    return bool(other) or level != "level baseline"


if __name__ == "__main__":
    sys.exit(main())
