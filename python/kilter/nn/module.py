"""The base of every layer: parameters, gradients, state and buffers under dotted names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from kilter import _check
from kilter._backend import backend_named, backend_of, host
from kilter._check import KilterError, dtype_of

Array: TypeAlias = Any  # of NumPy, or of a library that works like it
State: TypeAlias = dict[str, Any]


class LoadReport(NamedTuple):
    """What `load_state_dict(strict=False)` left out."""

    missing: list[str]  # names of the module that were not loaded
    unexpected: list[str]  # names of the given state that found no place


def expect(x: Array, shape: tuple[int | str, ...], dtype: np.dtype[Any] | None, name: str = "x") -> None:
    """Raise a KilterError unless x has this shape (a str stands for any size) and dtype."""
    given = _check.array(name, x).shape
    if given != shape and not _agree(given, shape):
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise KilterError(f"{name}: expected shape ({wanted}), got {given}")
    if dtype is not None and x.dtype != dtype:
        raise KilterError(f"{name}: expected dtype {dtype.name}, got {x.dtype.name}")


def _agree(given: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    for wanted, got in zip(shape, given, strict=False):
        if wanted != got and wanted.__class__ is int:
            return False
    return len(given) == len(shape)


def is_channels_last(x: Array) -> bool:
    """Say whether x (N, C, ...) lies in memory as (N, ..., C); False where that is C order too."""
    return x.ndim > 2 and not x.flags.c_contiguous and bool(channels_last(x).flags.c_contiguous)


def channels_last(x: Array) -> Array:
    """View x (N, C, ...) as (N, ..., C)."""
    return x.transpose(0, *range(2, x.ndim), 1)


def channels_first(x: Array) -> Array:
    """View x (N, ..., C) as (N, C, ...)."""
    return x.transpose(0, x.ndim - 1, *range(1, x.ndim - 1))


class Module:
    """A layer `y = m(x)` with an explicit backward `dx = m.backward(dy)`.

    A subclass writes `forward(x)` and `backward(dy, *, need_dx=True)`, and may

    * own parameters: `self.add_param(name, array)` in `__init__`; its backward overwrites
      `self.own_grads[name]`;
    * own further state that is saved but not trained: `extra_state` and `load_extra_state`;
    * hold other modules as attributes; their names are prefixed with the attribute's and a dot.

    Notes
    -----
    `params()` and `grads()` return the arrays themselves, under equal names. They stay the same objects
    through training and `load_state_dict`, so an optimizer and its list of gradients are built once; `to` and
    `freeze` change the lists: call them first. Every `backward` overwrites the gradients.

    A forward keeps references to what its backward needs; x must not change in between.

    Images are (N, C, H, W). They may lie in memory as (N, H, W, C), as the outputs of Conv2d do: layers keep the order
    in memory of what they are given.
    """

    def __init__(self) -> None:
        self.training = True
        self.frozen = False
        self.own_params: dict[str, Array] = {}
        self.own_grads: dict[str, Array] = {}
        self._reuse = False
        self._scratch: dict[str, Array] = {}
        self._cache: Any = None  # what the last forward keeps for the backward

    def __call__(self, x: Array) -> Array:
        """`forward(x)`."""
        return self.forward(x)

    def forward(self, x: Array) -> Array:
        """Output for x."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def backward(self, dy: Array, *, need_dx: bool = True) -> Any:
        """Gradient dx of the loss for the last x, given dy for its output; fills `grads()`.

        With `need_dx=False` the work for dx may be left out and None returned.
        """
        raise NotImplementedError(f"{type(self).__name__}.backward")

    def cache(self) -> Any:
        """What the last forward kept for this backward.

        Raises
        ------
        KilterError
            There was none.
        """
        if self._cache is None:
            raise KilterError(f"backward: expected a forward of {type(self).__name__} before it, got none")
        return self._cache

    # ---- names

    def children(self) -> dict[str, Module]:
        """The modules directly inside this one, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Module)}

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, each with the prefix of its names."""
        yield prefix, self
        for name, child in self.children().items():
            yield from child.modules(f"{prefix}{name}.")

    def named(self, *names: str) -> list[tuple[str, Module]]:
        """The modules of these dotted names and all below them, each with the prefix of its names; without a name, all.

        Raises
        ------
        KilterError
            No module has the name.
        """
        everything = list(self.modules())
        for name in names:
            if not any(prefix == f"{name}." for prefix, _ in everything):
                known = [prefix[:-1] for prefix, _ in everything if prefix]
                raise KilterError(f"name: expected a module ({_some(known)}), got {name!r}")
        wanted = tuple(f"{name}." for name in names) or ("",)
        return [(prefix, module) for prefix, module in everything if prefix.startswith(wanted)]

    def params(self, *names: str) -> dict[str, Array]:
        """The parameters to train (those of frozen modules are left out), by dotted name; of these modules alone."""
        return {pre + n: a for pre, m in self.named(*names) if not m.frozen for n, a in m.own_params.items()}

    def grads(self, *names: str) -> dict[str, Array]:
        """The gradients of `params(*names)`: stable arrays that every backward overwrites."""
        return {pre + n: a for pre, m in self.named(*names) if not m.frozen for n, a in m.own_grads.items()}

    def add_param(self, name: str, value: Array) -> None:
        """Own `value` as a parameter, with a gradient of zeros, in C order, as products write into it."""
        self.own_params[name] = value
        self.own_grads[name] = backend_of(value).xp.zeros_like(value, order="C")

    def keep_grads(self, **grads: Array) -> None:
        """Overwrite these gradients, unless the module is frozen or has no parameters."""
        if self.own_grads and not self.frozen:
            for name, grad in grads.items():
                self.own_grads[name][...] = grad

    # ---- modes

    def train(self, mode: bool = True) -> Self:
        """Training mode: batch statistics, dropout."""
        for _, module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Inference mode: running statistics, no dropout."""
        return self.train(False)

    def freeze(self, *names: str) -> Self:
        """Take the parameters of these modules, or all, out of `params()` and `grads()`.

        A frozen BatchNorm uses its running statistics. The state dict keeps what is frozen.
        """
        for _, module in self.named(*names):
            module.frozen = True
        return self

    def thaw(self, *names: str) -> Self:
        """Undo `freeze` for these modules, or all."""
        for _, module in self.named(*names):
            module.frozen = False
        return self

    def reuse_buffers(self, flag: bool = True) -> Self:
        """Write outputs and gradients into arrays that the layers keep, instead of fresh ones.

        Each call then overwrites what the call before returned. A smaller batch uses the front of a buffer.
        """
        for _, module in self.modules():
            module._reuse = flag
            module._scratch.clear()
        return self

    def to(self, where: DTypeLike) -> Self:
        """Move the parameters to "cuda" or "cpu", or convert them to a dtype; build the optimizer afterwards.

        Parameters
        ----------
        where
            A device, which x must then be on; or float64, float32, float16 or bfloat16.

        Raises
        ------
        KilterError
            There is no such dtype, or the device is not available; nothing has changed then.
        """
        device = where if isinstance(where, str) and where in ("cuda", "cpu") else None
        xp = None if device is None else backend_named(device).xp
        dtype = dtype_of("dtype", where) if device is None else None
        for _, module in self.modules():
            module._scratch.clear()
            if dtype is None:
                module.move(xp)
            else:
                module.convert(dtype)
        return self

    def convert(self, dtype: np.dtype[Any]) -> None:
        """Convert this module's own arrays."""
        for name, value in self.own_params.items():
            self.add_param(name, value.astype(dtype))

    def move(self, xp: Any) -> None:
        """Make this module's own arrays arrays of the library `xp`."""
        for name, value in self.own_params.items():
            self.add_param(name, xp.asarray(host(value)))

    # ---- state

    def extra_state(self) -> State:
        """Own state beside the parameters: arrays and plain numbers."""
        return {}

    def load_extra_state(self, state: State) -> None:
        """Take `extra_state` back."""

    def own_state(self) -> State:
        """Parameters and extra state of this module alone, not copied."""
        return {**self.own_params, **self.extra_state()}

    def state_dict(self) -> State:
        """Copies of all parameters (frozen ones too) and other state: dotted names to NumPy arrays and numbers."""
        state = {pre + n: v for pre, m in self.modules() for n, v in m.own_state().items()}
        return {n: host(v.copy()) if hasattr(v, "shape") else v for n, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Copy a state into the arrays of this module, converting to their dtype.

        Parameters
        ----------
        state
            As from `state_dict`.
        strict
            True: names and shapes must be equal. False: what has the same name and shape is loaded.

        Returns
        -------
        LoadReport
            The names that were not loaded and those that found no place; empty when strict.

        Raises
        ------
        KilterError
            A name or a shape differs (strict), or a value is no number; nothing was written.
        """
        own = {pre + n: v for pre, m in self.modules() for n, v in m.own_state().items()}
        wrong = {n for n in own.keys() & state.keys() if np.shape(own[n]) != np.shape(state[n])}
        report = LoadReport(sorted((own.keys() - state.keys()) | wrong), sorted((state.keys() - own.keys()) | wrong))
        if strict:
            _refuse(report, own, state, wrong)
        taken = (own.keys() & state.keys()) - wrong
        for name in taken:
            _expect_numbers(name, state[name])
        for prefix, module in self.modules():
            given = {n: state[prefix + n] for n in module.own_state() if prefix + n in taken}
            for name, value in module.own_params.items():
                if name in given:
                    xp = backend_of(value).xp
                    xp.copyto(value, xp.asarray(given.pop(name)), casting="unsafe")
            if given:
                module.load_extra_state({**module.extra_state(), **given})
        return report

    # ---- buffers

    @property
    def reuses_buffers(self) -> bool:
        """Whether `reuse_buffers` is on."""
        return self._reuse

    def buffer(
        self, slot: str, like: Array, shape: tuple[int, ...] | None = None, dtype: np.dtype[Any] | None = None
    ) -> Array:
        """Uninitialised array for a result, beside `like`: fresh, or kept (see `reuse_buffers`).

        In C order, of like's dtype unless another is given; without a shape it has like's, in like's order in memory.
        """
        dtype = like.dtype if dtype is None else dtype
        if shape is None and like.ndim > 2:
            return self.buffer_like(slot, like, like.shape, dtype)
        return self._kept(slot, like, like.shape if shape is None else shape, dtype)

    def buffer_like(self, slot: str, like: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A `buffer` of this shape (N, C, ...) in like's order in memory."""
        if is_channels_last(like):
            return channels_first(self._kept(slot, like, (shape[0], *shape[2:], shape[1]), dtype))
        return self._kept(slot, like, shape, dtype)

    def recall(self, slot: str, x: Array) -> Any:
        """What `remember` kept for an x of this library, shape and dtype; None where it was for another."""
        kept = self._scratch.get(slot)
        if kept is None or kept[0] != (x.__class__, getattr(x, "shape", None), getattr(x, "dtype", None)):
            return None
        return kept[1]

    def remember(self, slot: str, x: Array, value: Any) -> Any:
        """`value`, kept with the buffers, if these are (see `reuse_buffers`): what follows from x's shape alone."""
        if self._reuse:
            self._scratch[slot] = (x.__class__, x.shape, x.dtype), value
        return value

    def forget(self, *slots: str) -> None:
        """Drop what was kept there."""
        for slot in slots:
            self._scratch.pop(slot, None)

    def _kept(self, slot: str, like: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        kept = self._scratch.get(slot)
        if kept is not None and kept.dtype == dtype and kept.__class__ is like.__class__:
            if kept.shape == shape:
                return kept
            if kept.shape[1:] == shape[1:] and len(kept) >= shape[0]:
                return kept[: shape[0]]
        fresh = backend_of(like).xp.empty(shape, dtype)
        if self._reuse:
            self._scratch[slot] = fresh
        return fresh


def _refuse(report: LoadReport, own: State, state: Mapping[str, Any], wrong: set[str]) -> None:
    for name in sorted(wrong):
        raise KilterError(f"{name}: expected shape {np.shape(own[name])}, got {np.shape(state[name])}")
    if report.missing or report.unexpected:
        raise KilterError(
            f"state: expected the names of this module; missing {_some(report.missing)}, "
            f"unexpected {_some(report.unexpected)}"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _expect_numbers(name: str, value: object) -> None:
    dtype = np.asarray(value).dtype
    if dtype.kind not in "biuf" and dtype.name != "bfloat16":
        raise KilterError(f"{name}: expected numbers, got {type(value).__name__} of dtype {dtype.name}")
