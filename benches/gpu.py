"""What kilter does on a CUDA device: is it right, and how fast is it beside the copy, PyTorch and JAX.

    python benches/gpu.py [--out FOLDER] [--parts PART ...] [--minutes N]      on a machine with a device and CuPy
    python benches/gpu.py --simulate                                           the same host code at tiny sizes

Writes gpu.json and gpu.txt to the folder, and prints the text. A time of a line is the median of five repeats of graph
replays over sets of arrays that no cache holds, with the spread of the five; "eager" is the wall clock of calls that
nobody waits for, host included; "2.00x" is twice kilter's time. floor and path are what the copy of the same run would
take for the bytes that must move: each array once, and twice what does not fit on the chip.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from statistics import median

import numpy as np

import gpu_cases
import gpu_checks
import gpu_peers
from gpu_machine import Device, Simulator
from kilter import KilterError

PARTS = ("checks", "ceilings", "clusters", "norms", "losses", "optim", "init")
GOALS = (  # what is compared, the least ratio, of which rows
    ("share of the copy at 100 MB and more", 0.85),
    ("share of the copy at 20 to 50 MB", 0.75),
)


class Report:
    """Lines for people and rows for programs, written after every part: what goes wrong later does not lose them."""

    def __init__(self, folder, about):
        self.folder, self.lines = folder, []
        self.content = {"about": about, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "rows": [], "errors": []}
        self.say(*about, self.content["started"])

    def say(self, *lines):
        for line in lines:
            print(line, flush=True)
            self.lines.append(line)

    def save(self):
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "gpu.json").write_text(json.dumps(self.content, indent=1))
            (self.folder / "gpu.txt").write_text("\n".join(self.lines) + "\n")

    def failed(self, what):
        """Notes an exception that is being handled; the rest goes on."""
        error = sys.exc_info()[1]
        self.content["errors"].append({"what": what, "error": traceback.format_exc()})
        self.say(f"FAILED {what}: {type(error).__name__}: {str(error)[:300]}")


class Bench:
    """A machine, its peers, and the time that is left."""

    def __init__(self, options):
        self.machine = Simulator() if options.simulate else Device()
        self.peers, missing = gpu_peers.peers(options.simulate)
        self.end = time.monotonic() + 60 * options.minutes
        about = [self.machine.about, *(peer.about for peer in self.peers), *missing]
        self.report = Report(options.out, about)
        self.simulated, self.rate, self.wrong = options.simulate, None, 0

    @property
    def late(self):
        return time.monotonic() > self.end

    # ----------------------------------------------------------------------- is it right

    def checks(self):
        found = gpu_checks.checks(self.machine)
        start = time.perf_counter()
        for name, check in found:
            try:
                check()
            except Exception:
                self.wrong += 1
                self.report.failed(name)
            self.machine.free()
        self.report.say(f"{len(found)} checks, {self.wrong} failed, {time.perf_counter() - start:.1f} s")

    # ----------------------------------------------------------------------- what the device can do

    def ceilings(self):
        """Copy, sum and fill of 1 GB; sums of arrays that a cache may hold; what a launch costs."""
        machine, size = self.machine, 4096 if self.simulated else 128 << 20
        sources, targets = ([machine.random((size,), "float32", seed + 10 * k) for k in range(2)] for seed in (1, 2))
        out = machine.xp.zeros(2)
        pairs = list(zip(sources, targets, strict=True))
        self._ceiling("copy", 8 * size, [lambda a=a, b=b: machine.ops.probe_copy(a, b) for a, b in pairs])
        self._ceiling("sum, read only", 4 * size, [lambda a=a: machine.ops.grad_scan(["a"], [a], out) for a in sources])
        self._ceiling("fill, write only", 4 * size, [lambda b=b: b.fill(1.0) for b in targets])
        half = np.array([0.5])
        self._ceiling("update of one", 12 * size, [lambda a=a, b=b: machine.ops.ema(a, b, half) for a, b in pairs])
        for megabytes in (8, 16, 24, 32, 48, 64):
            part = sources[0][: (megabytes << 18) if not self.simulated else 64 * megabytes]
            calls = [lambda a=part: machine.ops.grad_scan(["a"], [a], out)] * 4
            self._ceiling(f"sum of the same {megabytes} MB", part.nbytes, calls)
        one, other = (machine.xp.zeros(1, "float32") for _ in range(2))
        for nodes in (1, 10, 100):
            timing = machine.timing([lambda: machine.ops.ema(one, other, half)] * nodes)
            self._row("ceilings", f"launches of nothing, {nodes}", {"kilter": timing})
            eager = f"{1e6 * median(timing.eager):.2f}" if timing.eager else "-"
            self.report.say(f"  graph of {nodes:3d}: {1e6 * timing.best:.2f} us a launch; eager {eager} us")

    def _ceiling(self, name, moved, calls):
        timing = self.machine.timing(calls)
        rate = moved / timing.best
        if name == "copy":
            self.rate = rate
        self._row("ceilings", name, {"kilter": timing}, bytes=moved, rate=rate)
        self.report.say(f"  {name:28s} {moved / 1e6:9.1f} MB {1e6 * timing.best:9.1f} us {rate / 1e9:8.1f} GB/s")

    def clusters(self):
        """Whether kernels with clusters can be launched, of which sizes, with how much shared memory."""
        from kilter.cuda import source
        from kilter.cuda.launch import Launcher
        from kilter.cuda.source import Family

        known, launcher = source.text, Launcher(self.machine.runtime())
        source.text = lambda name: source._file("common.cuh") + CLUSTER if name == "probe" else known(name)
        try:
            for size in (2, 4, 8, 16):
                for shared in (0, 100 << 10, 200 << 10):
                    y = self.machine.xp.zeros(16 * size)
                    module = launcher.module(Family("probe", {}), SIZE=size)
                    try:
                        module.launch("probe", 16 * size, 32, y, shared // 8, shared=shared)
                        self.machine.wait()
                        right = (self.machine.numpy(y) == size * (size - 1) / 2).all()
                        said = "right" if right else "WRONG"
                    except Exception as error:
                        said = f"{type(error).__name__}: {error}"[:160]
                    self.report.say(f"  clusters of {size:2d}, {shared >> 10:3d} KB: {said}")
        finally:
            source.text = known

    # ----------------------------------------------------------------------- tables

    def norms(self):
        self._table(gpu_cases.norms(self.simulated))
        self._network("bn resnet50 nchw", None if self.simulated else 1.5)
        self._network("bn resnet50 nhwc", None)

    def losses(self):
        self._table(gpu_cases.losses(self.simulated))

    def optim(self):
        self._table(gpu_cases.steps(self.simulated))

    def init(self):
        self._table(gpu_cases.fills(self.simulated))

    def _table(self, cases):
        part = None
        for case in cases:
            if self.late:
                self.report.say(f"no time left for {case.part} {case.name} and what follows")
                return
            if case.part != part:
                part = case.part
                heading = "      MB  floor us   path us  us: kilter (spread), share of the floor; peers"
                self.report.say("", f"{part:38s} {'':8s} {heading}")
            self._line(case)
            self.report.save()

    def _line(self, case):
        timings = {}
        sets = 2 if self.simulated else case.sets
        for way in ("", "cluster", "resident") if "resnet50 n" in case.part else ("",):
            try:
                with self.machine.reading(way):
                    timings[f"kilter {way}".strip()] = self.machine.timing(case.make(self.machine, sets))
            except Exception:
                self.report.failed(f"{case.part} {case.name} {case.dtype} {way}".strip())
            self.machine.free()
        for peer in self.peers:
            try:
                for name, calls in peer.ways(case, sets):
                    timings[name] = peer.timing(calls)
                    calls = None
            except Exception:
                self.report.failed(f"{peer.name}: {case.part} {case.name} {case.dtype}")
            peer.free()
        floor, path = (1e6 * size / self.rate if self.rate else None for size in (case.floor, case.path))
        own = timings.get("kilter")
        share = floor and own and floor / (1e6 * own.best)
        fields = {"dtype": case.dtype, "floor_bytes": case.floor, "path_bytes": case.path, "count": case.count}
        self._row(case.part, case.name, timings, **fields, floor_us=floor, path_us=path, share=share)
        words = [f"{case.name:38s} {case.dtype:8s} {case.floor / 1e6:8.1f}"]
        words += [f"{value:9.1f}" if value else "        -" for value in (floor, path)]
        words += [_said(name, timing, floor, own) for name, timing in timings.items()]
        self.report.say(" ".join(words))

    def _row(self, part, name, timings, **fields):
        numbers = {who: timing.numbers() for who, timing in timings.items()}
        self.report.content["rows"].append({"part": part, "name": name, **fields, "timings": numbers})

    def _network(self, part, goal):
        """Sums over the layers of a network, each as often as it is there."""
        for which in ("forward", "backward"):
            rows = [r for r in self.report.content["rows"] if r["part"] == part and r["name"].endswith(which)]
            everyone = set.intersection(*(set(row["timings"]) for row in rows)) if rows else set()
            totals = {who: sum(r["count"] * r["timings"][who]["us"] for r in rows) / 1e3 for who in sorted(everyone)}
            layers = sum(row["count"] for row in rows)
            said = ", ".join(f"{who} {total:.2f} ms" for who, total in totals.items())
            self.report.say(f"{part} {which}, {layers} layers: {said}")
            if goal and which == "forward" and {"kilter", "torch"} <= everyone:
                ratio = totals["torch"] / totals["kilter"]
                self.report.say(f"  goal: at least {goal} x PyTorch; found {ratio:.2f}")

    def goals(self):
        """The shares of large and of middling arrays, among rows that move floor bytes."""
        rows = [r for r in self.report.content["rows"] if r.get("share") and r["part"] != "init"]
        for (name, least), (low, high) in zip(GOALS, ((100e6, np.inf), (20e6, 50e6)), strict=True):
            chosen = [row for row in rows if low <= row["floor_bytes"] <= high]
            if chosen:
                worst = min(chosen, key=lambda row: row["share"])
                reached = sum(row["share"] >= least for row in chosen)
                self.report.say(
                    f"{name}: {reached} of {len(chosen)} reach {least:.0%}, median "
                    f"{median(row['share'] for row in chosen):.0%}, least {worst['share']:.0%} ({worst['name']})"
                )

    def run(self, parts):
        for part in parts:
            self.report.say("", f"== {part}")
            start = time.perf_counter()
            try:
                getattr(self, part)()
            except Exception:
                self.report.failed(part)
            self.report.say(f"({part}: {time.perf_counter() - start:.1f} s)")
            self.machine.free()
            self.report.save()
        if not self.simulated:
            self.goals()
        errors = len(self.report.content["errors"])
        self.report.say("", f"{errors} errors" if errors else "no errors")
        self.report.save()
        return bool(errors)


CLUSTER = """
KT_KERNEL(32) KT_CLUSTER(KT_SIZE) probe(double* y, int n) {
#if defined(KT_CPU_SIM) || __CUDA_ARCH__ >= 900
  KT_SHARED(double, own, 1);
  KT_DYN_SHARED(double, space);
  for (int i = threadIdx.x; i < n; i += 32) space[i] = i;
  if (threadIdx.x == 0) own[0] = kt_cluster_rank();
  kt_cluster_sync();
  double sum = 0.0;
  for (unsigned rank = 0; rank < KT_SIZE; ++rank) sum += kt_peer(own, rank);
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
  kt_cluster_sync();
#endif
}
"""


def _said(name, timing, floor, own):
    """One library's part of a line."""
    times = timing.device or timing.eager
    text = f"{name} {1e6 * timing.best:.1f} ({1e6 * (max(times) - min(times)):.1f})"
    if floor and name.startswith("kilter"):
        text += f" {floor / (1e6 * timing.best):.0%}"
    if name != "kilter" and own:
        text += f" {timing.best / own.best:.2f}x"
    return text + (f" eager {1e6 * median(timing.eager):.1f}" if timing.device and timing.eager else "") + ";"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the folder for gpu.json and gpu.txt")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no other line of a table begins")
    parser.add_argument("--simulate", action="store_true", help="tiny sizes on the simulator of the tests")
    options = parser.parse_args(arguments)
    try:
        bench = Bench(options)
    except KilterError as error:
        print(error, file=sys.stderr)
        return 2
    return bench.run(options.parts)


if __name__ == "__main__":
    sys.exit(main())
