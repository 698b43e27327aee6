"""What all optimizers for PyTorch share: parameters as arrays on the same memory, and state in PyTorch's structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from kilter import _check, optim
from kilter._check import fail

# How PyTorch computes, not what: of no meaning here.
HINTS = ("foreach", "fused", "capturable", "differentiable")
CLOCK = ("product1", "product2")


def memory(argument: str, tensor: torch.Tensor) -> Any:
    """Returns an array on the memory of a CPU tensor."""
    if tensor.layout != torch.strided:
        fail(argument, "a dense tensor", f"one of layout {tensor.layout}")
    if tensor.device.type != "cpu":
        fail(argument, "a CPU tensor", f"one on {tensor.device}")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not take
        return tensor.view(torch.int16).numpy().view(_check.dtype_of("dtype", "bfloat16"))
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:
        return fail(argument, "a tensor that NumPy can look into", error)


def tensor_of(array: Any) -> torch.Tensor:
    """Returns a CPU tensor on the memory of an array."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class Optimizer(torch.optim.Optimizer):
    """The base of all; what it says holds for each.

    `step` updates the parameters where they lie, with the kernels of kilter and all in one call. `param_groups` may be
    edited at any time, as learning-rate schedulers do; parameters without a gradient are left alone, and so is their
    state. Parameters are dense CPU tensors of float64, float32, float16 or bfloat16, contiguous, none over another;
    gradients of another layout are copied.

    The state of 16-bit parameters is float32, and there is a float32 copy of themselves, which is updated and rounded
    into them: see `master_dtype` and `state_dtype` of `kilter.optim.SGD`. Where others have written into a parameter,
    as far as PyTorch notices, the copy takes over what they wrote.

    `state_dict` has the structure of PyTorch's optimizer of that name, which can load it and the other way round.
    Besides PyTorch's entries it holds what makes a resumed run equal to the uninterrupted one, bit for bit: "master",
    the float32 copy, and "clock", the number of steps and the products of the betas so far, which correct the bias;
    where it is missing, these are powers of the betas. The attribute `state` is empty but for what is not used yet.

    Raises:
        KilterError: an option, a parameter or a gradient is unusable; nothing has changed then.
    """

    kind: ClassVar[type[optim.Optimizer]]
    entries: ClassVar[dict[str, str]]  # what PyTorch calls the slots
    decoupled: ClassVar[bool | None] = None  # whether weight decay is, for those where PyTorch has a switch
    counts = True  # whether PyTorch keeps the number of steps

    def __init__(self, params: Any, defaults: dict[str, Any], master_dtype: str | None, state_dtype: Any) -> None:
        self._common = {"master_dtype": master_dtype, "state_dtype": state_dtype}
        self._engine: optim.Optimizer | None = None
        self._named: list[tuple[str, torch.Tensor]] = []
        self._places: list[int] = []  # where the parameters lay when the engine was made
        self._versions: list[int] = []  # of the parameters after the last step
        self._without: set[str] = set()  # gradient in the last step
        self._made = False
        super().__init__(params, defaults)
        self._bind()
        self._made = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have a gradient.

        Args:
            closure: called first, with gradients enabled, to evaluate the model anew.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._current()
        given = [(name, p) for name, p in self._named if p.grad is not None]
        grads = {name: memory(f"grads[{name}]", p.grad) for name, p in given}
        without = {name for name, _ in self._named} - grads.keys()
        if without != self._without:
            engine._rebuild(frozen=without)
            self._without = without
        if given:
            self._reconcile(engine)
            engine.step(grads)
            # PyTorch then notices a graph that still needs the values from before.
            torch.autograd.graph.increment_version([p for _, p in given])
            self._versions = [p._version for _, p in self._named]
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as PyTorch does; their state starts anew."""
        self._release()
        super().add_param_group(param_group)
        if self._made:
            try:
                self._bind()
            except ValueError:
                self.param_groups.pop()
                raise

    # The engine: an optimizer of kilter on the memory of the parameters.

    def _bind(self) -> optim.Optimizer:
        """Makes the engine for the present groups and gives it the state that lies in `state`."""
        found = [list(_named(group, index)) for index, group in enumerate(self.param_groups)]
        arrays = [{name: memory(f"params[{name}]", p) for name, p in group} for group in found]
        groups = [{"params": a, **self._options(g)} for a, g in zip(arrays, self.param_groups, strict=True)]
        engine = self.kind(groups, **self._common)
        state = engine.state_dict()
        parts = _parts(state)
        for group, options in zip(found, engine.groups, strict=True):
            for name, p in group:
                if self.state.get(p):
                    new = self._imported(name, parts[name], self.state[p], options)
                    state.update({f"state.{name}.{key}": value for key, value in new.items()})
        engine.load_state_dict(state)
        self._named = [pair for group in found for pair in group]
        self._places = [p.data_ptr() for _, p in self._named]
        self._versions, self._without = [], set()
        self._engine = engine
        self.state.clear()
        return engine

    def _current(self) -> optim.Optimizer:
        """Returns the engine, which has the present options and works on the present memory."""
        if self._engine is not None and [p.data_ptr() for _, p in self._named] != self._places:
            self._release()
        engine = self._bind() if self._engine is None else self._engine
        ways = {bool(group["maximize"]) for group in self.param_groups}
        if len(ways) > 1:
            fail("maximize", "the same in all groups", "both")
        engine.maximize = ways.pop()
        for own, group in zip(engine.groups, self.param_groups, strict=True):
            own.update(self._options(group))
        return engine

    def _reconcile(self, engine: optim.Optimizer) -> None:
        """Brings float32 copies up to date with parameters that others have written into."""
        versions = [p._version for _, p in self._named]
        if versions == self._versions:
            return
        params = {name: array for group in engine.groups for name, array in group["params"].items()}
        for bucket in engine._buckets if any(array.dtype.itemsize == 2 for array in params.values()) else ():
            for name, part in bucket.parts():
                if (master := part["arrays"].get("master")) is not None:
                    np.copyto(master, params[name], where=master.astype(params[name].dtype) != params[name])

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: _plain(group[key]) for key in self.defaults if key != "maximize"}

    def _release(self) -> None:
        """Puts the state where PyTorch has it; the next step makes a new engine."""
        if self._engine is not None:
            self.state.update(self._exported())
            self._engine = None

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Returns state and groups in PyTorch's structure; the tensors are copies."""
        if self._engine is not None:
            self.state.update(self._exported())
        try:
            found: dict[str, Any] = super().state_dict()
        finally:
            if self._engine is not None:
                self.state.clear()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned, or that of PyTorch's optimizer of this name.

        Raises:
            KilterError: an entry is missing or has another shape; nothing has changed then.
            ValueError: the groups differ.
        """
        kept = dict(self.__dict__)
        try:
            super().load_state_dict(state_dict)
            # PyTorch has rounded state to the dtype of the parameters.
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            own = [p for group in self.param_groups for p in group["params"]]
            for number, p in zip(numbers, own, strict=True):
                if number in state_dict["state"]:
                    self.state[p] = dict(state_dict["state"][number])
            self._bind()
        except BaseException:
            self.__dict__.update(kept)
            raise

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._engine is not None:
            state = {**state, "state": defaultdict(dict, self._exported())}
        return {**state, "_common": self._common, "_made": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = None
        for options in (self.defaults, *self.param_groups):
            for hint in HINTS:
                options.pop(hint, None)
        for group in self.param_groups:
            decoupled = group.pop("decoupled_weight_decay", self.decoupled)
            if decoupled != self.decoupled:
                fail("decoupled_weight_decay", str(self.decoupled), decoupled)
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _exported(self) -> dict[torch.Tensor, dict[str, Any]]:
        """Returns the state of each parameter that has been updated."""
        engine = self._engine
        parts = {} if engine is None else _parts(engine.state_dict())
        found = {}
        for name, p in self._named:
            if parts[name]["t"]:
                found[p] = self._entries(parts[name])
        return {p: entries for p, entries in found.items() if entries}

    def _entries(self, part: dict[str, Any]) -> dict[str, Any]:
        """Returns one parameter's state in PyTorch's words."""
        entries: dict[str, Any] = {"step": torch.tensor(float(part["t"]))} if self.counts else {}
        for key, value in part.items():
            if hasattr(value, "shape"):
                entries[self.entries.get(key, key)] = tensor_of(value)
            elif key == "mu_product":
                entries[key] = torch.tensor(value, dtype=torch.float64)
        if clock := [part[key] for key in CLOCK if key in part]:
            entries["clock"] = torch.tensor([part["t"], *clock], dtype=torch.float64)
        return entries

    def _imported(
        self, name: str, part: dict[str, Any], entries: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns one parameter's state in kilter's words, from PyTorch's; `part` has its arrays."""
        began = any(entries.get(key) is not None for key in (*self.entries.values(), "master"))
        t = int(entries["step"] if self.counts else began)
        found: dict[str, Any] = {"t": t}
        products = [key for key in CLOCK if key in part]
        clock = entries.get("clock")
        # One that PyTorch has carried along while it took steps of its own is out of date.
        if products and clock is not None and clock.dtype == torch.float64 and clock[0] == t:
            found.update(zip(products, clock[1:].tolist(), strict=True))
        else:
            found.update({key: options["betas"][key == "product2"] ** t for key in products})
        if "mu_product" in part:
            found["mu_product"] = float(_entry(name, entries, "mu_product"))
        for slot, array in part.items():
            if hasattr(array, "shape") and (slot != "master" or "master" in entries) and t:
                key = self.entries.get(slot, slot)
                given = memory(f"state[{name}].{key}", _entry(name, entries, key))
                if given.shape != array.shape:
                    fail(f"state[{name}].{key}", f"shape {array.shape}", f"shape {given.shape}")
                found[slot] = given.astype(array.dtype)
        return found


def _named(group: Mapping[str, Any], index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters of a group with what messages call them."""
    names = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def _parts(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the state of each parameter, from a flat dict."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in state.items():
        if key.startswith("state."):
            name, _, slot = key.removeprefix("state.").rpartition(".")
            found[name][slot] = value
    return found


def _entry(name: str, entries: Mapping[str, Any], key: str) -> Any:
    if entries.get(key) is None:
        fail(f"state[{name}]", f"the entry {key}", ", ".join(map(str, entries)) or "none")
    return entries[key]


def _plain(value: Any) -> Any:
    """Returns an option as numbers, also where it is a tensor."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, torch.Tensor) else value
