"""Layer, RMS, group and instance norm on the device: which kernels a shape takes, that results do not depend on where
arrays lie or how many rows there are before them, past 2^31 elements too, and that nothing waits for the device."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

import cudasim
from cudasim.runtime import SimError, _argument, _Launch
from kilter import _kilter
from kilter.cuda import groups, rows, rows_backward, source
from kilter.cuda.ops import table
from kilter.cuda.rows import Rows
from kilter.cuda.source import C_NAMES
from kilter.norm import group_norm, group_norm_backward, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, arithmetic, assert_close, same_bits
from test_cuda_batch import nothing_waits

FAMILIES = (*rows.FAMILIES, *rows_backward.FAMILIES, *groups.FAMILIES)
PARTS = ("moments", "merge_moments", "apply")
TWICE = ("moments_last", "merge_moments", "apply_last", "sums_last", "merge_sums", "gradient_last", "sum_rows")
ROWS = {  # shape, dtype: the kernels, and the threads of a row and rows of a block of the first; forward, backward
    ((40, 64), BFLOAT16): (("forward",), (8, 16), ("backward", "sum_rows"), (8, 32)),
    ((40, 64), FLOAT32): (("forward",), (16, 8), ("backward", "sum_rows"), (16, 16)),
    ((40, 100), FLOAT16): (("forward",), (16, 8), ("backward", "sum_rows"), (16, 16)),
    ((9, 1024), BFLOAT16): (("forward",), (32, 4), ("backward", "sum_rows"), (64, 4)),
    ((9, 768), FLOAT32): (("forward",), (64, 2), ("backward", "sum_rows"), (64, 4)),
    ((5, 4096), BFLOAT16): (("forward",), (128, 1), ("backward", "sum_rows"), (256, 1)),
    ((3, 8192), FLOAT32): (("forward",), (512, 1), ("backward", "sum_rows"), (512, 1)),
    ((3, 8193), FLOAT32): (("forward",), (512, 1), ("sums", "merge_sums", "backward", "sum_rows"), (256, 1)),
    ((2, 20000), FLOAT32): (("forward",), (512, 1), ("sums", "merge_sums", "backward", "sum_rows"), (256, 1)),
    ((1, 65536), FLOAT32): (PARTS, (256, 1), ("sums", "merge_sums", "backward", "sum_rows"), (256, 1)),
}
GROUPS = {  # shape, axis, groups, dtype: the kernels forward and backward
    ((5, 32), 1, 4, FLOAT32): (("forward",), ("backward", "sum_rows")),
    ((3, 8, 7, 7), 1, 4, FLOAT16): (("forward",), ("backward", "sum_rows")),
    ((3, 6, 9, 11), 1, 3, FLOAT16): (("forward",), ("backward_shared", "sum_rows")),
    ((1, 10, 64, 64), 1, 1, FLOAT16): (("forward",), ("backward_shared", "sum_rows")),
    ((1, 4, 128, 128), 1, 1, FLOAT32): (PARTS, ("sums", "merge_sums", "gradient_long", "sum_rows")),
    ((3, 7, 7, 40), 3, 4, FLOAT16): (("forward_last",), ("backward_last", "sum_rows")),
    ((1, 28, 50, 64), 3, 1, FLOAT16): (("forward_last",), TWICE[3:]),
    ((1, 50, 60, 64), 3, 1, FLOAT16): (TWICE[:3], TWICE[3:]),
    ((2, 3, 3, 520), 3, 2, FLOAT32): (TWICE[:3], TWICE[3:]),
}


def launched(cuda, call):
    """What a call returns, and the kernels that it launches."""
    cuda.runtime.log.clear()
    found = call()
    return found, list(cuda.runtime.log)


@pytest.mark.parametrize(("shape", "dtype"), ROWS, ids=str)
def test_rows_take_these_kernels(cuda, rng, monkeypatch, shape, dtype):
    forward, first, backward, second = ROWS[shape, dtype]
    x = cuda.array(rng.normal(size=shape).astype(dtype))
    with nothing_waits(monkeypatch):
        (_, cache), there = launched(cuda, lambda: layer_norm(x))
        _, back = launched(cuda, lambda: layer_norm_backward(x, cache))
    assert tuple(one.kernel for one in there) == forward and tuple(one.kernel for one in back) == backward
    assert there[0].block[:2] == (first[0], min(first[1], rows.power(shape[0], 1)))
    assert back[0].block[:2] == (second[0], min(second[1], rows.power(shape[0], 1)))
    assert forward[0] == "moments" or there[0].grid[0] == -(-shape[0] // there[0].block[1])


@pytest.mark.parametrize(("shape", "axis", "parts", "dtype"), GROUPS, ids=str)
def test_groups_take_these_kernels(cuda, rng, monkeypatch, shape, axis, parts, dtype):
    x = cuda.array(rng.normal(size=shape).astype(dtype))
    with nothing_waits(monkeypatch):
        (_, cache), there = launched(cuda, lambda: group_norm(x, parts, axis=axis))
        _, back = launched(cuda, lambda: group_norm_backward(x, cache))
    assert tuple(tuple(one.kernel for one in some) for some in (there, back)) == GROUPS[shape, axis, parts, dtype]


def test_blocks_for_all_processors():
    """Where there are rows enough; and few, where each block leaves a row of sums behind."""
    cuda = table(cudasim.SimRuntime(processors=132)).ln_forward.args[0]
    like = cudasim.xp.empty((1, 8), BFLOAT16)
    for rows_of, width, least, most in ((65536, 256, 264, 528), (8192, 1024, 132, 264), (4096, 4096, 132, 264)):
        walks = rows_backward._Walks.of(cuda, like, Rows(rows_of, width), 8)
        assert least <= walks.blocks * walks.lanes * walks.walks / 256 <= most
    assert rows_backward._Walks.of(cuda, like, Rows(64, 4096), 8).blocks == 8


# --------------------------------------------------------------------------- results


def norms(cuda, dtype):
    """Forward and backward by all kernels: name, shape, KB of shared memory with which it goes this way, calls."""
    real = arithmetic(dtype)

    def layer(x, r, dy, ds, width, h):
        mine = [cuda.xp.empty(x.shape[:1], real) for _ in range(3)]
        total, y, dx, sums = *(cuda.xp.empty(x.shape, dtype) for _ in range(3)), cuda.xp.empty((2, width))
        gamma, beta = cuda.array(np.linspace(1, 2, 2 * width).reshape(2, width).astype(real))
        cuda.ops.ln_forward(x, r, h, gamma, beta, *mine, total, y)
        cuda.ops.ln_backward(dy, total, gamma, *mine, ds, *sums, dx)
        return total, y, *mine, dx, sums

    def group(x, r, dy, ds, axis, parts, h):
        mean, m2 = cuda.xp.empty((2, x.shape[0] * parts))
        channels = x.shape[axis]
        y, dx, sums = *(cuda.xp.empty(x.shape, dtype) for _ in range(2)), cuda.xp.empty((2, channels))
        gamma, beta = cuda.array(np.linspace(1, 2, 2 * channels).reshape(2, channels).astype(real))
        cuda.ops.gn_forward(x, axis, parts, h, gamma, beta, mean, m2, y)
        cuda.ops.gn_backward(dy, x, axis, parts, h, mean, m2, gamma, *sums, dx)
        return y, mean, m2, dx, sums

    return {
        "rows": ((16, 40), 20, lambda *a: layer(*a[:4], 40, a[4])),
        "odd rows": ((16, 75), 20, lambda *a: layer(*a[:4], 75, a[4])),
        "rows in shared memory": ((1, 2051), 20, lambda *a: layer(*a[:4], 2051, a[4])),
        "rows in parts": ((1, 16_400), 20, lambda *a: layer(*a[:4], 16_400, a[4])),
        "planes in shared memory": ((2, 4, 8, 9), 20, lambda *a: group(*a[:4], 1, 2, a[4])),
        "planes in parts": ((2, 4, 80, 104), 20, lambda *a: group(*a[:4], 1, 2, a[4])),
        "channels last in shared memory": ((2, 9, 11, 24), 227, lambda *a: group(*a[:4], 3, 6, a[4])),
        "channels last": ((2, 9, 11, 24), 20, lambda *a: group(*a[:4], 3, 6, a[4])),
        "wide groups, channels last": ((2, 3, 3, 520), 20, lambda *a: group(*a[:4], 3, 2, a[4])),
    }


ONE_LOOK, SUMMED = ("forward", "backward", "sum_rows"), ("sums", "merge_sums", "backward", "sum_rows")
NAMES = {  # of `norms`: the kernels of all dtypes
    "rows": ONE_LOOK,
    "odd rows": ONE_LOOK,
    "rows in shared memory": ("forward", *SUMMED),
    "rows in parts": (*PARTS, *SUMMED),
    "planes in shared memory": ("forward", "backward_shared", "sum_rows"),
    "planes in parts": (*PARTS, "sums", "merge_sums", "gradient_long", "sum_rows"),
    "channels last in shared memory": ("forward_last", "backward_last", "sum_rows"),
    "channels last": TWICE,
    "wide groups, channels last": TWICE,
}


def test_these_are_all_kernels():
    assert {kernel for family in FAMILIES for kernel in family.kernels} == set().union(*NAMES.values())


def results(runtime, name, dtype, place=lambda a: a, h=None, mean=1.0):
    """What the operations of a runtime, or of the core, give for the same data."""
    xp, ops = (np, _kilter) if runtime is None else (cudasim.xp, table(runtime))
    shape, _, call = norms(SimpleNamespace(ops=ops, xp=xp, array=xp.asarray), dtype)[name]
    x, *others = np.random.default_rng(0).normal(1, 2, (4, *shape))
    data = [place(xp.asarray(a.astype(dtype))) for a in (x + mean - 1, *others)]
    found = call(*data, np.array([1e-5]) if h is None else h)
    return found if runtime is None else [a.get() for a in found]


def shared(name):
    return norms(None, FLOAT32)[name][1] << 10


@pytest.mark.parametrize("mean", [1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_core(name, dtype, mean):
    wanted = results(None, name, dtype, mean=mean)
    runtime = cudasim.SimRuntime(shared=shared(name))
    found = results(runtime, name, dtype, mean=mean)
    assert tuple(launch.kernel for launch in runtime.log) == NAMES[name]
    assert all(launch.macros["T"] in (C_NAMES[dtype.name], C_NAMES[arithmetic(dtype).name]) for launch in runtime.log)
    if "rows" in name:  # one number, in two parts that need not be the same
        wanted, found = ([*some[:2], some[2].astype(FLOAT64) + some[3], *some[4:]] for some in (wanted, found))
    kinds = [a.dtype if a.dtype == dtype else arithmetic(dtype) for a in wanted]
    for got, want, kind in zip(found, wanted, kinds, strict=True):
        bound = 2e-12 if kind == FLOAT64 else 1e-5 if mean > 1 else 4e-6
        assert_close(got, want, kind, bound, np.sqrt(want.size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_where_arrays_lie(name, dtype):
    def elsewhere(a):
        room = cudasim.xp.zeros(a.size + 1, dtype)
        room[1:] = a.ravel()
        return room[1:].reshape(a.shape)

    runtime = cudasim.SimRuntime(shared=shared(name))
    wanted, found = results(runtime, name, dtype), results(runtime, name, dtype, elsewhere)
    device = results(runtime, name, dtype, h=cudasim.xp.asarray(np.array([1e-5])))
    assert all(same_bits(a, b) and same_bits(c, b) for a, b, c in zip(found, wanted, device, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_may_lie_anywhere(cuda, rng, dtype):
    x, dy = map(cuda.array, rng.normal(size=(2, 4, 6, 8)).astype(dtype))
    for forward, backward in (
        (layer_norm, layer_norm_backward),
        (rms_norm, rms_norm_backward),
        (lambda x, **o: group_norm(x, 2, **o), group_norm_backward),
        (lambda x, **o: group_norm(x, 2, axis=-1, **o), group_norm_backward),
    ):
        y, cache = forward(x)
        dx = backward(dy, cache).dx
        out = [cuda.xp.zeros(x.size + 2, dtype)[1:-1].reshape(x.shape) for _ in range(2)]
        assert forward(x, out=out[0])[0] is out[0] and backward(dy, cache, out=out[1]).dx is out[1]
        assert same_bits(cuda.numpy(out[0]), cuda.numpy(y)) and same_bits(cuda.numpy(out[1]), cuda.numpy(dx))


# --------------------------------------------------------------------------- more than 2^31 elements

KERNELS = {name: family.name for family in FAMILIES for name in family.kernels}


class FarRuntime(cudasim.SimRuntime):
    """Runs each launch as the end of one whose arrays have more than 2^32 elements, of which only the end is there."""

    def launch(self, function, grid, block, arguments, shared, cluster, cooperative):
        if function.name == "sum_rows":  # of all rows, whatever they are
            return super().launch(function, grid, block, arguments, shared, cluster, cooperative)
        parameters = source.parameters_text(KERNELS[function.name], function.name).split(",")
        names = [parameter.split()[-1].lstrip("*") for parameter in parameters]
        grid, block = ((*size, 1, 1)[:3] for size in (grid if isinstance(grid, tuple) else (grid,), block))
        least = min(a.size for n, a in zip(names, arguments, strict=True) if n in ("x", "dy", "partial"))
        times = min(2**32 // least + 1, (2**31 - 1) // grid[0])
        grow = {"backward": {"samples", "parts"}, "forward": {"rows"}, "sums": {"rows"}}.get(function.name, ())
        keep = []
        for index, (name, kind, value) in enumerate(zip(names, function.types, arguments, strict=True)):
            found = _argument(function, index, kind, value * type(value)(times) if name in grow else value)
            if isinstance(value, cudasim.SimArray) and name not in ("gamma", "beta"):
                found = found - np.uintp((times - 1) * value.nbytes)
            keep.append(found)
        pointers = (ctypes.c_void_p * len(keep))(*(a.ctypes.data for a in keep))
        message = ctypes.create_string_buffer(512)
        size = _Launch((grid[0] * times, *grid[1:]), block, shared, 0, 1, 0, grid[0] * (times - 1))
        if function.call(ctypes.byref(size), pointers, message):
            raise SimError(message.value.decode())
        self.log.append(times)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_more_than_2_31_elements(name):
    """Trap 30. There is no variant with 64-bit indices: a row begins at a 64-bit offset in every kernel."""
    far = FarRuntime(shared=shared(name))
    found, wanted = results(far, name, FLOAT64), results(cudasim.SimRuntime(shared=shared(name)), name, FLOAT64)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True)) and far.log


def test_divisors():
    for by in (1, 2, 3, 5, 7, 49, 63, 64, 65, 4095, 99_991, 2**20 + 1, 2**31 - 1, 2**31 + 5):
        factor, shift = Rows(1, by, inner=by).divisor
        for n in (0, 1, by - 1, by, by + 1, 3 * by - 1, 10**9, 2**31 - 1):
            if n < 2**31:
                assert 0 < factor < 2**32 and (n * factor >> shift) == n // min(by, 2**31 - 1)
