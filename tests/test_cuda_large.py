"""Arrays of more than 2^31 elements on the device (trap 30): the kernels and the host code as they are, at the ends of
arrays that are memory only there. The rows of layer and group norm are in test_cuda_rows, steps in test_cuda_optim."""

import copy

import numpy as np
import pytest

import reference
from cudasim.sparse import Sparse, SparseRuntime
from kilter import _kilter
from kilter.cuda.ops import table
from support import DTYPES, FLOAT16, arithmetic, same_bits
from test_cuda_batch import SEVERAL, TWICE, Case, assert_same

xp = Sparse()
CLUSTER = ["bn_train_cluster", "bn_backward_cluster"]
BATCH = {  # samples, channels, places; kernels in one call; whether channels are columns. The last sample is past 2^31.
    "planes": ((3, 105_000, 10_240), TWICE, False),
    "planes one by one": ((3, 105_000, 10_241), TWICE, False),
    "tiles of small planes": ((41, 1_120_000, 49), TWICE, True),
    "rows": ((257, 1 << 23), TWICE, True),
    "planes by clusters": ((3, 105_000, 10_240), CLUSTER, False),
    "rows by clusters": ((257, 1 << 23), CLUSTER, True),
}


def enlarged(case, channels):
    """The case as the last channels of many; the others are zero."""
    large, own = copy.copy(case), case.channels
    large.channels = channels
    for name, a in vars(case).items():
        if isinstance(a, np.ndarray) and name != "h":
            axis = min(a.ndim - 1, 1)
            there = xp.zeros((*a.shape[:axis], channels, *a.shape[axis + 1 :]), a.dtype)
            there[(slice(None),) * axis + (slice(channels - own, None),)] = xp.asarray(a)
            setattr(large, name, there)
    return large


@pytest.mark.parametrize("fused", [True, False], ids=["one call", "several"])
@pytest.mark.parametrize("name", BATCH)
def test_batch_norm(rng, monkeypatch, name, fused):
    shape, kernels, columns = BATCH[name]
    monkeypatch.setenv("KILTER_CUDA_READ_ONCE", "cluster" if kernels is CLUSTER else "")
    runtime = SparseRuntime()
    case = Case(rng, FLOAT16, (shape[0], 2, *shape[2:]), 1)
    large = enlarged(case, shape[1])
    assert (shape[0] - 1) * shape[1] * np.prod(shape[2:]) >= 2**31 and large.x.size > 2**31
    found = large.results(table(runtime), xp, fused, part=slice(-2, None))
    assert_same(found, case.results(_kilter, np), FLOAT16)
    assert [launch.kernel for launch in runtime.log] == (kernels if fused else SEVERAL)
    assert {launch.macros["COLUMNS"] for launch in runtime.log if launch.kernel != "bn_finish"} == {str(int(columns))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fills(dtype):
    """The counters of the last elements have more than 32 bits."""
    ops, size, last = table(SparseRuntime()), 2**36 + 77, 200
    words = reference.words(last, seed=5, stream=3, start=size - last)
    out = xp.empty(size, np.uint32)
    ops.philox(out, 5, 3)
    np.testing.assert_array_equal(out[-last:].get(), words)
    out = xp.empty(size, dtype)
    ops.fill_uniform(out, 5, 3, np.array([0.0, 1.0]))
    assert same_bits(out[-last:].get(), ((words >> 8) * 2.0**-24).astype(dtype))
    ops.fill_normal(out, 5, 3, np.array([0.0, 1.0]))
    found, first = out[-last:].get().astype(np.float64), size // 64 * 64 - size - 64
    pairs = (reference.words(64, seed=5, stream=3, start=size + first) >> 8).reshape(2, 2, 16)
    r, angle = np.sqrt(-2 * np.log((pairs[:, 0] + 1) * 2.0**-24)), pairs[:, 1] * 2.0**-24 * 2 * np.pi
    want = np.stack([r * np.cos(angle), r * np.sin(angle)], 1).ravel()
    np.testing.assert_allclose(found[first : first + 64], want, atol=0.02 if dtype.itemsize == 2 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flat(rng, dtype):
    runtime, size = SparseRuntime(), 2**31 + 77
    ops, real = table(runtime), arithmetic(dtype)
    x, y, s = xp.zeros(size, dtype), xp.zeros(size, dtype), xp.zeros(size, real)
    values, average = rng.normal(size=300).astype(dtype), rng.normal(size=300).astype(real)
    x[-300:], s[-300:] = xp.asarray(values), xp.asarray(average)
    ops.ema(s, x, np.array([0.25]))
    ops.probe_copy(x, y)
    np.testing.assert_allclose(s[-300:].get(), average + 0.25 * (values.astype(real) - average), rtol=1e-5, atol=1e-6)
    assert same_bits(y[-300:].get(), values)
    ops.probe_update([x], [y])
    assert same_bits(y[-300:].get(), (values.astype(real) * 2).astype(dtype))
    assert [launch.macros["INDEX"] for launch in runtime.log] == ["64"] * 3
