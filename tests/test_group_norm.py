"""kilter.norm.group_norm and instance_norm against the float64 reference, table by table."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kilter import KilterError, nn
from kilter.norm import batch_norm, group_norm, group_norm_backward, instance_norm, instance_norm_backward
from memory import ODD, odd_kinds, output_like, place
from support import DTYPES, FLOAT32, FLOAT64, arithmetic, assert_close, refused, relative_error, same_bits, ulp

# name: the shape in memory, the axes the caller sees, the channel axis; six channels
LAYOUTS = {
    "NC": ((5, 6), (0, 1), 1),
    "NCL": ((3, 6, 7), (0, 1, 2), 1),
    "NCHW": ((2, 6, 3, 5), (0, 1, 2, 3), 1),
    "NCHW, large planes": ((2, 6, 9, 11), (0, 1, 2, 3), 1),
    "NCDHW": ((2, 6, 2, 3, 5), (0, 1, 2, 3, 4), 1),
    "NLC": ((3, 7, 6), (0, 1, 2), -1),
    "NHWC": ((2, 3, 5, 6), (0, 1, 2, 3), -1),
    "NDHWC": ((2, 2, 3, 5, 6), (0, 1, 2, 3, 4), -1),
    "NHWC seen as NCHW": ((2, 3, 5, 6), (0, 3, 1, 2), 1),
}
AFFINE = {  # gamma, beta, in the data's dtype instead of the arithmetic's
    "none": (False, False, False),
    "gamma": (True, False, False),
    "beta": (False, True, False),
    "both": (True, True, False),
    "both in the data's dtype": (True, True, True),
}


def check(backend, x, dy, groups, gamma=None, beta=None, *, axis=1, eps=1e-5, bound=None):
    """Forward and backward, with fresh outputs and with out=, against the reference."""
    dtype = x.dtype
    kx, kdy, kgamma, kbeta = (None if a is None else backend.array(a) for a in (x, dy, gamma, beta))
    y, cache = group_norm(kx, groups, kgamma, kbeta, axis=axis, eps=eps)
    grads = group_norm_backward(kdy, cache)
    want, mean, var = reference.group_norm(x, groups, gamma, beta, axis=axis, eps=eps)
    assert y.dtype == dtype
    assert_close(backend.numpy(y), want, dtype, bound)
    count, found, m2 = (np.asarray(backend.numpy(a), np.float64) for a in cache.moments)
    assert count == x[0].size / groups
    exact = dtype == FLOAT64
    assert_close(m2 / count, var, arithmetic(dtype), 1e-13 if exact else 1e-6)
    assert relative_error(found, mean, np.linalg.norm(np.sqrt(var / count))) < (1e-13 if exact else 1e-6)

    wanted = reference.group_norm_backward(dy, x, groups, gamma, axis=axis, eps=eps)
    # A sum of independent terms is judged by its usual size, a dx of few values by dx before the projection.
    rstd = np.broadcast_to(1 / np.sqrt(var + eps)[..., None], (*var.shape, int(count)))
    free = reference.grouped(dy, groups, axis)[0] * rstd
    terms = np.sqrt(x.size)
    for name, grad, expected, scale, source in zip(
        grads._fields, grads, wanted, (np.linalg.norm(free), terms, terms), (x, gamma, beta), strict=True
    ):
        assert (grad is None) == (source is None), name
        if grad is not None:
            assert grad.dtype == source.dtype, name
            assert_close(backend.numpy(grad), expected, source.dtype, bound, scale)

    out, dx = backend.array(output_like(x)), backend.array(output_like(x))
    y2, cache = group_norm(kx, groups, kgamma, kbeta, axis=axis, eps=eps, out=out)
    grads2 = group_norm_backward(kdy, cache, out=dx)
    assert y2 is out and grads2.dx is dx
    assert same_bits(backend.numpy(y2), backend.numpy(y))
    for a, b in zip(grads2, grads, strict=True):
        assert a is b is None or same_bits(backend.numpy(a), backend.numpy(b))


PARTS = [(layout, groups) for layout in LAYOUTS for groups in (1, 3, 6) if (layout, groups) != ("NC", 6)]


@pytest.mark.pairs
@pytest.mark.parametrize("placement", ["contiguous", "strided", "offset"])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize(("layout", "groups"), PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(backend, rng, dtype, layout, groups, affine, placement):
    memory, axes, axis = LAYOUTS[layout]
    x, dy = (place(rng.normal(size=memory), dtype, placement, axes) for _ in range(2))
    has_gamma, has_beta, in_data_dtype = AFFINE[affine]
    small = dtype if in_data_dtype else arithmetic(dtype)
    gamma, beta = (place(rng.normal(size=6), small, placement) for _ in range(2))
    check(backend, x, dy, groups, gamma if has_gamma else None, beta if has_beta else None, axis=axis)


SHAPES = [  # (N, C, *spatial), groups: lane tails, block edges, one channel, one sample, tiny and odd planes
    ((3, 2), 1),
    ((63, 51), 17),
    ((300, 64), 2),
    ((2, 10_000), 4),
    ((1, 9000), 1),
    ((5, 33, 1, 1), 11),
    ((3, 40, 7, 7), 8),
    ((3, 40, 7, 7), 40),
    ((40, 6, 8, 8), 3),
    ((2, 6, 8, 9), 3),
    ((2, 3, 13, 17), 3),
    ((1, 1, 65, 67), 1),
    ((2, 10, 65, 67), 2),
    ((1, 4, 1, 4099), 4),
    ((2, 3, 1, 70_001), 1),
    ((1, 1, 2), 1),
    ((70, 1, 3), 1),
    ((1, 2, 600, 700), 1),
]


@pytest.mark.pairs
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(backend, rng, dtype, shape, groups, last):
    if backend.xp is not np and math.prod(shape) > 12_000:  # what a simulator has done in a second
        shape = (min(shape[0], 70), *(n if n < 600 else 600 + n % 8 for n in shape[1:]))
        shape = (*shape[:2], 77, 70) if shape[-2:] == (600, 604) else shape
    x, dy = (np.moveaxis(rng.normal(size=shape), 1, -1 if last else 1).astype(dtype, "C") for _ in range(2))
    gamma, beta = rng.normal(size=(2, shape[1])).astype(arithmetic(dtype))
    # Two values are about 1 and -1, whatever they were: what is left of dx is a difference of nearly equal terms.
    check(backend, x, dy, groups, gamma, beta, axis=-1 if last else 1, eps=0.1 if math.prod(shape) < 10 else 1e-5)


@pytest.mark.parametrize("first", [None, 0.0, 1e4 + 100], ids=["plain", "zero first", "outlier first"])
@pytest.mark.parametrize("shape", [(3, 20_000), (2, 8, 79, 83), (4, 512, 7, 7)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_large_mean(backend, rng, axis, shape, first):
    """Mean 1e4, deviation 1: E[x^2] - E[x]^2 and a shift by the first value both fail here."""
    if backend.xp is not np:
        shape = (1, *(min(n, 4000) for n in shape[1:]))
    x = rng.normal(1e4, 1, shape).astype(FLOAT32)
    dy = rng.normal(size=shape).astype(FLOAT32)
    if first is not None:
        x.reshape(shape[0], 4, -1)[..., 0] = first
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (x, dy))
    gamma, beta = rng.normal(size=(2, shape[1])).astype(FLOAT32)
    check(backend, x, dy, 4, gamma, beta, axis=axis, bound=5e-6)


@pytest.mark.pairs
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4 + 1 / 3])
@pytest.mark.parametrize("shape", [(7, 6), (3, 6, 7, 7), (2, 6, 65, 67)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_group(backend, rng, dtype, axis, shape, value):
    x = np.moveaxis(np.full(shape, value), 1, axis).astype(dtype, "C")
    beta, dy = rng.normal(size=6).astype(arithmetic(dtype)), rng.normal(size=x.shape).astype(dtype)
    y, cache = group_norm(backend.array(x), 2, beta=backend.array(beta), axis=axis, eps=1e-8)
    assert (backend.numpy(cache.moments.m2) == 0).all()
    assert (np.moveaxis(backend.numpy(y), axis, -1) == beta.astype(dtype)).all()
    grads = [backend.numpy(g) for g in group_norm_backward(backend.array(dy), cache) if g is not None]
    assert all(np.isfinite(np.asarray(g, np.float64)).all() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_what_is_not_finite_stays_in_its_group(backend, rng, dtype, axis):
    for shape in ((4, 6), (3, 6, 5, 5), (3, 6, 9, 11)):
        clean = np.moveaxis(rng.normal(size=shape), 1, axis).astype(dtype, "C")

        def results(x, clean=clean):
            y, cache = group_norm(backend.array(x), 3, axis=axis)
            return [backend.numpy(a) for a in (y, group_norm_backward(backend.array(clean), cache).dx)]

        wanted = results(clean)
        for bad in (np.nan, np.inf):
            x = clean.copy()
            np.moveaxis(x, axis, 1)[1, 4] = bad  # of the last of three groups
            for got, good in zip(results(x), wanted, strict=True):
                got, good = (np.moveaxis(a, axis, 1) for a in (got, good))
                assert np.isnan(got[1, 4:]).all()
                assert same_bits(got[1, :4], good[1, :4]) and same_bits(got[[0, 2]], good[[0, 2]])


# --------------------------------------------------------------------------- worked numbers and named properties


def test_v6_two_groups():
    """[2, 4] and [6, 8] are each -1 and 1, over sqrt(1.00001)."""
    x, want = np.array([[2.0, 4.0, 6.0, 8.0]]), np.array([-0.999995000038, 0.999995000038] * 2)
    np.testing.assert_allclose(group_norm(x, 2)[0][0], want, atol=1e-12)
    np.testing.assert_allclose(group_norm(x.reshape(1, 2, 2), 2)[0].ravel(), want, atol=1e-12)
    np.testing.assert_allclose(group_norm(x.reshape(1, 2, 2), 2, axis=-1)[0][0, :, 0], [-1, 1], atol=1e-5)
    np.testing.assert_allclose(instance_norm(x.reshape(1, 2, 2))[0].ravel(), want, atol=1e-12)
    whole = [-1.341639444861, -0.447213148287, 0.447213148287, 1.341639444861]
    np.testing.assert_allclose(group_norm(x, 1)[0][0], whole, atol=1e-12)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instance_norm_is_one_group_per_channel(backend, rng, dtype, axis):
    for shape in ((4, 8, 6, 8), (3, 8, 9, 9, 8)):
        x, dy = map(backend.array, rng.normal(2, 3, (2, *shape)).astype(dtype))
        gamma, beta = map(backend.array, rng.normal(size=(2, 8)).astype(arithmetic(dtype)))
        y, cache = instance_norm(x, gamma, beta, axis=axis)
        want, expected = group_norm(x, 8, gamma, beta, axis=axis)
        grads, wanted = instance_norm_backward(dy, cache), group_norm_backward(dy, expected)
        out = backend.xp.empty(x.shape, x.dtype)
        assert instance_norm(x, gamma, beta, axis=axis, out=out)[0] is out
        for got, good in ((y, want), (out, y), *zip(grads, wanted, strict=True)):
            assert same_bits(backend.numpy(got), backend.numpy(good))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_is_the_whole_sample(rng, dtype, axis):
    """Layer norm over channels and positions, without a gamma per element: batch norm of one channel per sample."""
    for shape in ((5, 96), (3, 10, 5, 5), (3, 10, 12, 13)):
        x, dy = (np.moveaxis(rng.normal(1, 2, shape), 1, axis).astype(dtype, "C") for _ in range(2))
        y, cache = group_norm(x, 1, axis=axis)
        rows = np.ascontiguousarray(x.reshape(len(x), -1))
        want = reference.batch_norm(rows.T)[0].T.reshape(x.shape)
        assert_close(y, want, dtype)
        assert_close(batch_norm(rows, axis=0)[0].reshape(x.shape), want, dtype)
        dx = reference.batch_norm_backward(dy.reshape(rows.shape).T, rows.T)[0].T.reshape(x.shape)
        assert_close(group_norm_backward(dy, cache).dx, dx, dtype)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_see_the_batch(backend, rng, dtype, axis):
    """The same bits for a sample alone and in batches of any size; training and use do not differ."""
    large = ((6, 12, 150, 160),) if backend.xp is np else ()
    for shape in ((64, 12), (64, 12, 7, 7), (64, 12, 9, 9), *large):
        shape = shape if backend.xp is np else (7, *shape[1:])
        x = backend.array(np.moveaxis(rng.normal(size=shape), 1, axis).astype(dtype, "C"))
        layer = nn.GroupNorm(4, 12, axis=axis, dtype=dtype, affine=backend.xp is np)
        whole = backend.numpy(layer(x))
        for part in (slice(0, 1), slice(1, 4), slice(5, 38)):
            assert same_bits(backend.numpy(layer(x[part])), whole[part])
        assert same_bits(backend.numpy(layer.eval()(x)), whole)


@pytest.mark.parametrize("shape", [(4, 8, 28, 28), (4, 32, 7, 7), (2, 6, 65, 67)], ids=str)
@pytest.mark.parametrize("mean", [0, 0.1, 3, 1e3, 1e5])
def test_layouts_agree_to_two_ulp(backend, rng, mean, shape):
    """rstd within 2 ulp of float32; the mean within 2 ulp of itself, or of 1/8 of the spread where that is larger."""
    x = rng.normal(mean, 1, shape).astype(FLOAT32)
    first, last = backend.array(x), backend.array(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    view = backend.xp.moveaxis(last, -1, 1)
    caches = [group_norm(first, 2)[1], group_norm(last, 2, axis=-1)[1], group_norm(view, 2)[1]]
    (mean, rstd), other, seen = [[backend.numpy(a) for a in (cache.mean, cache.rstd)] for cache in caches]
    unit = np.maximum(np.abs(mean), 1 / 8 / rstd)
    assert (np.abs(mean - other[0]) <= 2 * ulp(unit, FLOAT32)).all()
    assert (np.abs(rstd - other[1]) <= 2 * ulp(rstd, FLOAT32)).all()
    assert same_bits(other[0], seen[0]) and same_bits(other[1], seen[1])


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (2, 4, 3), (3, 8)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_gradients_are_central_differences(rng, axis, shape, groups):
    x, dy = rng.normal(size=(2, *shape))
    gamma, beta = rng.normal(size=(2, shape[1]))
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (x, dy))

    def loss():
        return float((group_norm(x, groups, gamma, beta, axis=axis)[0] * dy).sum())

    _, cache = group_norm(x, groups, gamma, beta, axis=axis)
    for array, grad in zip((x, gamma, beta), group_norm_backward(dy, cache), strict=True):
        difference = np.empty_like(array)
        for i in np.ndindex(array.shape):
            kept, ends = array[i], []
            for h in (1e-6, -1e-6):
                array[i] = kept + h
                ends.append(loss())
            difference[i], array[i] = (ends[0] - ends[1]) / 2e-6, kept
        np.testing.assert_allclose(grad, difference, atol=1e-7)


# --------------------------------------------------------------------------- drawn calls


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from(DTYPES))
    groups, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    if width * math.prod(spatial) < 3:
        spatial.append(3)
    axis = draw(st.sampled_from((1, -1)))
    shape = (draw(st.integers(1, 6)), groups * width, *spatial)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mean = draw(st.sampled_from((0.0, 1.0, 30.0)))

    def memory(values):
        return ODD[draw(st.sampled_from(odd_kinds(dtype)))](np.moveaxis(values, 1, axis).astype(dtype))

    x, dy = memory(rng.normal(mean, 1, shape)), memory(rng.normal(size=shape))
    gamma, beta = (rng.normal(size=shape[1]).astype(arithmetic(dtype)) if draw(st.booleans()) else None for _ in "ab")
    return x, dy, groups, gamma, beta, axis


@settings(max_examples=100, deadline=None)
@given(calls())
def test_any_call(call):
    x, dy, groups, gamma, beta, axis = call
    native = x.dtype.newbyteorder("=")
    y, cache = group_norm(x, groups, gamma, beta, axis=axis, eps=0.01)
    grads = group_norm_backward(dy, cache)
    assert y.dtype == grads.dx.dtype == native
    want = reference.group_norm(x, groups, gamma, beta, axis=axis, eps=0.01)[0]
    assert_close(y, want, native, 1e-12 if native == FLOAT64 else 5e-6, np.sqrt(x.size))
    wants = reference.group_norm_backward(dy, x, groups, gamma, axis=axis, eps=0.01)
    scale = np.sqrt(x.size) / np.sqrt(max(float(cache.rstd.min() ** -2), 0.01)) * 10
    bound = 1e-12 if native == FLOAT64 else 5e-6
    for grad, expected, source in zip(grads, wants, (native, gamma, beta), strict=True):
        if source is not None:
            assert_close(grad, expected, getattr(source, "dtype", source), bound, scale)


# --------------------------------------------------------------------------- in place, and what is refused


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_an_input(backend, rng, dtype):
    x, dy = map(backend.array, rng.normal(size=(2, 20, 6, 9)).astype(dtype))
    want, cache = group_norm(x.copy(), 3)
    wanted = backend.numpy(group_norm_backward(dy.copy(), cache).dx)
    assert same_bits(backend.numpy(group_norm_backward(dy, cache, out=dy).dx), wanted)
    y, cache = group_norm(x, 3, out=x)
    assert y is x and same_bits(backend.numpy(y), backend.numpy(want))
    with refused("cache", x):
        group_norm_backward(dy, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1, 1), (5, 4, 0)], ids=str)
def test_one_value_per_group(shape, dtype):
    """Its variance would be zero, and y beta whatever x is."""
    x, out = np.ones(shape, dtype), np.full(shape, 7, dtype)
    for call in (lambda: group_norm(x, 4, out=out), lambda: instance_norm(x, out=out)):
        with refused("(?i)more than one value per group", out):
            call()


def test_nothing_is_nothing(backend):
    for dtype in DTYPES:
        for shape in ((0, 4), (0, 4, 5), (3, 0), (3, 0, 5)):
            gamma, beta = map(backend.array, np.ones((2, shape[1]), arithmetic(dtype)))
            y, cache = group_norm(backend.array(np.empty(shape, dtype)), 2, gamma, beta)
            grads = group_norm_backward(y, cache)
            assert y.shape == grads.dx.shape == shape
            dgamma, dbeta = backend.numpy(grads.dgamma), backend.numpy(grads.dbeta)
            assert (dgamma == 0).all() and (dbeta == 0).all() and len(dbeta) == shape[1]


X32 = np.arange(48, dtype=np.float32).reshape(4, 6, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("groups", {"groups": 4}),
        ("groups", {"groups": 0}),
        ("groups", {"groups": -1}),
        ("groups", {"groups": 12}),
        ("groups", {"groups": 2.0}),
        ("groups", {"groups": True}),
        ("groups", {"groups": None}),
        ("gamma", {"gamma": np.ones(2, np.float32)}),
        ("gamma", {"gamma": np.ones((6, 1), np.float32)}),
        ("gamma", {"gamma": np.ones(6, np.float64)}),
        ("beta", {"beta": np.ones(4, np.float32)}),
        ("beta", {"beta": 1.0}),
        ("axis", {"axis": 3}),
        ("axis", {"axis": 0}),
        ("axis", {"axis": 1.5}),
        ("eps", {"eps": -1e-5}),
        ("eps", {"eps": float("nan")}),
        ("out", {"out": np.empty((4, 6), np.float32)}),
        ("out", {"out": np.empty((4, 6, 2), np.float64)}),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(map(str, v)),
)
def test_refusals_name_the_argument(name, options):
    options = {"groups": 3, "out": np.full((4, 6, 2), 7, np.float32), **options}
    with refused(rf"\b{name}\b", X32, options["out"]):
        group_norm(X32, **options)


@pytest.mark.parametrize("axis", [2, -2])
def test_channels_are_first_or_last(rng, axis):
    with refused("axis"):
        group_norm(rng.normal(size=(2, 4, 4, 4)), 2, axis=axis)


@pytest.mark.parametrize("dy", [np.ones((4, 6), np.float32), np.ones((4, 6, 2)), None, [[1.0]]], ids=str)
@pytest.mark.parametrize("backward", [group_norm_backward, instance_norm_backward])
def test_backward_refusals(backward, dy):
    _, cache = instance_norm(X32)
    out = np.full((4, 6, 2), 7, np.float32)
    with refused("dy", out):
        backward(dy, cache, out=out)
    for other in (None, (X32, None), batch_norm(X32)[1]):
        with refused("cache", out):
            backward(X32, other, out=out)


# --------------------------------------------------------------------------- layers


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers(rng, dtype, axis, reuse):
    x, dy = rng.normal(size=(2, 4, 6, 5, 6)).astype(dtype)
    for layer, groups in (
        (nn.GroupNorm(3, 6, axis=axis, dtype=dtype), 3),
        (nn.InstanceNorm(6, axis=axis, dtype=dtype), 6),
    ):
        gamma, beta = layer.params()["gamma"], layer.params()["beta"]
        assert gamma.dtype == arithmetic(dtype)
        gamma[:], beta[:] = rng.normal(size=(2, 6))
        layer.reuse_buffers(reuse)
        y, dx = layer(x), layer.backward(dy)
        want, cache = group_norm(x, groups, gamma, beta, axis=axis)
        wanted = group_norm_backward(dy, cache)
        assert same_bits(y, want) and same_bits(dx, wanted.dx)
        assert same_bits(layer.grads()["gamma"], wanted.dgamma) and same_bits(layer.grads()["beta"], wanted.dbeta)
        assert (layer(x) is y) == reuse and layer.backward(dy, need_dx=False) is None


def test_layers_without_affine(rng):
    x = rng.normal(size=(3, 4, 5)).astype(FLOAT32)
    for layer, want in (
        (nn.GroupNorm(2, 4, affine=False), group_norm(x, 2)),
        (nn.InstanceNorm(4, affine=False), instance_norm(x)),
    ):
        assert not layer.params() and not layer.state_dict()
        assert same_bits(layer(x), want[0])
        assert same_bits(layer.backward(x), group_norm_backward(x, want[1]).dx)


def test_layers_follow_their_dtype(rng):
    layer = nn.GroupNorm(2, 4).to("float64")
    assert layer.params()["gamma"].dtype == FLOAT64
    layer(rng.normal(size=(3, 4, 5)))
    assert layer.to("bfloat16").params()["gamma"].dtype == FLOAT32
    frozen = nn.GroupNorm(2, 4, dtype="float64").freeze()
    frozen(rng.normal(size=(3, 4, 5)))
    assert frozen.backward(rng.normal(size=(3, 4, 5))).shape == (3, 4, 5) and not frozen.params()


def test_layers_refuse(rng):
    for groups, features, name in ((4, 6, "groups"), (0, 6, "groups"), (2.0, 6, "groups"), (2, 0, "features")):
        with refused(name):
            nn.GroupNorm(groups, features)
    with refused("features"):
        nn.InstanceNorm(6.5)
    with refused("x|channels"):
        nn.GroupNorm(3, 6)(rng.normal(size=(2, 9, 4)).astype(FLOAT32))
    with refused("x|channels"):
        nn.InstanceNorm(6)(rng.normal(size=(2, 9, 4)).astype(FLOAT32))
    with pytest.raises(KilterError, match="dtype"):
        nn.GroupNorm(3, 6, dtype="int32")
