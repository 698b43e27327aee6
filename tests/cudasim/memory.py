"""Arrays on the simulated device: NumPy arrays that behave like CuPy's where the two differ."""

import ctypes
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from weakref import WeakValueDictionary

import numpy as np

GUARD = 256  # bytes on both sides of an array's memory that nobody may write
ALIGNMENT = 512  # as CuPy's allocator
UNDEFINED = 0xFF  # what fresh memory holds: NaN

# The memory of every array on the device, by its first address.
live = WeakValueDictionary()
place = threading.local()


def address(array):
    return np.ndarray.__array_interface__.__get__(array)["data"][0]


def owner(array):
    """The array whose memory this one looks into."""
    while True:
        base = array.base
        if base is not None and not isinstance(base, np.ndarray):
            base = getattr(base, "base", None)  # NumPy's stride tricks put a holder in between
        if not isinstance(base, np.ndarray):
            return array
        array = base


class Device:
    """A device, as a context and as the value of `array.device`."""

    def __init__(self, number):
        self.id = number

    def __eq__(self, other):
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self):
        return self.id

    def __repr__(self):
        return f"<device {self.id}>"

    def __enter__(self):
        self._before = current_device()
        place.device = self.id
        return self

    def __exit__(self, *_):
        place.device = self._before


def current_device():
    return getattr(place, "device", 0)


def plain(things):
    """Arguments of a NumPy function with device arrays as ordinary views; host arrays are refused, as CuPy does."""
    if isinstance(things, SimArray):
        return things.view(np.ndarray)
    if isinstance(things, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(things, (list, tuple)):
        return type(things)(plain(thing) for thing in things) if type(things) in (list, tuple) else things
    if isinstance(things, dict):
        return {name: plain(thing) for name, thing in things.items()}
    return things


def lifted(result):
    """Results of a NumPy function on the device; numbers become arrays without axes, as CuPy's do."""
    if isinstance(result, (list, tuple)):
        return type(result)(*map(lifted, result)) if hasattr(result, "_fields") else type(result)(map(lifted, result))
    if isinstance(result, (np.ndarray, np.generic)):
        if isinstance(result, np.ndarray) and address(owner(result)) in live:
            return result.view(SimArray)
        axes = np.argsort([-stride for stride in result.strides], kind="stable")  # in memory as NumPy's
        return to_device(result.transpose(axes)).transpose(np.argsort(axes)) if len(axes) > 1 else to_device(result)
    return result


class Memory(np.ndarray):
    """The bytes of an allocation; `span` is where its array lies between the guards."""

    span = (0, 0)


class SimArray(np.ndarray):
    """An array on the simulated device."""

    def __array_finalize__(self, parent):
        self._device = getattr(parent, "_device", current_device())
        if not isinstance(self.base, np.ndarray) and self.nbytes:
            live[address(self)] = self

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if out is not None:
            if not all(isinstance(o, SimArray) for o in out if o is not None):
                raise TypeError("output arrays must be on the device")
            options["out"] = tuple(plain(o) for o in out)
        result = getattr(ufunc, method)(*map(plain, inputs), **plain(options) if out is None else options)
        return out[0] if out is not None and len(out) == 1 else lifted(result)

    def __array_function__(self, function, types, arguments, options):
        out = options.get("out")
        result = function(*map(plain, arguments), **plain(options))
        return result if isinstance(result, (bool, str)) else out if out is not None else lifted(result)

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if isinstance(found, np.ndarray):
            return found
        return super().__getitem__((*key, ...) if isinstance(key, tuple) else (key, ...))

    def __setitem__(self, key, value):
        plain(value)
        super().__setitem__(key, value)

    @property
    def flags(self):
        real = np.ndarray.flags.__get__(self)
        return SimpleNamespace(c_contiguous=real.c_contiguous, f_contiguous=real.f_contiguous, owndata=real.owndata)

    @property
    def device(self):
        return Device(self._device)

    @property
    def data(self):
        return SimpleNamespace(ptr=address(self))

    @property
    def __array_interface__(self):
        raise AttributeError("arrays on a device have no __array_interface__")

    def set(self, values):
        """Takes values from the host."""
        if type(values) is not np.ndarray or (values.dtype, values.shape) != (self.dtype, self.shape):
            raise TypeError("expected a NumPy array of the same dtype and shape")
        self.view(np.ndarray)[...] = values

    def get(self):
        """A copy on the host."""
        return np.array(self.view(np.ndarray))


def empty(shape, dtype=float):
    """An array of undefined content, with guards before and behind it."""
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = Memory(size + 2 * GUARD + ALIGNMENT, np.uint8)
    memory.fill(UNDEFINED)
    start = -(address(memory) + GUARD) % ALIGNMENT + GUARD
    memory.span = (start, start + size)
    array = np.ndarray.__new__(SimArray, shape, dtype, memory, start)
    live[address(memory)] = memory
    return array


def undefined(turn, number):
    """What lies in the guards of a launch: NaN; in every other turn a number, which is small in every dtype."""
    return UNDEFINED if turn % 2 == 0 else 0x40 + number % 16


def parts(owner):
    """The bytes of an array's memory, and the guards before and behind it, if it has any."""
    everything = np.ndarray((owner.nbytes,), np.uint8, owner.view(np.ndarray))
    if not isinstance(owner, Memory):
        return [everything]
    start, stop = owner.span
    return [everything[start:stop], everything[start - GUARD : start], everything[stop : stop + GUARD]]


def end(array):
    """Makes what lies behind a view, which starts where its allocation does, its guard."""
    memory = owner(array)
    if isinstance(memory, Memory):
        memory.span = (memory.span[0], memory.span[0] + array.nbytes)


@contextmanager
def fenced():
    """A context in which AddressSanitizer, which must be loaded, takes the guards of all arrays for no memory."""
    sanitizer = ctypes.CDLL(None)
    sides = [
        (ctypes.c_void_p(address(memory) + start), ctypes.c_size_t(stop - start))
        for memory in list(live.values())
        if isinstance(memory, Memory)
        for start, stop in ((0, memory.span[0]), (memory.span[1], memory.nbytes))
    ]
    for side in sides:
        sanitizer.__asan_poison_memory_region(*side)
    try:
        yield
    finally:
        for side in sides:
            sanitizer.__asan_unpoison_memory_region(*side)


def to_device(values, dtype=None, offset=0):
    """A copy on the device, `offset` bytes behind an aligned address."""
    values = np.asarray(values, dtype)
    room = empty(offset + values.nbytes, np.uint8)
    array = room[offset:].view(values.dtype).reshape(values.shape) if values.size else empty(values.shape, values.dtype)
    array.view(np.ndarray)[...] = values
    return array


def alike(values):
    """A copy on the device with the strides of the original, as far from a word of 16 bytes, in native byte order."""
    values = np.asarray(values)
    dtype = values.dtype.newbyteorder("=")
    if not values.size:
        return empty(values.shape, dtype)
    low, high = np.lib.array_utils.byte_bounds(values)
    start = low % 16 // dtype.itemsize * dtype.itemsize
    room = empty(start + high - low, np.uint8)
    array = np.ndarray.__new__(SimArray, values.shape, dtype, room, start + address(values) - low, values.strides)
    array.view(np.ndarray)[...] = values
    return array


class Library:
    """The module of these arrays: NumPy's functions, with arguments and results on the device."""

    __name__ = "cudasim"
    ndarray = SimArray
    newaxis, pi, inf, nan = None, np.pi, np.inf, np.nan
    Device = Device

    empty = staticmethod(empty)

    @staticmethod
    def asarray(values, dtype=None):
        if isinstance(values, SimArray) and (dtype is None or values.dtype == dtype):
            return values
        return to_device(np.asarray(values), dtype)

    @staticmethod
    def array(values, dtype=None, copy=True, order="K"):
        return to_device(
            np.array(values.view(np.ndarray) if isinstance(values, SimArray) else values, dtype, order=order)
        )

    def __getattr__(self, name):
        found = getattr(np, name)
        if not callable(found) or isinstance(found, type):
            return found

        def function(*arguments, **options):
            out = options.get("out")
            result = found(*map(plain, arguments), **plain(options))
            return out if out is not None else lifted(result)

        return function

    @staticmethod
    def may_share_memory(a, b):
        return np.may_share_memory(a.view(np.ndarray), b.view(np.ndarray))

    @staticmethod
    def shares_memory(a, b):
        return np.shares_memory(a.view(np.ndarray), b.view(np.ndarray))

    @staticmethod
    def asnumpy(array):
        return array.get() if isinstance(array, SimArray) else np.asarray(array)


xp = Library()
