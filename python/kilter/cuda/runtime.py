"""CuPy as a runtime: the library is imported when its first array comes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from kilter._kilter import KilterError

_INSTALL = "pip install 'kilter[cuda13]' (or 'kilter[cuda12]' for drivers of CUDA 12) installs what is missing"


class CupyRuntime:
    """Builds and launches through CuPy's RawModule."""

    def __init__(self) -> None:
        import cupy

        self.xp, self._cuda = cupy, cupy.cuda
        try:
            cupy.cuda.nvrtc.getVersion()
        except Exception as error:
            raise KilterError(f"CUDA kernels: expected the compiler NVRTC, got {error}; {_INSTALL}") from error
        self._functions: dict[tuple[int, int], Any] = {}
        self._attributes: dict[tuple[int, str], int] = {}

    def build(self, name: str, text: str, options: tuple[str, ...]) -> Any:
        """Returns a module, which CuPy compiles on first use and keeps on disk."""
        return self.xp.RawModule(code=text, options=("-std=c++17", *options))

    def function(self, module: Any, kernel: str) -> Any:
        """Returns a kernel, for any device."""
        return module.get_function(kernel)

    def owns(self, array: Any) -> bool:
        """Says whether this is an array on a device."""
        return isinstance(array, self.xp.ndarray)

    def address(self, array: Any) -> int:
        """Returns where the array begins."""
        return int(array.data.ptr)

    def device_of(self, array: Any) -> int:
        """Returns the number of the array's device."""
        return int(array.device.id)

    def current_device(self) -> int:
        """Returns the number of the device that launches go to."""
        return int(self._cuda.runtime.getDevice())

    def on(self, device: int) -> AbstractContextManager[Any]:
        """Returns a context in which launches go to `device`."""
        found: AbstractContextManager[Any] = self._cuda.Device(device)
        return found

    def current_stream(self) -> int:
        """Returns a number for the stream that launches go to."""
        return int(self._cuda.get_current_stream().ptr)

    def processors(self, device: int) -> int:
        """Returns how many multiprocessors a device has."""
        return self._attribute(device, "MultiProcessorCount")

    def capability(self, device: int) -> int:
        """Returns a device's compute capability: 90 for sm_90."""
        return int(self._cuda.Device(device).compute_capability)

    def shared(self, device: int) -> int:
        """Returns how many bytes of shared memory a block may have on a device."""
        return self._attribute(device, "MaxSharedMemoryPerBlockOptin")

    def _attribute(self, device: int, name: str) -> int:
        # Asking takes as long as several launches.
        found = self._attributes.get((device, name))
        if found is None:
            found = self._attributes[device, name] = int(self._cuda.Device(device).attributes[name])
        return found

    def allow_shared(self, function: Any, size: int) -> None:
        """Lets a kernel use `size` bytes of dynamic shared memory on the current device."""
        function.max_dynamic_shared_size_bytes = size

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
        """Launches on the current device and stream; a cluster's size is part of the compiled kernel."""
        # RawKernel looks for its device's function on every call: that is kept here.
        key = (id(function), self.current_device())
        compiled = self._functions.get(key)
        if compiled is None:
            compiled = self._functions[key] = function.kernel
        compiled(grid, block, arguments, shared, None, cooperative)

    def recycle(self, array: Any) -> None:
        """A workspace begins a new use: nothing to do."""

    def synchronize(self) -> None:
        """Waits for the current stream."""
        self._cuda.get_current_stream().synchronize()

    def capturing(self) -> bool:
        """Says whether the current stream records a graph."""
        return bool(self._cuda.get_current_stream().is_capturing())
