"""Steps on a device: clocks, scales, norms and whether a step is skipped stay there, and the host waits for none.

A step has three kinds of launches: one reads the gradients, if they are measured; one ticks, which moves the clocks and
makes the scalars of the rules; the others apply these, all tensors of the same dtypes at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kilter import _check, _kilter
from kilter._backend import Backend, beside, host
from kilter._check import fail
from kilter.optim.arrays import Bucket, Pass
from kilter.optim.report import DeviceReport, StepReport
from kilter.optim.scaler import LossScaler

if TYPE_CHECKING:
    from kilter.optim.base import Optimizer

# What the clock of a rule needs of the options, besides the scalars of the rule.
_EXTRAS = {
    "momentum": ("dampening",),
    "rmsprop": ("lr_decay",),
    "rmsprop_window": ("alpha", "window"),
    "rmsprop_window_momentum": ("alpha", "window"),
    "adadelta_window": ("rho", "window"),
    "nadam": ("lr", "momentum_decay"),
    "newton": ("beta",),
}
_REPORTS = 256  # that lie in one array
_CLOCK = 3  # numbers of a clock


def uncorrected(clock: Mapping[str, float]) -> dict[str, float]:
    """Returns the clock of a first step at which nothing is corrected: the device knows the true one."""
    return {**dict.fromkeys(clock, 0.0), "t": 1}


class DeviceSteps:
    """What the steps of an optimizer keep on the device, for one layout of its buckets."""

    def __init__(self, backend: Backend, buckets: Sequence[Bucket], applied: int) -> None:
        self.backend = backend
        self._like = buckets[0].params[0]
        self._rows = {id(bucket): i for i, bucket in enumerate(buckets, 1)}
        start = np.zeros((1 + len(buckets), _CLOCK))
        start[0, 0] = applied
        for row, bucket in zip(start[1:], buckets, strict=True):
            row[: len(bucket.clock)] = list(bucket.clock.values())
        with beside(self._like):
            self._clocks = backend.xp.asarray(start)
            self._found = backend.xp.zeros((2, 2))
        self._layouts: dict[Any, _Layout] = {}
        self.captured: list[tuple[_Layout, list[Pass], list[Any]]] = []  # with the arrays that graphs know
        self._reports: Any = None
        self._reported = 0
        self._stale = False

    def pull(self, buckets: Sequence[Bucket]) -> int | None:
        """Tells the buckets their clocks, and returns the number of applied steps; None if nothing has changed."""
        if not self._stale:
            return None
        self._stale = bool(self.captured)  # a graph may be replayed at any time
        rows = host(self._clocks)
        for bucket, row in zip(buckets, rows[1:], strict=True):
            bucket.clock = dict(zip(bucket.clock, row.tolist(), strict=False))
        return int(rows[0, 0])

    def step(self, optimizer: Optimizer, plan: list[Pass], scaler: LossScaler | None) -> StepReport:
        """Takes a step, or has a CUDA graph record it."""
        ops, capturing = self.backend.ops, self.backend.ops.capturing()
        layout = self._layout(plan, capturing)
        layout.prepare(plan, capturing)
        row = self._report_row()
        if capturing:
            self.captured.append((layout, plan, [*layout.tables(), row]))
        else:
            layout.upload(plan)
        skip = scaler is not None if optimizer.skip_nonfinite is None else optimizer.skip_nonfinite
        reports_norm = optimizer.track_norm or optimizer.clip_norm is not None
        found, scans = None, 0
        if skip or scaler is not None or reports_norm:
            found = self._found
            scans = layout.scan(found)
        run = (
            math.inf if optimizer.clip_norm is None else optimizer.clip_norm,
            math.inf if optimizer.clip_value is None else optimizer.clip_value,
            -1.0 if optimizer.maximize else 1.0,
            float(skip),
            *((0.0,) * 4 if scaler is None else (scaler.growth, scaler.backoff, scaler.interval, scaler.minimum)),
        )
        with beside(self._like):
            scale = None if scaler is None else scaler.there(self.backend)
        ops.tick(layout.table, found, scans, scale, self._clocks, row, np.array(run))
        self._stale = True
        layout.launch()
        if not capturing:
            optimizer.calls += 1
        return DeviceReport(optimizer.calls, row, reports_norm, skip, capturing)

    def before_replay(self, optimizer: Optimizer) -> None:
        """Hands the options of the next call to the steps that were captured."""
        for layout, plan, _ in self.captured:
            for one in plan:
                optimizer._renew(one)
            layout.upload(plan)

    def _layout(self, plan: list[Pass], capturing: bool) -> _Layout:
        key = tuple((id(one.bucket), one.rule.name) for one in plan)
        found = self._layouts.get(key)
        if found is None:
            if capturing:
                fail("step", "one such step before the capture", "none")
            with beside(self._like):
                clocks = [self._clocks[self._rows[id(one.bucket)]] for one in plan]
                found = self._layouts[key] = _Layout(self.backend, plan, clocks)
        return found

    def _report_row(self) -> Any:
        """Returns three numbers that no other step fills."""
        if self._reports is None or self._reported == len(self._reports):
            with beside(self._like):
                self._reports, self._reported = self.backend.xp.empty((_REPORTS, 3)), 0
        self._reported += 1
        return self._reports[self._reported - 1]


class _Layout:
    """The passes of a kind of step: which of them are launched together, and their scalars on the device."""

    def __init__(self, backend: Backend, plan: list[Pass], clocks: list[Any]) -> None:
        xp, self._ops = backend.xp, backend.ops
        self._options = xp.zeros(sum(map(len, map(list, self._numbers(plan)))))
        self._known: list[float] = []
        groups: dict[Any, list[int]] = {}
        for i, one in enumerate(plan):
            groups.setdefault((one.rule.name, one.of_gradients), []).append(i)
        self._groups = [_Group(rule, chosen, plan, xp) for (rule, _), chosen in groups.items()]
        rows = {i: group.h[k] for group in self._groups for k, i in enumerate(group.chosen)}
        passes, start = [], 0
        for i, (one, numbers) in enumerate(zip(plan, self._numbers(plan), strict=True)):
            options = self._options[start : start + len(numbers)]
            clock = clocks[i] if one.of_gradients else None
            passes.append((one.rule.name, options, clock, rows[i], one.of_gradients))
            start += len(numbers)
        self.table = self._ops.passes(passes)

    def prepare(self, plan: list[Pass], capturing: bool) -> None:
        """Checks every argument; nothing has changed before."""
        for group in self._groups:
            group.prepare(self._ops, [plan[i] for i in group.chosen], capturing)

    def tables(self) -> list[Any]:
        """Returns what launches read at present; another set of gradients replaces it."""
        return [group.prepared for group in self._groups]

    def upload(self, plan: list[Pass]) -> None:
        """Hands the options of this call to the device, if they are others than those of the last."""
        numbers = [number for some in self._numbers(plan) for number in some]
        if numbers != self._known:
            self._options.set(np.array(numbers))
            self._known = numbers

    def scan(self, found: Any) -> int:
        """Measures the gradients, and then what else is given; returns how many results there are."""
        self._ops.scan([group.prepared for group in self._groups if group.of_gradients], found[0])
        others = [group.prepared for group in self._groups if not group.of_gradients]
        if others:
            self._ops.scan(others, found[1])
        return 2 if others else 1

    def launch(self) -> None:
        """Takes the step."""
        for group in self._groups:
            group.prepared.launch(group.h)

    @staticmethod
    def _numbers(plan: list[Pass]) -> Iterator[list[float]]:
        """Yields what the device needs of the options of each pass."""
        curved = {id(one.bucket) for one in plan if not one.of_gradients}
        for one in plan:
            extras = [float(one.options.get(key, 0.0)) for key in _EXTRAS.get(one.rule.name, ())]
            if one.rule.name == "newton" and id(one.bucket) not in curved:
                extras = [1.0]  # the curvatures are as many as before
            yield [*map(float, one.rule.scalars), *extras]


class _Group:
    """Passes of one rule, which are launched together."""

    def __init__(self, rule: str, chosen: list[int], plan: list[Pass], xp: Any) -> None:
        self.rule, self.chosen, self.of_gradients = rule, chosen, plan[chosen[0]].of_gradients
        self.h = xp.zeros((len(chosen), 3 + len(plan[chosen[0]].rule.scalars)))
        self.prepared: Any = None

    def prepare(self, ops: Any, plan: list[Pass], capturing: bool) -> None:
        """Looks whether the gradients are where they were; if not, checks everything and makes another table."""
        if self.prepared is not None and self.prepared.fits([g for one in plan for g in one.grads]):
            return
        if capturing:
            fail("step", "a step with these very gradients before the capture", "others")
        try:
            self.prepared = ops.prepare(self.rule, self._parts(plan))
        except _kilter.LayoutError:
            for one in plan:
                one.straighten()
            self.prepared = ops.prepare(self.rule, self._parts(plan))
        except _check.KilterError:
            for one in plan:
                one.blame()
            raise

    @staticmethod
    def _parts(plan: list[Pass]) -> list[tuple[Any, ...]]:
        return [(one.bucket.names, one.params, one.grads, one.state, one.masters) for one in plan]
