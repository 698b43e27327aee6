"""Small arrays with two threads and with one: `python benches/threads.py`.

Small work must not become slower because there are more threads. Two processes, with KILTER_NUM_THREADS=1 and
with 2, take turns; each pair of times gives a ratio, and the median of these is printed.
"""

import os
import subprocess
import sys
from contextlib import ExitStack
from statistics import median

from kilter.bench import norms, optim
from kilter.bench.timing import SAMPLE_SECONDS, repeats, timed

SHAPES = ((1024, 256), (128, 784), (32, 64))
PAIRS = 30


def cases():
    for shape in SHAPES:
        for what in ("forward", "backward"):
            yield norms.case((shape, 1, "float32"), what)
    yield optim.case(optim.Spec("adamw", "200 x 1,000"))


class Worker:
    """A process with its own number of threads that measures when it is asked to."""

    def __init__(self, threads):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=os.environ | {"KILTER_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def seconds(self, case):
        """The time of one call of a case, by its number."""
        print(case, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def serve():
    found = [(case.work, repeats(case.work, SAMPLE_SECONDS)) for case in cases()]
    for number in sys.stdin:
        print(timed(*found[int(number)]), flush=True)


def compared(pairs=PAIRS):
    """Yields the name of a case, its seconds with one and with two threads, and the median ratio."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(threads)) for threads in (1, 2)]
        for number, case in enumerate(cases()):
            times = []
            for pair in range(pairs):
                order = workers if pair % 2 else workers[::-1]
                taken = {worker: worker.seconds(number) for worker in order}
                times.append([taken[worker] for worker in workers])
            one, two = (median(column) for column in zip(*times, strict=True))
            yield case.name, one, two, median(two / one for one, two in times)


def lines(pairs=PAIRS):
    """The table of `compared`."""
    for name, one, two, ratio in compared(pairs):
        yield f"{name:<46}{1e6 * one:>9.1f} us with 1 thread {1e6 * two:>9.1f} us with 2   ratio {ratio:.2f}"


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        for text in lines():
            print(text, flush=True)
