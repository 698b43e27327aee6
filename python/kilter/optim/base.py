"""What all optimizers share: parameters and their groups, state, gradients, the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import is_
from types import MappingProxyType
from typing import Any

from kilter import _check, _kilter
from kilter._backend import Backend, beside, host
from kilter._check import fail
from kilter.optim import arrays, structure
from kilter.optim.arrays import Bucket, Pass, Rule, Slot
from kilter.optim.device import DeviceSteps, uncorrected
from kilter.optim.options import at, numbers, restored
from kilter.optim.report import StepReport
from kilter.optim.scaler import LossScaler

__all__ = ["Optimizer", "StepReport", "decay_groups"]


class Optimizer:
    """The base of all optimizers; see `SGD` for the arguments that all share."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        maximize: bool,
        clip_norm: float | None,
        clip_value: float | None,
        track_norm: bool,
        skip_nonfinite: bool | None,
        master_dtype: str | None,
        state_dtype: Any,
    ) -> None:
        if master_dtype not in ("auto", None):
            fail("master_dtype", "'auto' or None", repr(master_dtype))
        if skip_nonfinite not in (True, False, None):
            fail("skip_nonfinite", "True, False or None", repr(skip_nonfinite))
        for argument, limit in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if limit is not None:
                _check.number(argument, limit, 0.0, open_low=True)
        self._defaults = defaults
        self._keys = {"params", *defaults}
        self._check_options(defaults)
        self.maximize = bool(maximize)
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.track_norm = bool(track_norm)
        self.skip_nonfinite = skip_nonfinite
        self._masters = master_dtype == "auto"
        self._state_dtype = arrays.state_dtype(state_dtype)
        self.calls = 0
        self._applied = 0
        self._device: DeviceSteps | None = None
        self.groups: list[dict[str, Any]] = []
        self._structure: Any = None
        self._frozen: set[str] = set()
        self._buckets: list[Bucket] = []
        groups, self._structure = arrays.groups_of(params)
        for group in groups:
            self._append(group)
        self._backend: Backend = structure.backend("params", self._params())
        self._rebuild()

    @property
    def applied(self) -> int:
        """How many steps changed the parameters; on a GPU, reading it waits for them."""
        self._pull()
        return self._applied

    # What a subclass says of itself.

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses options that do not fit."""
        raise NotImplementedError

    def _slots(self, options: Mapping[str, Any]) -> tuple[Slot, ...]:
        """Returns the state that a parameter of a group has."""
        raise NotImplementedError

    def _rule(self, options: Mapping[str, Any], clock: dict[str, float], slots: tuple[Slot, ...]) -> Rule:
        """Returns the rule of the next step; `options` are resolved, `clock` has been advanced to that step."""
        raise NotImplementedError

    def _start(self) -> dict[str, float]:
        """Returns the clock of a parameter that has not been updated yet."""
        return {"t": 0}

    def _advance(self, options: Mapping[str, Any], clock: dict[str, float]) -> dict[str, float]:
        """Returns the clock after one more applied step."""
        return {"t": clock["t"] + 1}

    # Parameters.

    def add_params(self, group: Any) -> None:
        """Adds parameters: a list, a dict or a group dict with options; their state starts anew.

        Raises:
            KilterError: a parameter does not fit or has a name that is taken; nothing has changed then.
        """
        self._check_intact()
        found, _ = arrays.groups_of([group] if isinstance(group, dict) and "params" in group else group)
        if self._structure != "groups":
            named = all(isinstance(name, str) for name in found[0]["params"])
            if named != (self._structure == "dict"):
                fail("group", f"a {self._structure} of parameters, as at construction", type(group).__name__)
        kept = list(self.groups)
        try:
            for one in found:
                self._append(one)
            self._rebuild()
        except _check.KilterError:
            self.groups = kept
            raise

    def freeze(self, name: str) -> None:
        """Leaves a parameter out of the steps from now on; its state stays as it is.

        Raises:
            KilterError: there is no such parameter.
        """
        self._rebuild(frozen=self._frozen | {self._known(name)})

    def thaw(self, name: str) -> None:
        """Takes a frozen parameter back into the steps.

        Raises:
            KilterError: there is no such parameter.
        """
        self._rebuild(frozen=self._frozen - {self._known(name)})

    def _check_intact(self) -> None:
        """Refuses groups that cannot be laid out anew."""
        self._check_groups()
        for group in self.groups:
            self._check_options(group)
        for bucket in self._buckets:
            self._check_slots(bucket)

    def _known(self, name: Any) -> str:
        self._check_intact()
        if str(name) not in self._params():
            fail("name", "the name of a parameter", repr(name))
        return str(name)

    def _params(self) -> dict[str, Any]:
        return {name: p for group in self.groups for name, p in group["params"].items()}

    def _append(self, group: dict[str, Any]) -> None:
        unknown = set(group) - {"params"} - set(self._defaults)
        if unknown:
            fail("params", f"groups with the options {', '.join(sorted(self._defaults))}", ", ".join(sorted(unknown)))
        options = {**self._defaults, **{key: value for key, value in group.items() if key != "params"}}
        self._check_options(options)
        taken = self._params()
        first = len(taken)
        named = {}
        for key, p in group["params"].items():
            name = str(first + key) if isinstance(key, int) else key
            if name in taken:
                fail("params", "every name once", f"{name!r} twice")
            arrays.check_param(name, p)
            if p.dtype.itemsize == 8 and self._state_dtype is not None:
                fail("state_dtype", f"None, as params[{name}] is float64", self._state_dtype)
            named[name] = p
        self.groups.append({"params": MappingProxyType(named), **options})

    def _rebuild(self, frozen: set[str] | None = None, state: dict[str, dict[str, Any]] | None = None) -> None:
        """Lays out state anew: one flat array per slot for the parameters that share options, dtype and clock."""
        backend = structure.backend("params", self._params())
        arrays.check_apart(self._params())
        self._pull()
        old = {name: part for bucket in self._buckets for name, part in bucket.parts()}
        old.update(state or {})
        frozen = self._frozen if frozen is None else frozen
        buckets: dict[Any, Bucket] = {}
        for index, group in enumerate(self.groups):
            slots = self._slots(group)
            for name, p in group["params"].items():
                kept = old.get(name)
                clock = self._start() if kept is None else kept["clock"]
                key = (index, p.dtype.num, name in frozen, tuple(clock.items()))
                if key not in buckets:
                    masters = self._masters and p.dtype.itemsize == 2
                    buckets[key] = Bucket(backend, index, slots, masters, clock, name in frozen)
                buckets[key].names.append(name)
                buckets[key].params.append(p)
        for bucket in buckets.values():
            with beside(bucket.params[0]):
                bucket.fill(old, self._state_dtype)
        self._frozen, self._buckets = frozen, list(buckets.values())
        self._device = None
        if self._buckets and hasattr(backend.ops, "tick"):
            self._device = DeviceSteps(backend, self._buckets, self._applied)
        self._laid_out = [group["params"] for group in self.groups]

    # The step.

    def step(self, grads: Any, *, scaler: LossScaler | None = None) -> StepReport:
        """Updates every parameter that is not frozen.

        Args:
            grads: gradients in the structure of the parameters; those of groups also as one dict by name. Each has its
                parameter's shape and dtype; 16-bit and float32 ones are taken for each other. Not written to.
            scaler: gradients are divided by its scale, the step is skipped if any is not finite, and it is advanced.

        Returns:
            StepReport(calls, applied, grad_norm, skipped).

        Raises:
            KilterError: a gradient is missing, does not fit or shares memory with a parameter, a schedule returned
                something unusable, or `groups` was changed into something unusable; nothing has changed then.

        Notes:
            Clipping by norm scales all gradients by min(1, clip_norm / (norm + 1e-6)); clipping by value limits each
            element afterwards. Both see the gradients after division by the scale. A norm or a check for non-finite
            numbers reads the gradients once more.

            On a GPU the step is one launch for all tensors of the same dtypes, one before it that moves the clocks, and
            one that reads the gradients where they are measured; the host waits for none of them, until it reads the
            report, `applied` or the state. Gradients that stay in their place are checked once. A CUDA graph can
            record a step: see `before_replay`.
        """
        return self._run(self._plan(grads), scaler)

    def _plan(self, grads: Any) -> list[Pass]:
        """Returns what is to be launched, bucket for bucket."""
        self._check_groups()
        active = [bucket for bucket in self._buckets if not bucket.frozen]
        given = arrays.match(grads, self._structure, self.groups, active, self._frozen)
        plan = []
        for bucket, some in zip(active, given, strict=True):
            options = self._options(bucket)
            clock = self._advance(options, bucket.clock) if self._device is None else uncorrected(bucket.clock)
            plan.append(Pass(bucket, some, self._rule(options, clock, bucket.slots), clock, options))
        return plan

    def _renew(self, one: Pass) -> None:
        """Gives a pass of a captured step the options of this call."""
        one.options = self._options(one.bucket)
        one.rule = self._rule(one.options, one.clock, one.bucket.slots)

    def _check_groups(self) -> None:
        """Refuses groups whose keys or parameters are not those of construction any more."""
        if not isinstance(self.groups, list) or len(self.groups) != len(self._laid_out):
            fail("groups", f"a list of {len(self._laid_out)}; add_params adds one", "another")
        for index, (group, params) in enumerate(zip(self.groups, self._laid_out, strict=True)):
            if not isinstance(group, dict):
                fail(f"groups[{index}]", "a dict", type(group).__name__)
            if group.keys() != self._keys:
                got = arrays.differences(self._keys - group.keys(), group.keys() - self._keys)
                fail(f"groups[{index}]", f"the keys {', '.join(sorted(self._keys))}", got)
            if group["params"] is not params:
                fail(f"groups[{index}]", "the parameters of construction; add_params adds some", "others")

    def _options(self, bucket: Bucket) -> dict[str, Any]:
        """Returns a bucket's options at this call; those that are numbers are checked when they change."""
        group = self.groups[bucket.group]
        if bucket.checked is not None and all(map(is_, group.values(), bucket.checked)):
            return bucket.options
        options = {key: at(key, group[key], self.calls) for key in self._defaults}
        self._check_options(options)
        self._check_slots(bucket)
        scheduled = any(options[key] != group[key] for key in options)
        bucket.checked, bucket.options = None if scheduled else tuple(group.values()), options
        return options

    def _check_slots(self, bucket: Bucket) -> None:
        """Refuses options that need other state than those of construction; a velocity may lie idle."""
        slots = self._slots(self.groups[bucket.group])
        if slots != bucket.slots and slots != tuple(slot for slot in bucket.slots if slot.name != "velocity"):
            own, others = (", ".join(map(str, some)) or "none" for some in (bucket.slots, slots))
            fail(f"groups[{bucket.group}]", f"options that need the state of construction, {own}", others)

    def _run(self, plan: list[Pass], scaler: LossScaler | None) -> StepReport:
        """Measures, clips and takes the step, or skips it."""
        if scaler is not None and not isinstance(scaler, LossScaler):
            fail("scaler", "a LossScaler", type(scaler).__name__)
        if self._device is not None:
            return self._device.step(self, plan, scaler)
        scale = 1.0 if scaler is None else 1.0 / scaler.here()[0]
        skip = scaler is not None if self.skip_nonfinite is None else self.skip_nonfinite
        norm, finite = None, True
        if skip or scaler is not None or self.track_norm or self.clip_norm is not None:
            squares, finite = self._scan(plan)
            norm = math.sqrt(squares) * abs(scale)
        skipped = skip and not finite
        if norm is not None and self.clip_norm is not None and not skipped:
            scale *= min(1.0, self.clip_norm / (norm + 1e-6))
        if skipped or len(plan) > 1:
            self._launch(plan, scale, _kilter.CHECK_ONLY)
        if not skipped:
            self._launch(plan, scale, 0)
            self._applied += 1
            for one in plan:
                one.bucket.clock = one.clock
        self.calls += 1
        if scaler is not None:
            scaler.update(finite)
        reported = norm if self.track_norm or self.clip_norm is not None else None
        return StepReport(self.calls, self._applied, reported, skipped)

    def _scan(self, plan: list[Pass]) -> tuple[float, bool]:
        """Returns the sum of the squares of the gradients, and whether everything that is given is finite."""
        xp, ops = self._backend
        found = xp.empty(2)
        squares, finite = 0.0, True
        for one in plan:
            one.scan(ops, found)
            squares += float(found[0]) if one.of_gradients else 0.0
            finite = finite and found[1] == 1.0
        return squares, bool(finite)

    def _launch(self, plan: list[Pass], scale: float, flags: int) -> None:
        limit = math.inf if self.clip_value is None else self.clip_value
        for one in plan:
            one.launch(self._backend.ops, -scale if self.maximize else scale, limit, flags)

    def before_replay(self) -> None:
        """Counts the call of a step that a CUDA graph has captured, and hands it the options of this call.

        To be called before each replay, on its stream. `maximize`, the limits of clipping, and whether steps are
        skipped are those of the capture. A capture needs one such step before it, with the same gradient arrays, and is
        void after `freeze`, `thaw`, `add_params` and `load_state_dict`.

        Raises:
            KilterError: no step was captured, or an option is unusable.
        """
        if self._device is None or not self._device.captured:
            fail("before_replay", "a step that a CUDA graph has captured", "none")
        self._device.before_replay(self)
        self.calls += 1

    def _pull(self) -> None:
        """Reads the clocks from the device, if they are there and have moved."""
        applied = None if self._device is None else self._device.pull(self._buckets)
        if applied is not None:
            self._applied = applied

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Returns a flat dict of copies on the host: counts, numeric options of the groups, each parameter's state.

        Schedules are not part of it: give the same ones at construction.
        """
        state: dict[str, Any] = {
            "kind": type(self).__name__,
            "version": 1,
            "calls": self.calls,
            "applied": self.applied,
        }
        for index, group in enumerate(self.groups):
            for key, value in group.items():
                if key != "params":
                    state.update(numbers(f"groups.{index}.{key}", value))
        for bucket in self._buckets:
            for name, part in bucket.parts():
                state.update({f"state.{name}.{slot}": host(array.copy()) for slot, array in part["arrays"].items()})
                state.update({f"state.{name}.{key}": value for key, value in part["clock"].items()})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` of the same kind of optimizer over parameters of the same names returned.

        Raises:
            KilterError: the kind, a name or a shape differs; nothing has changed then.
        """
        self._check_groups()
        own = self.state_dict()
        if not isinstance(state, Mapping):
            fail("state", "a dict", type(state).__name__)
        if state.get("kind") != own["kind"] or state.get("version") != own["version"]:
            wanted = f"that of {own['kind']}, version {own['version']}"
            fail("state", wanted, f"that of {state.get('kind')}, version {state.get('version')}")
        missing, extra = set(own) - set(state), set(state) - set(own)
        # An option may be a number here and a schedule there.
        missing = {key for key in missing if not key.startswith("groups.")}
        extra = {key for key in extra if not key.startswith("groups.")}
        if missing or extra:
            fail("state", "the entries of these parameters", arrays.differences(missing, extra))
        loaded = {name: bucket.loaded(name, part, state) for bucket in self._buckets for name, part in bucket.parts()}
        options = [restored(group, f"groups.{index}", state) for index, group in enumerate(self.groups)]
        counts = [int(_check.number(f"state[{key}]", state[key], 0.0)) for key in ("calls", "applied")]
        for group, found in zip(self.groups, options, strict=True):
            self._check_options(found)
            group.update(found)
        self.calls, self._applied = counts
        self._rebuild(state=loaded)


def decay_groups(params: Mapping[str, Any], weight_decay: float) -> list[dict[str, Any]]:
    """Splits parameters into those that decay and those that do not: biases and other parameters of one axis.

    Args:
        params: a dict name -> array.
        weight_decay: the decay of matrices and of weights of more axes.

    Returns:
        Two groups for an optimizer. Their gradients may be given as one dict by name.

    Raises:
        KilterError: `params` is no dict, or the decay is no number of at least 0.
    """
    if not isinstance(params, Mapping):
        fail("params", "a dict name -> array", type(params).__name__)
    weight_decay = _check.number("weight_decay", weight_decay, 0.0)
    return [
        {"params": {n: p for n, p in params.items() if p.ndim > 1}, "weight_decay": weight_decay},
        {"params": {n: p for n, p in params.items() if p.ndim <= 1}, "weight_decay": 0.0},
    ]
