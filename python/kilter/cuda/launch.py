"""The one way to launch a kernel, on a device or on the simulator of the tests."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol

import numpy as np

from kilter._kilter import KilterError
from kilter.cuda import source
from kilter.cuda.source import Declaration, Family, Parameter

_SHARED = 48 << 10  # bytes of shared memory that every kernel may use
_MOST = (2**31 - 1, 65535, 65535)  # blocks of a grid
_MARGIN = 1 << 20  # elements; what 32-bit indices may run beyond an array's end


class Runtime(Protocol):
    """What launches need of an array library; `launch` runs on the current device and stream."""

    xp: Any

    def build(self, name: str, text: str, options: tuple[str, ...]) -> Any:
        """Builds a module; `options` are those of NVRTC."""

    def function(self, module: Any, kernel: str) -> Any:
        """Returns a kernel of a module."""

    def owns(self, array: Any) -> bool:
        """Says whether this is an array on a device."""

    def address(self, array: Any) -> int:
        """Returns where an array begins."""

    def device_of(self, array: Any) -> int:
        """Returns the number of an array's device."""

    def current_device(self) -> int:
        """Returns the number of the current device."""

    def on(self, device: int) -> AbstractContextManager[Any]:
        """Returns a context in which `device` is the current one."""

    def current_stream(self) -> int:
        """Returns a number for the current stream."""

    def processors(self, device: int) -> int:
        """Returns how many multiprocessors a device has."""

    def capability(self, device: int) -> int:
        """Returns a device's compute capability: 90 for sm_90."""

    def shared(self, device: int) -> int:
        """Returns how many bytes of shared memory a block may have on a device."""

    def allow_shared(self, function: Any, size: int) -> None:
        """Lets a kernel use `size` bytes of dynamic shared memory on the current device."""

    def launch(
        self,
        function: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Any],
        shared: int,
        cluster: int,
        cooperative: bool,
    ) -> None:
        """Launches; `cooperative` has all blocks resident at once, `cluster` is a cluster's size."""

    def recycle(self, array: Any) -> None:
        """Begins a new use of a workspace."""

    def synchronize(self) -> None:
        """Waits for the current stream."""

    def capturing(self) -> bool:
        """Says whether the current stream records a graph instead of running."""


def blocks(items: int, per_block: int) -> int:
    """Returns how many blocks of `per_block` hold the items."""
    return -(-items // per_block)


def index_bits(*sizes: int) -> int:
    """Returns the bits (32 or 64) of indices into arrays of these sizes."""
    return 64 if max(sizes) >= 2**31 - _MARGIN else 32


class Launcher:
    """The modules built for a runtime, and the workspaces of its streams."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.xp = runtime, runtime.xp
        self.waits = os.environ.get("KILTER_CUDA_SYNC") == "1"
        self.read_once = os.environ.get("KILTER_CUDA_READ_ONCE", "")  # see batch_once
        self._modules: dict[tuple[Any, ...], Module] = {}
        self._spaces: dict[tuple[int, int], list[Any]] = {}
        self._tickets: dict[tuple[int, int], list[Any]] = {}
        self.kept: dict[str, OrderedDict[Any, Any]] = {}  # what operations remember between calls

    def module(self, family: Family, **variant: Any) -> Module:
        """Returns the module of a family with these macros, built on first use.

        T="float16" (a dtype or its name) is the macro KT_T=half, V=4 the macro KT_V=4, RULE="Sgd" KT_RULE=Sgd.
        """
        key = (family.name, *variant.items())
        found = self._modules.get(key)
        if found is None:
            named = {n: v if isinstance(v, (int, str)) else np.dtype(v).name for n, v in variant.items()}
            found = self._modules[key] = Module(self, family, named)
        return found

    def width(self, *arrays: Any, lengths: Sequence[int] = ()) -> int:
        """Returns how many elements may move together: the most V with words of 16 bytes of the first array.

        Every array is aligned to words of V of its elements (at most 16 bytes); V divides each of `lengths`.
        """
        width: int = 16 // arrays[0].dtype.itemsize
        places = [(self.runtime.address(a), a.dtype.itemsize) for a in arrays if a is not None]
        while width > 1 and (
            any(place % min(16, width * size) for place, size in places) or any(n % width for n in lengths)
        ):
            width //= 2
        return width

    def processors(self, array: Any) -> int:
        """Returns how many multiprocessors the array's device has."""
        return self.runtime.processors(self.runtime.device_of(array))

    def shared(self, array: Any) -> int:
        """Returns how many bytes of shared memory a block may have on the array's device."""
        return self.runtime.shared(self.runtime.device_of(array))

    def workspace(self, like: Any, size: int, dtype: Any = "float64") -> Any:
        """Returns a vector on the device of `like`, whose content is undefined, to be used up by this operation.

        Each stream has one, which the next operation gets again; cut it where an operation needs several.
        """
        runtime = self.runtime
        device, wanted = runtime.device_of(like), size * np.dtype(dtype).itemsize
        with runtime.on(device):
            held = self._spaces.setdefault((device, runtime.current_stream()), [])
            if not held or held[-1].nbytes < wanted:
                # The smaller ones stay: a CUDA graph may know their addresses.
                held.append(runtime.xp.empty(max(wanted, 2 * held[-1].nbytes if held else 1 << 16), "uint8"))
            space = held[-1][:wanted].view(dtype)
        runtime.recycle(space)
        return space

    def tickets(self, like: Any, size: int) -> Any:
        """Returns unsigned numbers on the device of `like` that are zero, and are zero again after every kernel.

        Each stream has its own.
        """
        runtime = self.runtime
        device = runtime.device_of(like)
        with runtime.on(device):
            held = self._tickets.setdefault((device, runtime.current_stream()), [])
            if not held or held[-1].size < size:
                held.append(runtime.xp.zeros(max(size, 2 * held[-1].size if held else 1 << 12), "uint32"))
        return held[-1]


class Module:
    """A family's kernels, built for one set of macros."""

    def __init__(self, launcher: Launcher, family: Family, variant: dict[str, Any]) -> None:
        self.name = " ".join([family.name, *(f"{name}={value}" for name, value in variant.items())])
        self.launcher, self.runtime = launcher, launcher.runtime
        self.declared = source.declarations(family.name, variant)
        options = (*source.macros(variant), *family.options)
        self.built = self.runtime.build(family.name, source.text(family.name), options)
        self._ready: dict[str, tuple[Any, list[Callable[[Any], Any]], list[int], Declaration]] = {}
        self._allowed: dict[tuple[str, int], int] = {}

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: Any,
        shared: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Launches a kernel on its arrays' device and the current stream; a grid without blocks launches nothing.

        Arguments are as declared: arrays of exactly the declared dtype or None, Python numbers, and for `Scalars<N>` a
        NumPy or device vector of N float64. `shared` is in bytes.

        Raises:
            KilterError: an argument or a size does not fit; with KILTER_CUDA_SYNC=1 also where the kernel failed.
        """
        function, converters, pointers, declared = self._ready.get(kernel) or self._prepare(kernel)
        grid = grid if isinstance(grid, tuple) else (grid,)
        block = block if isinstance(block, tuple) else (block,)
        if 0 in grid:
            return
        if len(arguments) != len(converters):
            self._fail(kernel, f"expected {len(converters)} arguments, got {len(arguments)}")
        if any(n > most for n, most in zip(grid, _MOST, strict=False)):
            self._fail(kernel, f"expected a grid of at most {_MOST}, got {grid}")
        if int(np.prod(block)) > declared.threads:
            self._fail(kernel, f"expected at most {declared.threads} threads, got {block}")
        if grid[0] % declared.cluster:
            self._fail(kernel, f"expected a multiple of {declared.cluster} blocks, got {grid}")
        values = [convert(argument) for convert, argument in zip(converters, arguments, strict=True)]
        device = self._device(kernel, [arguments[i] for i in pointers])
        if device == self.runtime.current_device():
            self._enqueue(kernel, device, function, grid, block, values, shared, declared.cluster, cooperative)
        else:
            with self.runtime.on(device):
                self._enqueue(kernel, device, function, grid, block, values, shared, declared.cluster, cooperative)

    def _enqueue(
        self,
        kernel: str,
        device: int,
        function: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        values: list[Any],
        shared: int,
        cluster: int,
        cooperative: bool,
    ) -> None:
        if shared > self._allowed.get((kernel, device), _SHARED):
            self.runtime.allow_shared(function, shared)
            self._allowed[kernel, device] = shared
        self.runtime.launch(function, grid, block, values, shared, cluster, cooperative)
        if self.launcher.waits:
            try:
                self.runtime.synchronize()
            except Exception as error:
                raise KilterError(f"kernel {kernel} of {self.name}: {error}") from error

    def _prepare(self, kernel: str) -> tuple[Any, list[Callable[[Any], Any]], list[int], Declaration]:
        declared = self.declared[kernel]
        converters = [self._converter(kernel, parameter) for parameter in declared.parameters]
        pointers = [i for i, parameter in enumerate(declared.parameters) if parameter.kind == "pointer"]
        function = self.runtime.function(self.built, kernel)
        self._ready[kernel] = found = (function, converters, pointers, declared)
        return found

    def _device(self, kernel: str, arrays: Sequence[Any]) -> int:
        devices = {self.runtime.device_of(array) for array in arrays if array is not None}
        if len(devices) > 1:
            current = self.runtime.current_device()
            self._fail(
                kernel, f"expected all arrays on one device, got {sorted(devices)}; {current} is the current one"
            )
        return devices.pop() if devices else self.runtime.current_device()

    def _converter(self, kernel: str, parameter: Parameter) -> Callable[[Any], Any]:
        """The function that turns an argument into exactly what the kernel reads: the launch checks nothing more."""
        if parameter.kind == "pointer":
            return lambda array: self._array(kernel, parameter, array)
        if parameter.kind == "scalars":
            kind = np.dtype([("device", "u8"), ("host", "f8", (parameter.length,))])
            return lambda h: self._scalars(kernel, parameter, kind, h)
        number: Callable[[Any], Any] = parameter.dtype
        return number

    def _array(self, kernel: str, parameter: Parameter, array: Any) -> Any:
        if array is None:
            return np.uintp(0)
        if not self.runtime.owns(array) or (parameter.dtype is not None and array.dtype != parameter.dtype):
            got = getattr(array, "dtype", type(array).__name__)
            self._fail(kernel, f"{parameter.name}: expected an array of {parameter.dtype}, got {got}")
        if not array.flags.c_contiguous:
            self._fail(kernel, f"{parameter.name}: expected a C-contiguous array, got strides {array.strides}")
        return array

    def _scalars(self, kernel: str, parameter: Parameter, kind: Any, h: Any) -> Any:
        there = self.runtime.owns(h)
        if (h.shape[-1:] if there else h.shape) != (parameter.length,) or h.dtype != np.float64:
            self._fail(kernel, f"{parameter.name}: expected {parameter.length} float64, got {h.shape} {h.dtype}")
        value = np.zeros(1, kind)
        if there:
            value["device"] = self.runtime.address(h)
        else:
            value["host"] = h
        return value

    def _fail(self, kernel: str, what: str) -> NoReturn:
        raise KilterError(f"kernel {kernel} of {self.name}: {what}")
