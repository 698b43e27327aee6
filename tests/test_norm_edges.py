"""kilter.norm.batch_norm at its edges: weights, special values, in place, and what it refuses."""

import numpy as np
import pytest

import reference
from kilter import KilterError, norm
from kilter.norm import batch_norm, batch_norm_backward
from kilter.stats import RunningStats
from support import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    arithmetic,
    assert_close,
    refused,
    relative_error,
    same_bits,
)


def test_weights_count_samples(backend, rng):
    """A weight of k is k equal samples; a weight of 0 takes no part but gets its y."""
    x, weights = rng.normal(size=(5, 3, 4)), np.array([2.0, 0.0, 1.0, 1.0, 3.0])
    running, expected = (RunningStats(3, dtype="float64", xp=backend.xp) for _ in range(2))
    y, cache = batch_norm(backend.array(x), weights=backend.array(weights), running=running)
    repeated, _ = batch_norm(backend.array(np.repeat(x, weights.astype(int), axis=0)), running=expected)
    y, repeated, var = map(backend.numpy, (y, repeated, running.var))
    np.testing.assert_allclose(y[[0, 2, 3, 4]], repeated[[0, 2, 3, 4]], atol=1e-13)
    np.testing.assert_allclose(var, backend.numpy(expected.var), atol=1e-13)
    assert np.isfinite(y[1]).all()
    assert (backend.numpy(cache.moments.count) == 28).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bool", "int64"])
def test_weights_of_any_number_dtype(backend, rng, dtype):
    x, mask = backend.array(rng.normal(size=(5, 3, 4))), np.array([1, 0, 1, 1, 1])
    y, _ = batch_norm(x, weights=backend.array(mask.astype(dtype)))
    want, _ = batch_norm(x, weights=backend.array(mask.astype(np.float64)))
    assert same_bits(backend.numpy(y), backend.numpy(want))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(2000, 3, 2), (3, 3, 4000), (9, 3, 7, 7)], ids=str)
def test_what_has_no_weight_is_not_looked_at(backend, rng, shape, axis):
    """Neither as a value, NaN or far off, nor as the value about which others are summed."""
    x = rng.normal(1e4, 1, shape).astype(FLOAT32)
    weights = np.ones((shape[0], *shape[2:]))
    weights[: 1 + shape[0] // 2] = 0
    for hidden in (np.nan, 0.0):
        x[: 1 + shape[0] // 2] = hidden
        last = np.ascontiguousarray(np.moveaxis(x, 1, axis))
        _, cache = batch_norm(backend.array(last), axis=axis, weights=backend.array(weights))
        want = reference.moments(x[1 + shape[0] // 2 :])
        assert relative_error(backend.numpy(cache.moments.mean), want.mean) < 1e-9
        assert relative_error(backend.numpy(cache.moments.m2), want.m2) < 1e-6


# --------------------------------------------------------------------------- special values


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_through_relu(backend, rng, dtype, axis):
    x = rng.normal(size=(40, 6, 6)).astype(dtype)
    np.moveaxis(x, axis, -1)[3, 2, 1] = np.nan
    x, dy = backend.array(x), backend.array(np.ones_like(x))
    y, cache = batch_norm(x, axis=axis, activation="relu")
    bad = np.moveaxis(np.isnan(backend.numpy(y)), axis, -1)
    assert bad[..., 1].all() and not np.delete(bad, 1, -1).any()
    dx = backend.numpy(batch_norm_backward(dy, cache).dx)
    assert np.moveaxis(np.isnan(dx), axis, -1)[..., 1].all()

    running = RunningStats(6, dtype=arithmetic(dtype), xp=backend.xp)
    y, _ = batch_norm(x, axis=axis, activation="relu", running=running, training=False)
    assert np.isnan(backend.numpy(y)).sum() == 1


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_relu_at_zero_is_zero(backend, rng, dtype, axis):
    """What is constant is normalised to zero exactly."""
    x, dy = np.full((40, 6, 6), 3, dtype), rng.normal(size=(40, 6, 6)).astype(dtype)
    gamma, beta = backend.array(np.ones(6, arithmetic(dtype))), backend.array(np.zeros(6, arithmetic(dtype)))
    _, cache = batch_norm(backend.array(x), gamma, beta, axis=axis, activation="relu")
    for gradient in batch_norm_backward(backend.array(dy), cache)[:3]:
        assert (backend.numpy(gradient) == 0).all()


def test_infinity_in_evaluation_stays_where_it_is(backend, rng):
    """Its x̂ is infinite, and so is the gradient of gamma: not NaN."""
    x, dy = rng.normal(size=(6, 3)).astype(FLOAT32), np.full((6, 3), 0.5, FLOAT32)
    x[2, 1] = -np.inf
    running, gamma = RunningStats(3, xp=backend.xp), backend.array(np.ones(3, FLOAT32))
    y, cache = batch_norm(backend.array(x), gamma, running=running, training=False)
    grads = batch_norm_backward(backend.array(dy), cache)
    dgamma = backend.numpy(grads.dgamma)
    assert backend.numpy(y)[2, 1] == dgamma[1] == -np.inf
    assert np.isfinite(dgamma[[0, 2]]).all() and np.isfinite(backend.numpy(grads.dx)).all()


def test_infinity_stays_in_its_channel(backend, rng):
    x = rng.normal(size=(40, 3)).astype(FLOAT32)
    x[0, 1] = np.inf
    y = backend.numpy(batch_norm(backend.array(x))[0])
    assert not np.isfinite(y[:, 1]).all() and np.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bit_sums_do_not_overflow(backend, dtype):
    """60,000 squared is past float16, and so is the sum of a thousand 100s."""
    x = np.where(np.arange(4000) % 2, 60000.0, 100.0).reshape(1000, 1, 4).astype(dtype)
    y, cache = batch_norm(backend.array(x))
    want, mean, _ = reference.batch_norm(x)
    assert_close(backend.numpy(y), want, dtype)
    assert relative_error(backend.numpy(cache.moments.mean), mean) < 1e-6


def test_a_sum_past_float32_is_infinite_without_a_warning(backend):
    x = np.full((4, 2), 3e38, FLOAT32) * np.array([1, 0], FLOAT32)
    running, gamma = RunningStats(2, xp=backend.xp), backend.array(np.ones(2, FLOAT32))
    _, cache = batch_norm(backend.array(x), gamma, running=running, training=False)
    grads = batch_norm_backward(backend.array(np.full((4, 2), 100, FLOAT32)), cache)
    dgamma = backend.numpy(grads.dgamma)
    assert np.isinf(dgamma[0]) and dgamma[1] == 0 and np.isfinite(backend.numpy(grads.dx)).all()


# --------------------------------------------------------------------------- in place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_x(backend, rng, dtype):
    x = backend.array(rng.normal(size=(20, 5, 9)).astype(dtype))
    want, _ = batch_norm(x.copy(), activation="relu")
    y, cache = batch_norm(x, activation="relu", out=x)
    assert y is x and same_bits(backend.numpy(y), backend.numpy(want))
    with refused("out", x):
        batch_norm_backward(backend.xp.ones_like(x), cache)


def test_dx_may_be_dy(backend, rng):
    x, r, dy = map(backend.array, rng.normal(size=(3, 20, 5, 9)).astype(FLOAT32))
    _, cache = batch_norm(x, residual=r)
    want = batch_norm_backward(dy.copy(), cache).dx
    assert same_bits(backend.numpy(batch_norm_backward(dy, cache, out=dy).dx), backend.numpy(want))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_dresidual_may_have_memory(backend, rng, last, training):
    x, r, dy = rng.normal(size=(3, 6, 4, 5, 2)).astype(FLOAT32)
    x, r, dy = (backend.array(np.ascontiguousarray(np.moveaxis(a, 1, -1)) if last else a) for a in (x, r, dy))
    x, r, dy = (backend.xp.moveaxis(a, -1, 1) if last else a for a in (x, r, dy))
    running = RunningStats(x.shape[1], xp=backend.xp)
    _, cache = batch_norm(x, residual=r, activation="relu", running=running, training=training)
    want, out = batch_norm_backward(dy, cache), backend.xp.zeros_like(x)
    got = batch_norm_backward(dy, cache, out_residual=out)
    assert got.dresidual is out
    for one, other in zip(got, want, strict=True):
        assert one is other or same_bits(backend.numpy(one), backend.numpy(other))


def test_memory_of_dresidual_is_checked(backend, rng):
    x, r, dy = map(backend.array, rng.normal(size=(3, 6, 4, 5)).astype(FLOAT32))
    _, cache = batch_norm(x, residual=r, activation="relu")
    for out in (dy, x, r, backend.xp.zeros(5, FLOAT32), backend.xp.zeros((6, 4, 5))):
        with refused("out_residual", x, r, dy):
            batch_norm_backward(dy, cache, out_residual=out)
    out = backend.xp.zeros_like(x)
    with refused("out_residual", out):
        batch_norm_backward(dy, cache, out=out, out_residual=out)
    for options in ({"residual": r}, {"activation": "relu"}):
        with refused("out_residual: expected None", out):
            batch_norm_backward(dy, batch_norm(x, **options)[1], out_residual=out)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)], ids=str)
def test_one_value_per_channel(backend, shape, dtype):
    x, out = backend.array(np.ones(shape, dtype)), backend.array(np.full(shape, 7, dtype))
    running = RunningStats(4, dtype=arithmetic(dtype), xp=backend.xp)
    with refused("(?i)one value", out, running):
        batch_norm(x, running=running, out=out)
    y, _ = batch_norm(x, running=running, training=False)
    assert y.shape == shape


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0, 0.0], [0.0] * 4], ids=str)
def test_one_weighted_value_per_channel(backend, weights):
    with pytest.raises(KilterError, match=r"weights|one value"):
        batch_norm(backend.array(np.ones((4, 3))), weights=backend.array(np.array(weights)))


X32 = np.arange(24, dtype=np.float32).reshape(4, 3, 2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gamma", {"gamma": np.ones(2, np.float32)}),
        ("gamma", {"gamma": np.ones((3, 1), np.float32)}),
        ("gamma", {"gamma": np.ones(3, np.int64)}),
        ("gamma", {"gamma": np.ones(3, np.float64)}),
        ("beta", {"beta": np.ones(4, np.float32)}),
        ("beta", {"beta": 1.0}),
        ("axis", {"axis": 3}),
        ("axis", {"axis": -4}),
        ("axis", {"axis": 1.5}),
        ("eps", {"eps": -1e-5}),
        ("eps", {"eps": float("nan")}),
        ("eps", {"eps": "small"}),
        ("activation", {"activation": "gelu"}),
        ("residual", {"residual": np.ones((4, 3, 3), np.float32)}),
        ("residual", {"residual": np.ones((4, 3, 2), np.float64)}),
        ("weights", {"weights": np.ones(3)}),
        ("weights", {"weights": np.ones((4, 3, 2))}),
        ("weights", {"weights": np.array([1.0, -1, 1, 1])}),
        ("weights", {"weights": np.array([1.0, np.nan, 1, 1])}),
        ("weights", {"weights": np.ones(4, np.complex128)}),
        ("running", {"running": 2}),
        ("running", {"running": "yes"}),
        ("running", {"training": False}),
        ("out", {"out": np.empty((4, 3), np.float32)}),
        ("out", {"out": np.empty((4, 3, 2), np.float64)}),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(map(str, v)),
)
def test_refusals_name_the_argument(backend, name, options):
    options = {k: backend.array(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    x, out = backend.array(X32), options.pop("out", backend.array(np.full((4, 3, 2), 7, np.float32)))
    features = options.pop("running", 3)
    running = RunningStats(features, xp=backend.xp) if isinstance(features, int) else features
    if not options.get("training", True):
        running = None
    with refused(name, x, out, running):
        batch_norm(x, running=running, **options, out=out)


@pytest.mark.parametrize(
    ("name", "dy"),
    [
        ("dy", np.ones((4, 3), np.float32)),
        ("dy", np.ones((4, 3, 2), np.float64)),
        ("dy", np.ones((4, 3, 2), np.int32)),
        ("dy", None),
        ("dy", [[1.0]]),
    ],
)
def test_backward_refusals(backend, name, dy):
    _, cache = batch_norm(backend.array(X32))
    out = backend.array(np.full((4, 3, 2), 7, np.float32))
    dy = backend.array(dy) if isinstance(dy, np.ndarray) else dy
    with refused(name, out):
        batch_norm_backward(dy, cache, out=out)


@pytest.mark.parametrize("cache", [None, (X32, None), X32], ids=["none", "tuple", "array"])
def test_backward_needs_the_cache(cache):
    with refused("cache"):
        batch_norm_backward(X32, cache)


@pytest.mark.parametrize(
    "make",
    [
        lambda xp, n: xp.zeros(2 * n, FLOAT32)[::2],
        lambda xp, n: xp.zeros(n - 1, FLOAT32),
        lambda xp, n: xp.zeros(n),
        lambda xp, n: xp.broadcast_to(xp.ones(1, FLOAT32), n),
        lambda xp, n: [0.0] * n,
        lambda xp, n: None,
    ],
    ids=["strided", "short", "dtype", "read-only", "list", "none"],
)
@pytest.mark.parametrize("name", ["mean", "var"])
def test_running_arrays_are_checked(backend, name, make):
    """They may be replaced by the caller, so they are looked at in each call."""
    running, x = RunningStats(3, xp=backend.xp), backend.array(X32)
    out = backend.array(np.full((4, 3, 2), 7, np.float32))
    setattr(running, name, make(backend.xp, 3))
    with refused("running", x, out, running.mean, running.var):
        batch_norm(x, running=running, out=out)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_running_statistics_have_the_dtype_of_the_arithmetic(backend, dtype):
    running = RunningStats(3, dtype=dtype, xp=backend.xp)
    x = backend.array(X32.astype("float64" if dtype == "float32" else "float32"))
    with refused("running", running):
        batch_norm(x, running=running)


@pytest.mark.parametrize("op", ["batch", "layer", "rms", "group", "instance"])
def test_out_over_the_original_of_a_copy(rng, op):
    """A strided x is copied for the forward; `out` over its memory leaves the backward nothing to copy again."""
    memory = rng.normal(size=2 * 6 * 4 * 5).astype(FLOAT32)
    x, out = memory.reshape(12, 4, 5)[::2], memory[: 6 * 4 * 5].reshape(6, 4, 5)
    options = {"groups": 2} if op == "group" else {}
    forward, backward = getattr(norm, f"{op}_norm"), getattr(norm, f"{op}_norm_backward")
    wanted, _ = forward(x.copy(), **options)
    y, cache = forward(x, out=out, **options)
    assert y is out
    assert same_bits(y, wanted)
    with refused("overwrote"):
        backward(np.ones_like(out), cache)


@pytest.mark.parametrize("step", [1, 2], ids=["in place", "spread out"])
@pytest.mark.parametrize("name", ["gamma", "beta", "weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_not_lie_over_a_vector_that_is_converted(dtype, name, step):
    """Kernels get a copy of vectors in another layout or of 16 bits, and do not see where those of the caller lie."""
    memory, x = np.arange(6 * 5 * 7).astype(dtype), np.ones((6, 5, 7), dtype)
    vector = memory.view(np.uint8)[: 6 * step : step] if name == "weights" else memory[: 5 * step : step]
    given, out, running = {name: vector}, memory.reshape(x.shape), RunningStats(5, dtype=arithmetic(dtype))
    with refused("out|gamma|beta", memory, running):
        batch_norm(x, **given, running=running, out=out)
    with refused("out|gamma|beta", memory, running):
        batch_norm(x, **given, running=running, training=False, out=out)
    if name != "weights":  # the backward pass keeps its own copy of those
        _, cache = batch_norm(x, **given)
        with refused("out|gamma|beta", memory):
            batch_norm_backward(x, cache, out=out)


def test_out_over_a_residual_of_another_layout_ends_with_the_forward_pass(rng):
    """The kernel reads a copy; the ReLU's mask, which is computed again, would need what is gone."""
    x, memory = rng.normal(size=(6, 5, 7)), rng.normal(size=(6, 5, 7, 2))
    residual, out = memory[..., 0], memory.ravel()[: x.size].reshape(x.shape)
    want, _ = batch_norm(x, residual=residual.copy(), activation="relu")
    y, cache = batch_norm(x, residual=residual, activation="relu", out=out)
    assert same_bits(y, want)
    with refused("cache"):
        batch_norm_backward(x, cache)
