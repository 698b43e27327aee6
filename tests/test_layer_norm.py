"""kilter.norm.layer_norm and rms_norm against the float64 reference, table by table."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kilter import KilterError, nn
from kilter.norm import batch_norm, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from memory import ODD, odd_kinds, place
from support import BFLOAT16, DTYPES, FLOAT32, FLOAT64, arithmetic, assert_close, refused, relative_error, same_bits

OPS = ("layer", "rms")
AFFINE = {  # gamma, beta, in the data's dtype instead of the arithmetic's
    "none": (False, False, False),
    "gamma": (True, False, False),
    "beta": (False, True, False),
    "both": (True, True, False),
    "both in the data's dtype": (True, True, True),
}
ROWS = [(1, (5, 12)), (1, (12,)), (1, (2, 3, 17)), (2, (4, 3, 6)), (3, (2, 3, 4, 5)), (2, (4, 5)), (1, (3, 1, 64))]


def forward(op, x, gamma, beta, **options):
    return layer_norm(x, gamma, beta, **options) if op == "layer" else rms_norm(x, gamma, **options)


def backward(op, dy, cache, **options):
    return (layer_norm_backward if op == "layer" else rms_norm_backward)(dy, cache, **options)


def check(backend, op, x, dy, gamma=None, beta=None, *, ndim=1, eps=1e-5, bound=None):
    """Forward and backward, with fresh outputs and with out=, against the reference."""
    dtype, real = x.dtype, arithmetic(x.dtype)
    beta = beta if op == "layer" else None
    kx, kdy, kgamma, kbeta = (None if a is None else backend.array(a) for a in (x, dy, gamma, beta))
    y, cache = forward(op, kx, kgamma, kbeta, ndim=ndim, eps=eps)
    grads = backward(op, kdy, cache)
    options = {"ndim": ndim, "eps": eps, "centred": op == "layer"}
    want, mean, rstd = reference.layer_norm(x, gamma, beta, **options)
    assert y.dtype == dtype and y.shape == x.shape
    assert_close(backend.numpy(y), want, dtype, bound)
    exact = 1e-13 if dtype == FLOAT64 else 1e-6
    assert cache.rstd.dtype == real
    assert relative_error(backend.numpy(cache.rstd), rstd) < exact
    if op == "layer":
        assert relative_error(backend.numpy(cache.mean), mean, np.linalg.norm(1 / rstd)) < exact

    wanted = reference.layer_norm_backward(dy, x, gamma, **options)
    # A sum of independent terms is judged by its usual size, a dx of few values by dx before the projection.
    size = math.prod(x.shape[x.ndim - ndim :])
    free = np.linalg.norm(np.asarray(dy, np.float64).reshape(-1, size) * rstd.reshape(-1, 1))
    for name, grad, expected, scale, source in zip(
        grads._fields, grads, wanted, (free, np.sqrt(x.size), np.sqrt(x.size)), (x, gamma, beta), strict=False
    ):
        assert (grad is None) == (source is None), name
        if grad is not None:
            assert grad.dtype == source.dtype and grad.shape == source.shape, name
            assert_close(backend.numpy(grad), expected, source.dtype, bound, scale)

    out, dx = (backend.array(np.empty(x.shape, dtype)) for _ in range(2))
    y2, cache = forward(op, kx, kgamma, kbeta, ndim=ndim, eps=eps, out=out)
    grads2 = backward(op, kdy, cache, out=dx)
    assert y2 is out and grads2.dx is dx
    assert same_bits(backend.numpy(y2), backend.numpy(y))
    for a, b in zip(grads2, grads, strict=True):
        assert a is b is None or same_bits(backend.numpy(a), backend.numpy(b))


@pytest.mark.pairs
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("placement", ["contiguous", "strided", "offset"])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize(("ndim", "shape"), ROWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(backend, rng, dtype, ndim, shape, affine, placement, op):
    x, dy = (place(rng.normal(size=shape), dtype, placement) for _ in range(2))
    has_gamma, has_beta, in_data_dtype = AFFINE[affine]
    small = dtype if in_data_dtype else arithmetic(dtype)
    gamma, beta = (place(rng.normal(size=shape[-ndim:]), small, placement) for _ in range(2))
    check(backend, op, x, dy, gamma if has_gamma else None, beta if has_beta else None, ndim=ndim)


@pytest.mark.pairs
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 64, 513, 4095, 4096, 4097, 4098, 4099, 4100, 9000, 70_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(backend, rng, dtype, width, op):
    """Lane tails, chains and blocks; rows alone, in a group that is not full, and in several chains."""
    some, width = (11, width) if backend.xp is np else (5, min(width, 9000))  # what a simulator has done in a second
    for rows in (1, some, 70) if width < 600 or (backend.xp is np and width < 4200) else (1, 3):
        x, dy = rng.normal(size=(2, rows, width)).astype(dtype)
        gamma, beta = rng.normal(size=(2, width)).astype(arithmetic(dtype))
        # One or two values are about 1 and -1, whatever they were: what is left of dx is a difference of equal terms.
        check(backend, op, x, dy, gamma, beta, eps=0.1 if width < 3 else 1e-5)


@pytest.mark.parametrize("first", [None, 0.0, 1e4 + 100], ids=["plain", "zero first", "outlier first"])
@pytest.mark.parametrize("width", [64, 1000, 20_000])
@pytest.mark.parametrize("op", OPS)
def test_large_mean(backend, rng, op, width, first):
    """Mean 1e4, deviation 1: E[x^2] - E[x]^2 and a shift by the first value both fail here."""
    rows = 20 if backend.xp is np else 4
    x, dy = rng.normal(1e4, 1, (rows, width)).astype(FLOAT32), rng.normal(size=(rows, width)).astype(FLOAT32)
    if first is not None:
        x[:, 0] = first
    gamma, beta = rng.normal(size=(2, width)).astype(FLOAT32)
    check(backend, op, x, dy, gamma, beta, bound=5e-6)


@pytest.mark.parametrize(("op", "large"), [("layer", 1e17), ("rms", 1e18)])
@pytest.mark.parametrize("width", [17, 5000])
def test_large_values(backend, rng, op, large, width):
    x, dy = rng.normal(size=(2, 5, width)).astype(FLOAT32)
    for dtype, factor in ((FLOAT32, large), (BFLOAT16, large), (FLOAT64, 1e150)):
        data, upstream = (x.astype(dtype) * np.array(factor, dtype)).astype(dtype), dy.astype(dtype)
        y, cache = forward(op, backend.array(data), None, None)
        assert_close(backend.numpy(y), reference.layer_norm(data, centred=op == "layer")[0], dtype)
        want = reference.layer_norm_backward(upstream, data, centred=op == "layer")[0]
        dx = backend.numpy(backward(op, backend.array(upstream), cache).dx)
        assert_close(dx.astype(np.float64) * factor, want * factor, dtype)


@pytest.mark.pairs
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4 + 1 / 3])
@pytest.mark.parametrize("width", [1, 17, 64, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_row(backend, rng, dtype, width, value):
    beta = rng.normal(size=width).astype(arithmetic(dtype))
    x, dy = (backend.array(a.astype(dtype)) for a in (np.full((9, width), value), rng.normal(size=(9, width))))
    y, cache = layer_norm(x, None, backend.array(beta), eps=1e-8)
    rstd = backend.numpy(cache.rstd)
    assert (rstd == np.array(1e4, rstd.dtype)).all() and (backend.numpy(y) == beta.astype(dtype)).all()
    grads = [*layer_norm_backward(dy, cache), rms_norm_backward(dy, rms_norm(x)[1]).dx]
    assert all(np.isfinite(backend.numpy(g).astype(np.float64)).all() for g in grads if g is not None)


@pytest.mark.parametrize("width", [3, 64, 4097])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(backend, rng, dtype, op, width):
    clean, dy = rng.normal(size=(2, 13, width)).astype(dtype)

    def results(x):
        y, cache = forward(op, backend.array(x), None, None)
        return [backend.numpy(a) for a in (y, backward(op, backend.array(dy), cache).dx)]

    wanted = results(clean)
    for bad in (np.nan, np.inf):
        x = clean.copy()
        x[6, 1] = bad
        for got, good in zip(results(x), wanted, strict=True):
            assert np.isnan(got[6, 1]) and same_bits(np.delete(got, 6, 0), np.delete(good, 6, 0))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(backend, dtype, op):
    for shape, ndim in (((0, 5), 1), ((4, 0, 5), 1), ((0, 2, 3), 2)):
        x, gamma = backend.array(np.empty(shape, dtype)), backend.array(np.ones(shape[-ndim:], arithmetic(dtype)))
        y, cache = forward(op, x, gamma, None, ndim=ndim)
        grads = backward(op, y, cache)
        assert y.shape == grads.dx.shape == shape and (backend.numpy(grads.dgamma) == 0).all()


# --------------------------------------------------------------------------- residual and sum


@pytest.mark.parametrize("width", [17, 64, 1000, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(backend, rng, dtype, width):
    """The same bits as adding first; the gradient of the sum's other use is added to dx."""
    x, r, dy, dsum = rng.normal(size=(4, 21 if backend.xp is np else 3, width)).astype(dtype)
    gamma, beta = rng.normal(size=(2, width)).astype(arithmetic(dtype))
    total = (x.astype(arithmetic(dtype)) + r.astype(arithmetic(dtype))).astype(dtype)
    dx = reference.layer_norm_backward(dy, total, gamma)[0] + np.asarray(dsum, np.float64)
    x, r, dy, dsum, gamma, beta, total = map(backend.array, (x, r, dy, dsum, gamma, beta, total))
    y, cache = layer_norm(x, gamma, beta, residual=r)
    want, expected = layer_norm(total, gamma, beta)
    grads, more = layer_norm_backward(dy, cache), layer_norm_backward(dy, cache, dsum=dsum)
    pairs = [(cache.x, total), (y, want), (cache.rstd, expected.rstd), (more.dgamma, grads.dgamma)]
    for got, wanted in (*pairs, *zip(grads, layer_norm_backward(dy, expected), strict=True)):
        assert same_bits(backend.numpy(got), backend.numpy(wanted))
    assert_close(backend.numpy(more.dx), dx, dtype)


def test_a_large_sum_is_written_whole(rng):
    """Outputs past the caches: streamed rows, and rows that begin between two lines."""
    for width in (1024, 1000, 72):
        x, r, dy = (rng.standard_normal((5_000_000 // width, width), np.float32) for _ in range(3))
        y, cache = layer_norm(x, residual=r)
        dx = layer_norm_backward(dy, cache, dsum=r).dx
        assert same_bits(cache.x, x + r)
        for rows in (slice(0, 40), slice(-41, None)):
            part, expected = layer_norm(x[rows], residual=r[rows])
            assert same_bits(y[rows], part)
            assert same_bits(dx[rows], layer_norm_backward(dy[rows], expected, dsum=r[rows]).dx)


# --------------------------------------------------------------------------- worked numbers and named properties


def test_v6_one_sample_of_four_features():
    x = np.array([2.0, 4.0, 6.0, 8.0])
    want = np.array([-1.341639444861, -0.447213148287, 0.447213148287, 1.341639444861])
    np.testing.assert_allclose(layer_norm(x)[0], want, atol=1e-12)
    np.testing.assert_allclose(layer_norm(x.reshape(1, 2, 2), ndim=2)[0].ravel(), want, atol=1e-12)
    np.testing.assert_allclose(layer_norm(x, np.full(4, 2.0), np.ones(4))[0], 2 * want + 1, atol=1e-12)
    np.testing.assert_allclose(rms_norm(x, eps=0)[0], x / np.sqrt(30), rtol=1e-15)
    # The same four numbers as four samples of one feature are batch norm's; as rows of one value they vanish.
    np.testing.assert_allclose(batch_norm(x.reshape(4, 1))[0].ravel(), want, atol=1e-12)
    assert (layer_norm(x.reshape(4, 1))[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_is_batch_norm_transposed(rng, dtype):
    x, dy = rng.normal(1, 2, (2, 33, 40)).astype(dtype)
    want, _, _ = reference.batch_norm(x.T)
    assert_close(layer_norm(x)[0], want.T, dtype)
    assert_close(batch_norm(np.ascontiguousarray(x.T))[0].T, want.T, dtype)
    dx, *_ = reference.batch_norm_backward(dy.T, x.T)
    assert_close(layer_norm_backward(dy, layer_norm(x)[1]).dx, dx.T, dtype)


@pytest.mark.parametrize("op", OPS)
def test_gamma_and_beta_can_undo_it(rng, op):
    """gamma = sqrt(var + eps) and beta = mean return the input."""
    x = rng.normal(3, 2, (1, 50))
    _, mean, rstd = reference.layer_norm(x, centred=op == "layer")
    y, _ = forward(op, x, np.full(50, 1 / rstd[0]), np.full(50, mean[0]), eps=1e-5)
    np.testing.assert_allclose(y, x, rtol=1e-13)


@pytest.mark.parametrize("width", [12, 100, 5000])
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_see_the_batch(backend, rng, dtype, make, width):
    """The same bits for a sample alone and in batches of any size; training and use do not differ."""
    x = backend.array(rng.normal(size=(64 if backend.xp is np else 12, width)).astype(dtype))
    layer = make(width, dtype=dtype, affine=backend.xp is np)
    whole = backend.numpy(layer(x))
    for rows in (slice(0, 1), slice(1, 4), slice(5, 38)):
        assert same_bits(backend.numpy(layer(x[rows])), whole[rows])
    assert same_bits(backend.numpy(layer.eval()(x)), whole)


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("ndim", "shape"), [(1, (3, 4)), (2, (3, 2, 3)), (1, (2, 2, 5)), (1, (1, 6))], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_central_differences(rng, op, ndim, shape):
    x, dy, dsum = rng.normal(size=(3, *shape))
    gamma, beta = rng.normal(size=(2, *shape[-ndim:]))
    options, sources = {"ndim": ndim, "eps": 1e-3}, (x, gamma, beta)
    if op == "layer":
        residual = rng.normal(size=shape)
        options["residual"], sources = residual, (x, gamma, beta, residual)

    def loss():
        y, cache = forward(op, x, gamma, beta, **options)
        return float((y * dy).sum() + (cache.x * dsum).sum() * (op == "layer"))

    _, cache = forward(op, x, gamma, beta, **options)
    grads = backward(op, dy, cache, **({"dsum": dsum} if op == "layer" else {}))
    for array, grad in zip(sources, [*grads, grads.dx], strict=False):
        if op == "rms" and array is beta:
            break
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
    shape = (*draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)), draw(st.integers(3, 40)))
    ndim = draw(st.integers(1, len(shape)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def memory(values):
        return ODD[draw(st.sampled_from(odd_kinds(dtype)))](values.astype(dtype))

    x, r, dy = (
        memory(rng.normal(draw(st.sampled_from((0.0, 30.0))), 1, shape)),
        *(memory(rng.normal(size=shape)) if keep else None for keep in (draw(st.booleans()), True)),
    )
    gamma, beta = (
        rng.normal(size=shape[-ndim:]).astype(arithmetic(dtype)) if draw(st.booleans()) else None for _ in "ab"
    )
    return draw(st.sampled_from(OPS)), x, r, dy, gamma, beta, ndim


@settings(max_examples=150, deadline=None)
@given(calls())
def test_any_call(call):
    op, x, r, dy, gamma, beta, ndim = call
    native, real, options = (
        x.dtype.newbyteorder("="),
        arithmetic(x.dtype.newbyteorder("=")),
        {"ndim": ndim, "eps": 0.01},
    )
    summed = x
    if op == "layer" and r is not None:
        options["residual"] = r
        summed = (x.astype(real) + r.astype(real)).astype(native)
    y, cache = forward(op, x, gamma, beta, **options)
    grads = backward(op, dy, cache)
    assert y.dtype == grads.dx.dtype == native
    about = {"ndim": ndim, "eps": 0.01, "centred": op == "layer"}
    want, _, rstd = reference.layer_norm(summed, gamma, beta if op == "layer" else None, **about)
    bound = 1e-12 if native == FLOAT64 else 5e-6
    assert_close(y, want, native, bound, np.sqrt(x.size))
    wants, scale = reference.layer_norm_backward(dy, summed, gamma, **about), np.sqrt(x.size) * max(rstd.max(), 1.0)
    sources = (summed.astype(native), gamma, beta)
    for grad, expected, source in zip(grads, wants, sources, strict=False):
        assert (grad is None) == (source is None)
        if grad is not None:
            assert_close(grad, expected, source.dtype, bound, scale)


# --------------------------------------------------------------------------- in place, and what is refused


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_an_input(backend, rng, dtype, op):
    x, dy = map(backend.array, rng.normal(size=(2, 20, 70)).astype(dtype))
    want, cache = forward(op, x.copy(), None, None)
    wanted = backend.numpy(backward(op, dy.copy(), cache).dx)
    found = backward(op, dy.copy(), cache, out=(inner := dy.copy())).dx
    assert found is inner and same_bits(backend.numpy(inner), wanted)
    assert same_bits(backend.numpy(backward(op, dy, cache, out=dy).dx), wanted)
    y, cache = forward(op, x, None, None, out=x)
    assert y is x and same_bits(backend.numpy(y), backend.numpy(want))
    with refused("cache", x):
        backward(op, dy, cache)
    view = backend.xp.ascontiguousarray(x.T)
    _, cache = forward(op, view.T, None, None, out=view.reshape(20, 70))  # copied, and then written over
    with refused("cache", x):
        backward(op, dy, cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_an_input_beside_a_residual(backend, rng, dtype):
    x, r, dy, ds = map(backend.array, rng.normal(size=(4, 20, 70)).astype(dtype))
    want, cache = layer_norm(x, residual=r)
    wants = layer_norm_backward(dy, cache, dsum=ds)
    want, wanted = backend.numpy(want), backend.numpy(wants.dx)
    for target in (0, 1):
        inputs = [x.copy(), r.copy()]
        y, cache = layer_norm(inputs[0], residual=inputs[1], out=inputs[target])
        assert y is inputs[target] and same_bits(backend.numpy(y), want)
        other = [dy.copy(), ds.copy()]
        grads = layer_norm_backward(other[0], cache, dsum=other[1], out=other[target])
        assert grads.dx is other[target] and same_bits(backend.numpy(grads.dx), wanted)
    twice = (backend.numpy(x).astype(np.float64) * 2).astype(dtype)
    assert same_bits(backend.numpy(layer_norm(x, residual=x)[1].x), twice)


X = np.ones((4, 6), np.float32)
BAD = {
    "ndim 0": (lambda out: layer_norm(X, ndim=0, out=out), "ndim"),
    "ndim too large": (lambda out: layer_norm(X, ndim=3, out=out), "ndim"),
    "ndim of another kind": (lambda out: rms_norm(X, ndim=1.0, out=out), "ndim"),
    "gamma of another shape": (lambda out: layer_norm(X, np.ones(4, np.float32), out=out), "gamma"),
    "gamma of x's shape": (lambda out: rms_norm(X, X, out=out), "gamma"),
    "gamma of another dtype": (lambda out: rms_norm(X, np.ones(6), out=out), "gamma"),
    "beta of another shape": (lambda out: layer_norm(X, ndim=2, beta=X.ravel(), out=out), "beta"),
    "residual of another shape": (lambda out: layer_norm(X, residual=X[:3], out=out), "residual"),
    "residual of another dtype": (lambda out: layer_norm(X, residual=X.astype("f8"), out=out), "residual"),
    "negative eps": (lambda out: layer_norm(X, eps=-1e-9, out=out), "eps"),
    "eps is no number": (lambda out: rms_norm(X, eps="small", out=out), "eps"),
    "empty rows": (lambda out: layer_norm(np.ones((4, 0), np.float32)), "x"),
    "whole numbers": (lambda out: rms_norm(X.astype(int)), "x"),
    "out of another dtype": (lambda out: rms_norm(X, out=out.astype("f8")), "out"),
    "out over gamma": (lambda out: layer_norm(X, out.ravel()[:6], out=out), "out"),
    "cache of the other": (lambda out: layer_norm_backward(X, rms_norm(X)[1], out=out), "cache"),
    "cache of the other one": (lambda out: rms_norm_backward(X, layer_norm(X)[1], out=out), "cache"),
    "dy of another shape": (lambda out: layer_norm_backward(X[:2], layer_norm(X)[1], out=out), "dy"),
    "dsum of another dtype": (
        lambda out: layer_norm_backward(X, layer_norm(X)[1], dsum=X.astype("f8"), out=out),
        "dsum",
    ),
    "out over x": (lambda out: layer_norm_backward(X, layer_norm(out)[1], out=out), "out"),
    "layer of no shape": (lambda out: nn.LayerNorm(()), "shape"),
    "layer of a fraction": (lambda out: nn.RMSNorm((3, 1.5)), "shape"),
    "layer on other rows": (lambda out: nn.LayerNorm(5)(X), "x"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    call, argument = BAD[name]
    out = np.full((4, 6), 7, np.float32)
    with refused(rf"\b{argument}\b", out, X):
        call(out)


def test_one_dimension_and_none():
    assert issubclass(KilterError, ValueError)
    with refused("x"):
        layer_norm(None)
    assert layer_norm(np.arange(4.0))[1].rstd.shape == ()


# --------------------------------------------------------------------------- layers


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_layers(rng, make):
    layer = make((3, 4), dtype="bfloat16").reuse_buffers(True)
    x = rng.normal(size=(5, 3, 4)).astype(BFLOAT16)
    y = layer(x)
    assert layer(x) is y and layer.backward(x) is layer.backward(x)
    want = {"gamma": (3, 4), "beta": (3, 4)} if make is nn.LayerNorm else {"gamma": (3, 4)}
    assert {n: p.shape for n, p in layer.params().items()} == {n: g.shape for n, g in layer.grads().items()} == want
    assert all(p.dtype == FLOAT32 for p in layer.params().values()) and layer.grads()["gamma"].any()
    other = make((3, 4), dtype="bfloat16")
    layer.params()["gamma"][:] = 2
    other.load_state_dict(layer.state_dict())
    assert same_bits(other(x), layer(x)) and not make(4, affine=False).params()
    assert same_bits(make(12)(x.reshape(5, 12)).reshape(x.shape), make((3, 4))(x))
