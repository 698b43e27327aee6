"""Runs CUDA tests on the simulator under AddressSanitizer and UBSan's check of alignment, up to the first fault.

    python tests/cuda_asan.py                        a few launches of every family
    python tests/cuda_asan.py --all                  every test on the simulator: half an hour
    python tests/cuda_asan.py PYTEST ARGUMENTS ...

They see what the simulator does not: loads beyond an array, and words that are not aligned.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
FEW = tuple(
    f"tests/test_cuda_walk.py::test_{name}"
    for name in (
        *("rows[a block]", "rows[parts]", "groups[planes in shared memory]", "groups[last, wide groups]"),
        *("batch[odd columns-twice-plain]", "batch[last-cluster-plain]", "batch[planes-resident-weighted]"),
        *("steps[1-adadelta_window]", "steps_that_are_measured", "fills[131-float16]", "flat[1027]"),
    )
)
ALL = ("tests", "-k", "cuda and not test_cuda_check and not test_cuda_asan")


def environment():
    """The variables of a Python whose kernels are sanitized."""
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"
    known = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KILTER_CUDASIM_ASAN": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": f"{TESTS}:{known}" if known else str(TESTS),
    }


def main(arguments):
    chosen = ALL if arguments == ["--all"] else arguments or FEW
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *chosen]
    return subprocess.run(command, cwd=TESTS.parent, env=environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
