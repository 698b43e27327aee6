"""Plants faults in CUDA kernels, one at a time, and looks whether the tests on the simulator see them.

    python tests/cuda_mutants.py [FILE ...]      every fault in the files, or in all; prints those that no test sees
    python tests/cuda_mutants.py --fixed         a dozen chosen ones, which must all be seen
    python tests/cuda_mutants.py --list [FILE ...]

A fault is a barrier that is missing, a bound that is one too far, a warp operation with another mask, lane or width, or
another leader. Tests see it if they fail, crash, or go on for too long. They run in a copy of the package; what they do
not see they look at once more under the sanitizers of tests/cuda_asan.py.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cuda_asan
import kilter
from cuda_mutants_chosen import CHOSEN, SUITES
from cudasim import build

TESTS, PACKAGE = Path(__file__).parent, Path(kilter.__file__).parent
KERNELS = PACKAGE / "cuda"

RULES = (  # what it does, what stands there, what is put there
    ("without the barrier", r"(?:__syncthreads|__syncwarp|kt_cluster_sync|kt_grid_sync|kt_group_sync)\([^()]*\);", ";"),
    ("< to <=", r"(?<= )<(?= )", "<="),
    ("<= to <", r"(?<= )<=(?= )", "<"),
    (">= to >", r"(?<= )>=(?= )", ">"),
    ("mask without the last lane", r"(?<=_sync\()KT_WARP\b", "0x7fffffffu"),
    ("another lane", r"(__shfl\w+\([^,()]+, [^,]+, )([^,()]+)(?=\))", r"\1(\2) ^ 1"),
    ("half the first distance", r"(int offset = )([^;]+)(?=;)", r"\1(\2) / 2"),
    ("not the last distance", r"\boffset > 0(?=;)", "offset > 1"),
    ("another leader", r"((?:\bthread|\blane|\bj|\bthreadIdx\.[xyz])(?: % \w+)?) == 0", r"\1 == 1"),
    ("another leader", r"(?<=[(|] )?(!?)\b(threadIdx\.[xy])(?=\) return| \|\|)", r"\1(\2 != 1)"),
)


class Mutant(NamedTuple):
    """A file with a fault."""

    file: str
    line: int
    fault: str
    text: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.fault}: {self.text.splitlines()[self.line - 1].strip()}"


class Result(NamedTuple):
    """What the tests made of a mutant: "seen", "sanitized", "survived", or how they could not tell."""

    mutant: Mutant
    verdict: str
    seconds: float
    said: str


def code_of(text):
    """The text that the simulator runs, with blanks for comments, the preprocessor's lines and the device's own."""
    lines, nested = [], []  # of each condition that is open: whether its lines are the device's own
    for line in text.splitlines(keepends=True):
        if line.startswith("#if"):
            simulated = {"#ifdef KT_CPU_SIM": False, "#ifndef KT_CPU_SIM": True}
            nested.append(simulated.get(line.strip(), True if "!defined(KT_CPU_SIM)" in line else None))
        elif line.startswith("#el"):
            nested[-1] = None if nested[-1] is None else not nested[-1]
        elif line.startswith("#endif"):
            nested.pop()
        code = "" if any(nested) or line.startswith("#") else re.sub(r"//.*", "", line.rstrip("\n"))
        lines.append(code.ljust(len(line) - 1) + "\n")
    return "".join(lines)


def mutants(file):
    """Every fault of the rules in a file."""
    text = (KERNELS / file).read_text()
    code = code_of(text)
    for fault, pattern, put in RULES:
        for found in re.finditer(pattern, code):
            changed = text[: found.start()] + found.expand(put) + text[found.end() :]
            if changed != text:
                yield Mutant(file, text.count("\n", 0, found.start()) + 1, fault, changed)


def chosen(file, old, put):
    """The mutant of a fixed list: what stands once in a file, and what is put there."""
    text = (KERNELS / file).read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{file}: {old!r} stands there {text.count(old)} times, not once: choose another fault")
    return Mutant(file, text.count("\n", 0, text.index(old)) + 1, "chosen", text.replace(old, put))


def copy_of_package(folder, mutant):
    """A package that differs in one file."""
    for path in PACKAGE.iterdir():
        if path != KERNELS:
            (folder / "kilter").mkdir(exist_ok=True)
            (folder / "kilter" / path.name).symlink_to(path)
    (folder / "kilter" / "cuda").mkdir()
    for path in KERNELS.iterdir():
        (folder / "kilter" / "cuda" / path.name).symlink_to(path)
    if mutant:
        place = folder / "kilter" / "cuda" / mutant.file
        place.unlink()
        place.write_text(mutant.text)


def outcome(mutant, suite, limit, sanitized=False):
    """Runs tests on a mutant, or on the package as it is."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_package(folder, mutant)
        env = cuda_asan.environment() if sanitized else os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        env["PYTHONPATH"] = f"{folder}:{TESTS}"
        if mutant:  # what is built of it does not stay
            env["KILTER_CUDASIM_CACHE"] = os.pathsep.join(map(str, (folder / "cache", *build.PLACES)))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *suite]
        process = subprocess.Popen(
            command,
            cwd=TESTS.parent,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            status = -signal.SIGKILL
    verdict = {0: "survived", 1: "seen"}.get(status, "seen" if status < 0 else "no tests ran")
    if "RuntimeError: g++" in said:
        verdict = "does not compile"
    return Result(mutant, verdict, time.perf_counter() - start, said)


@cache
def unharmed(suite, limit, sanitized=False):
    """Runs tests without a fault, which leaves modules in the cache; says whether they pass."""
    done = outcome(None, suite, 10 * limit, sanitized)
    print(f"{done.verdict} {done.seconds:.1f} s  without a fault: {' '.join(suite)}", flush=True)
    if done.verdict != "survived":
        print(done.said)
    return done.verdict == "survived"


def judged(mutant, suite, limit):
    """Runs tests on a mutant, and those that see nothing once more under the sanitizers."""
    result = outcome(mutant, suite, limit)
    if result.verdict == "survived" and unharmed(suite, limit, sanitized=True):
        again = outcome(mutant, suite, 4 * limit, sanitized=True)
        if again.verdict == "seen":
            return again._replace(verdict="sanitized", seconds=result.seconds + again.seconds)
    return result


def report(result, number, count):
    print(f"[{number}/{count}] {result.verdict:9s} {result.seconds:5.1f} s  {result.mutant}", flush=True)
    if result.verdict not in ("seen", "sanitized", "survived"):
        print(result.said[-1500:])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="names of .cu and .cuh files")
    parser.add_argument("--fixed", action="store_true", help="only the chosen faults")
    parser.add_argument("--list", action="store_true", help="print the faults and test nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for the tests of a fault")
    options = parser.parse_args(arguments)
    files = options.files or sorted(path.name for path in KERNELS.glob("*.cu*"))
    if options.fixed:
        work = [(chosen(file, old, put), (test,)) for file, old, put, test in CHOSEN]
    else:
        work = [(mutant, SUITES.get(file)) for file in files for mutant in mutants(file)]
    if options.list:
        print(*(mutant for mutant, _ in work), sep="\n")
        return 0
    if unknown := {mutant.file for mutant, suite in work if not suite}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: cuda_mutants_chosen.py names no tests for them")
    start, results = time.perf_counter(), []
    suites = dict.fromkeys(suite for _, suite in work)
    if not all(unharmed(suite, options.limit) for suite in ([sum(suites, ())] if options.fixed else suites)):
        return 2
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda one: judged(*one, options.limit), work):
            results.append(result)
            report(result, len(results), len(work))
    left = [result for result in results if result.verdict not in ("seen", "sanitized")]
    print(f"\n{len(results)} faults, {len(left)} not seen, {time.perf_counter() - start:.0f} s")
    for result in left:
        print(f"{result.verdict}: {result.mutant}")
    return bool(left) if options.fixed else 0


if __name__ == "__main__":
    sys.exit(main())
