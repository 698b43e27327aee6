"""kilter.norm.batch_norm and its backward against the float64 reference, table by table."""

import numpy as np
import pytest

import reference
from kilter.norm import batch_norm, batch_norm_backward
from kilter.stats import RunningStats
from memory import output_like, place
from support import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    arithmetic,
    assert_close,
    relative_error,
    same_bits,
)

# name: the shape in memory, the axes the caller sees, the channel axis
LAYOUTS = {
    "NC": ((6, 5), (0, 1), 1),
    "NCL": ((3, 5, 7), (0, 1, 2), 1),
    "NCHW": ((2, 5, 3, 4), (0, 1, 2, 3), 1),
    "NCDHW": ((2, 3, 2, 3, 4), (0, 1, 2, 3, 4), 1),
    "NHWC": ((2, 3, 4, 5), (0, 1, 2, 3), -1),
    "NHWC seen as NCHW": ((2, 3, 4, 5), (0, 3, 1, 2), 1),
}
AFFINE = {  # gamma, beta, in the data's dtype instead of the arithmetic's
    "none": (False, False, False),
    "gamma": (True, False, False),
    "beta": (False, True, False),
    "both": (True, True, False),
    "both in the data's dtype": (True, True, True),
}


def check(backend, x, dy, gamma=None, beta=None, *, axis=1, relu=False, residual=None, weights=None, bound=None):
    """Training forward and backward, with fresh outputs and with out=, against the reference."""
    dtype, activation = x.dtype, "relu" if relu else None
    kx, kdy, kgamma, kbeta, kresidual, kweights = (
        None if a is None else backend.array(a) for a in (x, dy, gamma, beta, residual, weights)
    )
    given = {"axis": axis, "activation": activation, "residual": kresidual, "weights": kweights}
    y, cache = batch_norm(kx, kgamma, kbeta, **given)
    grads = batch_norm_backward(kdy, cache)

    common = {"axis": axis, "weights": weights}
    want, mean, var = reference.batch_norm(x, gamma, beta, relu=relu, residual=residual, **common)
    count, _, m2 = (np.asarray(backend.numpy(a), np.float64) for a in cache.moments)
    assert y.dtype == dtype
    assert_close(backend.numpy(y), want, dtype, bound)
    assert_close(m2 / count, var, arithmetic(dtype), max(bound or 0, 1e-13 if dtype == FLOAT64 else 1e-6))
    spread = np.linalg.norm(np.sqrt(var / count))
    assert relative_error(backend.numpy(cache.moments.mean), mean, spread) < (1e-6 if dtype != FLOAT64 else 1e-13)

    reference_y = backend.numpy(y) if relu else None
    wanted = reference.batch_norm_backward(dy, x, gamma, y=reference_y, **common)
    free = reference.batch_norm_backward(dy, x, gamma, y=reference_y, mean=mean, var=var, **common)[0]
    # A sum of independent terms is judged by its usual size, a dx of few values by dx before the projection.
    terms = np.sqrt(np.prod(x.shape) / x.shape[axis])
    scales = (np.linalg.norm(free), terms, terms * np.sqrt(x.shape[axis]), 0)
    asked = (x, gamma, beta, residual)
    for name, grad, expected, scale, source in zip(grads._fields, grads, wanted, scales, asked, strict=True):
        assert (grad is None) == (source is None), name
        if grad is not None:
            assert grad.dtype == source.dtype, name
            assert_close(backend.numpy(grad), expected, source.dtype, bound, scale)

    out, dx = backend.array(output_like(x)), backend.array(output_like(x))
    y2, cache = batch_norm(kx, kgamma, kbeta, out=out, **given)
    grads2 = batch_norm_backward(kdy, cache, out=dx)
    assert y2 is out and grads2.dx is dx
    assert same_bits(backend.numpy(y2), backend.numpy(y))
    for a, b in zip(grads2, grads, strict=True):
        assert a is b is None or same_bits(backend.numpy(a), backend.numpy(b))


@pytest.mark.pairs
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("placement", ["contiguous", "strided", "offset"])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(backend, rng, dtype, layout, affine, placement, relu, residual):
    memory, axes, axis = LAYOUTS[layout]
    x, dy, r = (place(rng.normal(size=memory), dtype, placement, axes) for _ in range(3))
    has_gamma, has_beta, in_data_dtype = AFFINE[affine]
    small = dtype if in_data_dtype else arithmetic(dtype)
    gamma, beta = (place(rng.normal(size=x.shape[axis]), small, placement) for _ in range(2))
    check(
        backend,
        x,
        dy,
        gamma if has_gamma else None,
        beta if has_beta else None,
        axis=axis,
        relu=relu,
        residual=r if residual else None,
    )


SHAPES = [  # (N, C, *spatial): lane tails, block edges, one channel, tiny and odd planes
    (2, 1),
    (2, 3),
    (63, 17),
    (64, 1),
    (16, 1000),
    (4097, 3),
    (20011, 1),
    (5, 33, 1, 1),
    (3, 40, 7, 7),
    (2, 3, 13, 17),
    (1, 2, 5, 3),
    (1, 1, 65, 67),
    (2, 5, 65, 67),
    (300, 2, 4, 4),
    (3, 18, 1, 4099),
]


@pytest.mark.pairs
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(backend, rng, dtype, shape, last):
    x, dy, r = (np.moveaxis(rng.normal(size=shape), 1, -1 if last else 1).astype(dtype, "C") for _ in range(3))
    gamma, beta = rng.normal(size=(2, shape[1])).astype(arithmetic(dtype))
    check(backend, x, dy, gamma, beta, axis=-1 if last else 1, relu=True, residual=r)


@pytest.mark.pairs
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shape", [(9, 4096), (6, 4099), (18, 257, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(backend, rng, dtype, shape, relu):
    """Four rows of so many columns are written together."""
    x, dy = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    gamma, beta = rng.normal(size=(2, shape[1])).astype(arithmetic(dtype))
    check(backend, x, dy, gamma, beta, axis=1, relu=relu)


@pytest.mark.parametrize("rows", [9, 1030], ids=["in cache", "past it"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows_by_themselves(rng, dtype, rows):
    """A row has the same bits beside others and alone, wherever the output starts."""
    x, running = rng.normal(size=(rows, 4112)).astype(dtype), RunningStats(4112, dtype=arithmetic(dtype))
    running.mean[:], running.var[:] = rng.normal(size=4112), rng.random(4112) + 0.5
    for offset in (0, 1, 8):
        out = np.empty(x.size + offset, dtype)[offset:].reshape(x.shape)
        y, _ = batch_norm(x, running=running, training=False, out=out)
        for row in (0, 3, rows - 1):
            alone, _ = batch_norm(x[row : row + 1], running=running, training=False)
            assert same_bits(y[row], alone[0])


@pytest.mark.parametrize("first", [None, 0.0, 1e4 + 100], ids=["plain", "zero first", "outlier first"])
@pytest.mark.parametrize("memory", [(50000, 3), (3, 40009), (8, 3, 79, 83), (8, 79, 83, 3)], ids=str)
def test_large_mean(backend, rng, memory, first):
    """Mean 1e4, deviation 1: E[x^2] - E[x]^2 and a shift by the first value both fail here."""
    axis = -1 if memory[-1] == 3 else 1
    x = rng.normal(1e4, 1, memory).astype(FLOAT32)
    if memory == (3, 40009):
        x, axis = np.ascontiguousarray(x.T), 1
    if first is not None:
        np.moveaxis(x, axis, -1)[(0,) * (x.ndim - 1)] = first
    gamma, beta, dy = (
        np.float32([1, -2, 0.5]),
        np.float32([0, 1, 2]),
        rng.normal(size=x.shape).astype(FLOAT32),
    )
    check(backend, x, dy, gamma, beta, axis=axis, bound=5e-6)


@pytest.mark.parametrize(
    ("mean", "first", "bound"), [(10, 0.0, 1e-7), (0, 100.0, 1e-6)], ids=["10 and a zero", "0 and a hundred"]
)
@pytest.mark.parametrize("axis", [1, -1])
def test_outlier_first(backend, rng, mean, first, bound, axis):
    x = rng.normal(mean, 1, (64, 1, 56, 56)).astype(FLOAT32)
    x[0, 0, 0, 0] = first
    x = np.ascontiguousarray(np.moveaxis(x, 1, axis))
    _, cache = batch_norm(backend.array(x), axis=axis)
    assert relative_error(backend.numpy(cache.moments.m2), reference.moments(x, axis).m2) < bound


@pytest.mark.pairs
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4 + 1 / 3])
@pytest.mark.parametrize("shape", [(7, 3), (1000, 3), (2, 3, 7, 7), (3, 3, 65, 67)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channel(backend, rng, dtype, axis, shape, value):
    x = np.full(shape, value).astype(dtype)
    beta = rng.normal(size=3).astype(arithmetic(dtype))
    x, dy = np.ascontiguousarray(np.moveaxis(x, 1, axis)), np.moveaxis(rng.normal(size=shape), 1, axis)
    y, cache = batch_norm(backend.array(x), beta=backend.array(beta), axis=axis, eps=1e-8)
    assert (backend.numpy(cache.moments.m2) == 0).all()
    assert (np.moveaxis(backend.numpy(y), axis, -1) == beta.astype(dtype)).all()
    grads = batch_norm_backward(backend.array(dy.astype(dtype, "C")), cache)
    assert all(np.isfinite(backend.numpy(g).astype(np.float64)).all() for g in grads if g is not None)


# --------------------------------------------------------------------------- worked numbers

X = np.array([[2.0], [4.0], [6.0], [8.0]])
GAMMA, BETA = np.array([2.0]), np.array([1.0])
DY = np.array([[1.0], [2.0], [-1.0], [0.5]])


def test_v1(backend):
    x, gamma, beta = map(backend.array, (X, GAMMA, BETA))
    y, cache = batch_norm(x, gamma, beta)
    assert (cache.moments.mean, cache.moments.m2, cache.moments.count) == (5, 20, 4)
    want = [-1.683278889722, 0.105573703426, 1.894426296574, 3.683278889722]
    np.testing.assert_allclose(backend.numpy(y)[:, 0], want, atol=1e-12)
    y, _ = batch_norm(x, gamma, beta, eps=1e-8)
    want = [-1.683281570316, 0.105572809895, 1.894427190105, 3.683281570316]
    np.testing.assert_allclose(backend.numpy(y)[:, 0], want, atol=1e-12)


def test_v2_training_and_frozen(backend):
    x, gamma, beta, dy = map(backend.array, (X, GAMMA, BETA, DY))
    running = RunningStats(1, dtype="float64", xp=backend.xp)

    def near(got, want):
        np.testing.assert_allclose(np.ravel(backend.numpy(got)), want, atol=1e-12)

    _, cache = batch_norm(x, gamma, beta, running=running)
    dx, dgamma, dbeta, dresidual = batch_norm_backward(dy, cache)
    near(dx, [-0.268326681499, 1.028590643551, -1.252197217695, 0.491933255643])
    near(dgamma, -2.012459167292)
    near(dbeta, 2.5)
    assert dresidual is None
    near(running.mean, 0.5)
    near(running.var, 1.566666666667)

    y, cache = batch_norm(x, gamma, beta, running=running, training=False)
    near(y, [3.396798736465, 6.592530385086, 9.788262033707, 12.983993682327])
    dx, dgamma, dbeta, _ = batch_norm_backward(dy, cache)
    near(dx, [1.597865824310, 3.195731648621, -1.597865824310, 0.798932912155])
    near(dgamma, 5.392797157047)
    near(dbeta, 2.5)


# --------------------------------------------------------------------------- evaluation


def running_of(backend, rng, channels, dtype):
    """Running statistics of the device, and what they are, on the host."""
    running = RunningStats(channels, dtype=arithmetic(dtype), xp=backend.xp)
    mean, var = rng.normal(2, 1, channels).astype(arithmetic(dtype)), rng.uniform(0.5, 9, channels)
    running.load_state_dict({"mean": mean, "var": var.astype(mean.dtype), "count": 5.0, "updates": 1})
    return running, mean, var.astype(mean.dtype)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation(backend, rng, dtype, layout, relu):
    memory, axes, axis = LAYOUTS[layout]
    x, dy, r = (place(rng.normal(2, 3, memory), dtype, axes=axes) for _ in range(3))
    c, small = x.shape[axis], arithmetic(dtype)
    gamma, beta = rng.normal(size=(2, c)).astype(small)
    running, mean, var = running_of(backend, rng, c, dtype)
    kx, kdy, kgamma, kbeta, kr = map(backend.array, (x, dy, gamma, beta, r))
    options = {"axis": axis, "running": running, "training": False, "activation": "relu" if relu else None}

    y, cache = batch_norm(kx, kgamma, kbeta, residual=kr, **options)
    want, _, _ = reference.batch_norm(x, gamma, beta, axis=axis, mean=mean, var=var, relu=relu, residual=r)
    y = backend.numpy(y)
    assert_close(y, want, dtype)
    dx = backend.array(output_like(x))
    grads = batch_norm_backward(kdy, cache, out=dx)
    wants = reference.batch_norm_backward(dy, x, gamma, axis=axis, mean=mean, var=var, y=y if relu else None)
    terms = np.sqrt(x.size)
    assert grads.dx is dx
    for grad, expected, scale, source in zip(grads, wants, (0, terms, terms, 0), (x, gamma, beta, r), strict=True):
        assert_close(backend.numpy(grad), expected, source.dtype, scale=scale)
    assert same_bits(backend.numpy(running.mean), mean) and same_bits(backend.numpy(running.var), var)
    assert (running.count, running.updates) == (5.0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation_does_not_depend_on_the_batch(backend, rng, dtype):
    x = rng.normal(size=(33, 6, 5, 7)).astype(dtype)
    running, _, _ = running_of(backend, rng, 6, dtype)
    whole, _ = batch_norm(backend.array(x), running=running, training=False)
    for part in (slice(0, 1), slice(7, 20)):
        y, _ = batch_norm(backend.array(np.ascontiguousarray(x[part])), running=running, training=False)
        assert same_bits(backend.numpy(y), backend.numpy(whole)[part])


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=str)
def test_identity(backend, rng, dtype):
    """gamma = sqrt(var + eps) and beta = mean give the input back."""
    x = rng.normal(3, 2, (50, 4, 9)).astype(dtype)
    moments = reference.moments(x)
    gamma = np.sqrt(moments.m2 / moments.count + 1e-5).astype(dtype)
    y, _ = batch_norm(*map(backend.array, (x, gamma, moments.mean.astype(dtype))))
    assert_close(backend.numpy(y), x, dtype)


def test_mixed_layouts(backend, rng):
    """x channels-last in memory, residual and dy in C order, out= in either."""
    last = rng.normal(size=(4, 6, 5, 8)).astype(FLOAT32)
    x = backend.array(last).transpose(0, 3, 1, 2)
    r, dy = map(backend.array, rng.normal(size=(2, *x.shape)).astype(FLOAT32))
    plain = backend.array(np.ascontiguousarray(last.transpose(0, 3, 1, 2)))
    want, cache = batch_norm(plain, residual=r, activation="relu")
    wants = batch_norm_backward(dy, cache)
    for memory, axes in ((last.shape, (0, 3, 1, 2)), (x.shape, (0, 1, 2, 3))):
        out, dx = (backend.xp.empty(memory, FLOAT32).transpose(axes) for _ in range(2))
        y, cache = batch_norm(x, residual=r, activation="relu", out=out)
        grads = batch_norm_backward(dy, cache, out=dx)
        assert y is out and grads.dx is dx
        for got, expected in ((y, want), (grads.dx, wants.dx), (grads.dresidual, wants.dresidual)):
            assert_close(backend.numpy(got), backend.numpy(expected), FLOAT32)


@pytest.mark.parametrize("axis", [0, 2, np.int64(1)], ids=repr)
def test_any_axis_may_hold_the_channels(backend, rng, axis):
    x, dy = rng.normal(size=(2, 4, 3, 5, 6)).astype(FLOAT32)
    check(backend, x, dy, *rng.normal(size=(2, x.shape[axis])).astype(FLOAT32), axis=axis, relu=True)


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("training", "weights"), [(True, None), (True, "sample"), (True, "position"), (False, None)])
@pytest.mark.parametrize("axis", [1, -1])
def test_gradients_are_central_differences(backend, rng, axis, training, weights):
    x, r, dy = rng.normal(size=(3, 3, 4, 2, 4) if backend.xp is np else (3, 3, 2, 2))
    channels = x.shape[axis]
    gamma, beta = rng.normal(size=(2, channels))
    options = {"axis": axis, "activation": "relu", "training": training}
    if weights:
        by_sample, by_position = np.array([1.0, 0, 2]), rng.random(np.delete(x.shape, axis))
        options["weights"] = backend.array(by_sample if weights == "sample" else by_position)
    if not training:
        options["running"] = RunningStats(channels, dtype="float64", xp=backend.xp)

    def forward():
        return batch_norm(*map(backend.array, (x, gamma, beta)), residual=backend.array(r), **options)

    _, cache = forward()
    for array, grad in zip((x, gamma, beta, r), batch_norm_backward(backend.array(dy), cache), strict=True):
        difference = np.empty_like(array)
        for i in np.ndindex(array.shape):
            kept, ends = array[i], []
            for h in (1e-6, -1e-6):
                array[i] = kept + h
                ends.append(float((backend.numpy(forward()[0]) * dy).sum()))
            difference[i], array[i] = (ends[0] - ends[1]) / 2e-6, kept
        np.testing.assert_allclose(backend.numpy(grad), difference, atol=1e-7)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("per", ["sample", "position"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(backend, rng, dtype, per, axis):
    x, dy, r = (rng.normal(size=(6, 5, 7, 5)).astype(dtype) for _ in range(3))
    shape = (6,) if per == "sample" else tuple(np.delete(x.shape, axis))
    weights = rng.integers(0, 4, shape).astype(FLOAT64)
    weights.flat[0] = 0
    gamma, beta = rng.normal(size=(2, 5)).astype(arithmetic(dtype))
    check(backend, x, dy, gamma, beta, axis=axis, relu=True, residual=r, weights=weights)
