"""The simulator as a runtime: every launch runs in several orders, which must all leave the same bits."""

import ctypes
import threading
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np

from cudasim import build, memory
from cudasim.memory import SimArray
from kilter.cuda import source

ORDERS = (0, 1, 2, 3)  # forward, backward, two at random; the odd ones let warps and blocks run ahead


class SimError(AssertionError):
    """A kernel did what it must not, or the host launched it wrongly."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic", ctypes.c_size_t),
        ("order", ctypes.c_uint64),
        ("wave", ctypes.c_uint),
        ("kept", ctypes.c_uint),
        ("skipped", ctypes.c_size_t),
    )


class _Module(NamedTuple):
    """A family's library, built with these macros."""

    family: str
    macros: dict
    library: ctypes.CDLL


class _Function:
    """A kernel of a module, and the names and types of its parameters."""

    def __init__(self, module, name):
        self.module, self.name, self.call = module, name, getattr(module.library, f"sim_{name}")
        self.shared = 48 << 10
        types = getattr(module.library, f"types_{name}")
        types.restype = ctypes.c_char_p
        self.types = types().decode().split(", ")
        self.names = [one.split()[-1].lstrip("*") for one in source.parameters_text(module.family, name).split(",")]


class Logged(NamedTuple):
    """A launch; `macros` are those of its module without KT_, `given` the arrays that were not None."""

    kernel: str
    family: str
    macros: dict
    given: frozenset
    grid: tuple
    block: tuple
    shared: int

    @staticmethod
    def of(function, arguments, grid, block, shared):
        module = function.module
        given = (n for n, a in zip(function.names, arguments, strict=False) if isinstance(a, SimArray))
        return Logged(function.name, module.family, module.macros, frozenset(given), grid, block, shared)


class SimRuntime:
    """What `kilter.cuda.launch` needs of an array library. `log` lists every launch."""

    xp = memory.xp

    def __init__(self, orders=ORDERS, processors=4, capability=90, shared=227 << 10, flags=()):
        self.orders, self.flags = orders, flags
        self._processors, self._capability, self._shared = processors, capability, shared
        self._lock = threading.Lock()
        self.log = []

    def build(self, name, text, options):
        macros = dict(option.removeprefix("-DKT_").split("=") for option in options if option.startswith("-DKT_"))
        return _Module(name, macros, build.module(name, text, options, self.flags))

    def function(self, module, kernel):
        return _Function(module, kernel)

    def owns(self, array):
        return isinstance(array, SimArray)

    def address(self, array):
        return memory.address(array)

    def device_of(self, array):
        return array.device.id

    def current_device(self):
        return memory.current_device()

    def on(self, device):
        return memory.Device(device)

    def current_stream(self):
        return 0

    def processors(self, device):
        return self._processors

    def capability(self, device):
        return self._capability

    def shared(self, device):
        return self._shared

    def allow_shared(self, function, size):
        if size > self._shared:
            raise SimError(f"{function.name}: {size} bytes of shared memory")
        function.shared = size

    def recycle(self, array):
        with self._lock:  # another thread's launch may be reading it
            array.view(np.ndarray).view(np.uint8)[...] = memory.UNDEFINED
            memory.end(array)

    def synchronize(self):
        pass

    def capturing(self):
        return False

    def launch(self, function, grid, block, arguments, shared, cluster, cooperative):
        if shared > function.shared:
            raise SimError(f"{function.name}: {shared} bytes of shared memory, {function.shared} are allowed")
        grid, block = ((*size, 1, 1)[:3] for size in (grid, block))
        wave = int(np.prod(grid)) if cooperative else cluster
        keep = [
            _argument(function, i, kind, a) for i, (kind, a) in enumerate(zip(function.types, arguments, strict=True))
        ]
        pointers = (ctypes.c_void_p * len(keep))(*(memory.address(a) for a in keep))
        self.log.append(Logged.of(function, arguments, grid, block, shared))
        with self._lock:
            self._run(function, (grid, block, shared), wave, pointers, arguments)

    def _run(self, function, sizes, wave, pointers, arguments):
        written, guards = _arrays(function, arguments)
        before, first = [content.copy() for content in written], None
        message = ctypes.create_string_buffer(512)
        for turn, order in enumerate(self.orders):
            if first is not None:
                for content, old in zip(written, before, strict=True):
                    content[...] = old
            # What is read beside an array is not the same in every order; what is written there is not always that.
            unknown = [memory.undefined(turn, number) for number in range(len(guards))]
            for guard, byte in zip(guards, unknown, strict=True):
                guard[...] = byte
            with memory.fenced() if build.SANITIZED else nullcontext():
                failed = function.call(ctypes.byref(_Launch(*sizes, order, wave)), pointers, message)
            if failed:
                raise SimError(f"{function.name}: {message.value.decode()}")
            kept = (bytes((byte,)) * memory.GUARD for byte in unknown)
            if any(guard.tobytes() != bytes_ for guard, bytes_ in zip(guards, kept, strict=True)):
                raise SimError(f"{function.name}: written outside of an array")
            if first is None:
                first = [content.copy() for content in written]
            elif not all(np.array_equal(content, one) for content, one in zip(written, first, strict=True)):
                raise SimError(f"{function.name}: other bits with threads in order {order} than in {self.orders[0]}")


def _argument(function, index, kind, value):
    """The bytes of an argument whose type is exactly the declared one."""
    if kind.endswith("*"):
        wanted = kind.removeprefix("const ").removesuffix("*")
        if isinstance(value, SimArray) and wanted in ("struct", value.dtype.name):
            return np.array([memory.address(value)], np.uintp)
        if isinstance(value, np.uintp) and value == 0:
            return np.array([value])
    elif kind.startswith("struct "):
        if isinstance(value, np.ndarray) and value.size == 1 and value.nbytes == int(kind.split()[1]):
            return value
    elif isinstance(value, np.generic) and value.dtype.name == kind:
        return np.array([value])
    got = getattr(value, "dtype", type(value).__name__)
    raise SimError(f"{function.name}: argument {index} is {got}, the kernel takes {kind}")


def _arrays(function, arguments):
    """The bytes of all arrays that a kernel may write, and what guards all arrays.

    Those without `const` may be written, and those that tables point to.
    """
    given, written = {}, {}
    for kind, value in zip(function.types, arguments, strict=True):
        if not kind.endswith("*") or not isinstance(value, SimArray) or not value.nbytes:
            continue
        owner = memory.owner(value)
        given[memory.address(owner)] = owner
        if not kind.startswith("const "):
            written[memory.address(owner)] = owner
        if kind.removeprefix("const ").removesuffix("*") in ("struct", "uint64"):
            written |= _targets(value)
    parts = {at: memory.parts(owner) for at, owner in (given | written).items()}
    return [parts[at][0] for at in written], [guard for _, *guards in parts.values() for guard in guards]


def _targets(table):
    """The memory that the words of a table point into."""
    words = np.unique(np.frombuffer(table.tobytes()[: table.nbytes // 8 * 8], np.uint64))
    found = {}
    for start, array in sorted(memory.live.items()):
        at = np.searchsorted(words, start)
        if at < words.size and words[at] < start + array.nbytes:
            found[start] = array
    return found


class Recorder(SimRuntime):
    """A runtime whose stream can record launches, and replay them."""

    recorded = None

    def capturing(self):
        return self.recorded is not None

    def launch(self, *arguments):
        if self.recorded is None:
            super().launch(*arguments)
        else:
            self.recorded.append(arguments)

    @contextmanager
    def graph(self):
        self.recorded = found = []
        yield found
        self.recorded = None

    def replay(self, graph):
        for arguments in graph:
            super().launch(*arguments)
