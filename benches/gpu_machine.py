"""Where calls are timed: a device through CuPy, PyTorch or JAX, or the simulator, which goes through the motions."""

import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the simulator, and references

REPEATS = 5  # of a measurement
SAMPLE = 30e-3  # seconds of one repeat
CALLS = 200  # in a repeat of eager calls, at most
COLD = 180 << 20  # bytes of all sets of arrays together: more than caches keep


class Timing(NamedTuple):
    """Seconds of one call: on the device, of each repeat; and for who waits for eager calls, host included."""

    device: list[float]
    eager: list[float]
    how: str  # device times are of "graph" replays, or of eager calls between "events"

    @property
    def best(self):
        return median(self.device or self.eager)

    def numbers(self):
        """What a JSON file holds, in microseconds."""
        device, eager = ([round(1e6 * t, 3) for t in times] for times in (self.device, self.eager))
        return {"us": round(1e6 * self.best, 3), "device_us": device, "eager_us": eager, "how": self.how}


class Machine:
    """Times calls; who knows a device's streams and graphs fills in what is missing."""

    simulated = False

    def wait(self):
        """Waits until all calls are done."""

    def elapsed(self, call):
        """Seconds that the device works on what a call asks for."""
        raise NotImplementedError

    def captured(self, calls):
        """A function that replays calls as one graph."""
        raise NotImplementedError

    def beside(self):
        """A context for calls: the stream that is measured."""
        return nullcontext()

    def timing(self, calls):
        """Times calls that are to be made in turn, each on arrays of its own; a simulated machine makes them once."""
        if self.simulated:
            start = time.perf_counter()
            for call in calls:
                call()
            return Timing([], [(time.perf_counter() - start) / len(calls)], "simulated")
        with self.beside():
            for call in calls:
                call()
            self.wait()
            eager = self._eager(calls)
            try:
                replay, how = self.captured(calls), "graph"
            except Exception as error:
                replay, how = (lambda: [call() for call in calls]), f"events, as {type(error).__name__}: {error}"[:200]
            return Timing(self._device(replay, len(calls)), eager, how)

    def _eager(self, calls):
        start = time.perf_counter()
        for call in calls:
            call()
        self.wait()
        one = (time.perf_counter() - start) / len(calls)
        rounds = max(1, min(CALLS, int(2 * SAMPLE / one)) // len(calls))
        found = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for _ in range(rounds):
                for call in calls:
                    call()
            self.wait()
            found.append((time.perf_counter() - start) / rounds / len(calls))
        return found

    def _device(self, replay, count):
        replay()
        rounds = max(1, int(SAMPLE / max(self.elapsed(replay), 1e-7)))

        def all_rounds():
            for _ in range(rounds):
                replay()

        return [self.elapsed(all_rounds) / rounds / count for _ in range(REPEATS)]


class Device(Machine):
    """The current CUDA device, through CuPy and kilter."""

    def __init__(self):
        from kilter._backend import backend_named

        self.xp, self.ops = backend_named("cuda")
        self.tables = {"": self.ops}
        self.cuda = self.xp.cuda
        self.stream = self.cuda.Stream(non_blocking=True)
        self.stream.use()  # for good: memory pools and workspaces belong to a stream
        self.begin, self.end = self.cuda.Event(), self.cuda.Event()
        properties = self.cuda.runtime.getDeviceProperties(self.cuda.runtime.getDevice())
        self.name = properties["name"].decode()
        driver, runtime = self.cuda.runtime.driverGetVersion(), self.cuda.runtime.runtimeGetVersion()
        self.about = f"{self.name}, driver CUDA {driver}, runtime {runtime}, CuPy {self.xp.__version__}"

    def wait(self):
        self.stream.synchronize()

    def elapsed(self, call):
        self.begin.record(self.stream)
        call()
        self.end.record(self.stream)
        self.end.synchronize()
        return 1e-3 * self.cuda.get_elapsed_time(self.begin, self.end)

    def captured(self, calls):
        self.stream.begin_capture()
        try:
            for call in calls:
                call()
        finally:  # a stream that goes on recording is of no use to anyone
            graph = self.stream.end_capture()
        return lambda: graph.launch(self.stream)

    def runtime(self):
        from kilter.cuda.runtime import CupyRuntime

        return CupyRuntime()

    @contextmanager
    def reading(self, way):
        """A context in which batch norm reads its data in a way that KILTER_CUDA_READ_ONCE names."""
        from kilter import _backend
        from kilter.cuda.ops import table

        if way not in self.tables:
            os.environ["KILTER_CUDA_READ_ONCE"] = way
            self.tables[way] = table(self.runtime())
            del os.environ["KILTER_CUDA_READ_ONCE"]
        kind = type(self.xp.empty(0))
        _backend.register(kind, self.xp, self.tables[way])
        try:
            yield
        finally:
            _backend.register(kind, self.xp, self.ops)

    def random(self, shape, dtype, seed, mean=0.0, scale=1.0):
        """An array of normal numbers."""
        out = self.xp.empty(shape, dtype)
        self.ops.fill_normal(out, seed, 0, np.array([mean, scale]))
        return out

    def numpy(self, array):
        return self.xp.asnumpy(array)

    def there(self, values):
        """A copy on the device."""
        return self.xp.asarray(values)

    def free(self):
        """Gives memory back that no array has any more."""
        self.xp.get_default_memory_pool().free_all_blocks()


class Simulator(Device):
    """The simulator of the tests, with one order of threads; times mean nothing."""

    simulated = True

    def __init__(self):
        import cudasim

        self.ops = cudasim.install(self.runtime())
        self.tables, self.xp = {"": self.ops}, cudasim.xp
        self.name = self.about = "simulator"

    def runtime(self):
        import cudasim

        return cudasim.SimRuntime(orders=(0,))

    def wait(self):
        pass

    def free(self):
        pass


class Torch(Machine):
    """PyTorch on the same device, with a stream of its own; or on the CPU, to try its calls."""

    name = "torch"

    def __init__(self, simulated):
        import torch

        self.torch, self.simulated = torch, simulated
        self.place = "cpu" if simulated else "cuda"
        self.about = f"PyTorch {torch.__version__}"
        if not simulated:
            self.stream = torch.cuda.Stream()
            self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.about += f", cuDNN {torch.backends.cudnn.version()}"

    def beside(self):
        return nullcontext() if self.simulated else self.torch.cuda.stream(self.stream)

    def wait(self):
        if not self.simulated:
            self.stream.synchronize()

    def elapsed(self, call):
        self.begin.record(self.stream)
        call()
        self.end.record(self.stream)
        self.end.synchronize()
        return 1e-3 * self.begin.elapsed_time(self.end)

    def captured(self, calls):
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=self.stream):
            for call in calls:
                call()
        return graph.replay

    def random(self, shape, dtype, seed, mean=0.0, scale=1.0):
        with self.beside():
            self.torch.manual_seed(seed)
            made = self.torch.randn(shape, device=self.place, dtype=getattr(self.torch, dtype))
            return made.mul_(scale).add_(mean)

    def free(self):
        if not self.simulated:
            self.wait()
            self.torch.cuda.empty_cache()


class Jax(Machine):
    """JAX: the host's clock around calls that are waited for."""

    name = "jax"

    def __init__(self, simulated):
        import jax

        self.jax, self.simulated = jax, simulated
        self.about = f"JAX {jax.__version__} on {jax.devices()[0]}"
        if not simulated and jax.default_backend() == "cpu":
            raise RuntimeError("JAX sees no device")

    def timing(self, calls):
        def all_calls():
            self.jax.block_until_ready([call() for call in calls])

        all_calls()
        found = []
        for _ in range(1 if self.simulated else REPEATS):
            start, rounds = time.perf_counter(), 0
            while not rounds or time.perf_counter() - start < SAMPLE:
                all_calls()
                rounds += 1
            found.append((time.perf_counter() - start) / rounds / len(calls))
        return Timing([], found, "host clock")

    def random(self, shape, dtype, seed):
        return self.jax.random.normal(self.jax.random.key(seed), shape, dtype)

    def free(self):
        pass
