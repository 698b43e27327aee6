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


def test_weights_count_samples(rng):
    """A weight of k is k equal samples; a weight of 0 takes no part but gets its y."""
    x, weights = rng.normal(size=(5, 3, 4)), np.array([2.0, 0.0, 1.0, 1.0, 3.0])
    running, expected = (RunningStats(3, dtype="float64") for _ in range(2))
    y, cache = batch_norm(x, weights=weights, running=running)
    repeated, _ = batch_norm(np.repeat(x, weights.astype(int), axis=0), running=expected)
    np.testing.assert_allclose(y[[0, 2, 3, 4]], repeated[[0, 2, 3, 4]], atol=1e-13)
    np.testing.assert_allclose(running.var, expected.var, atol=1e-13)
    assert np.isfinite(y[1]).all()
    assert (np.asarray(cache.moments.count) == 28).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bool", "int64"])
def test_weights_of_any_number_dtype(rng, dtype):
    x, mask = rng.normal(size=(5, 3, 4)), np.array([1, 0, 1, 1, 1])
    y, _ = batch_norm(x, weights=mask.astype(dtype))
    assert same_bits(y, batch_norm(x, weights=mask.astype(np.float64))[0])


# --------------------------------------------------------------------------- special values


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_through_relu(rng, dtype, axis):
    x = rng.normal(size=(40, 6, 6)).astype(dtype)
    np.moveaxis(x, axis, -1)[3, 2, 1] = np.nan
    y, cache = batch_norm(x, axis=axis, activation="relu")
    bad = np.moveaxis(np.isnan(y), axis, -1)
    assert bad[..., 1].all() and not np.delete(bad, 1, -1).any()
    dx = batch_norm_backward(np.ones_like(x), cache).dx
    assert np.moveaxis(np.isnan(dx), axis, -1)[..., 1].all()

    running = RunningStats(6, dtype=arithmetic(dtype))
    y, _ = batch_norm(x, axis=axis, activation="relu", running=running, training=False)
    assert np.isnan(y).sum() == 1


def test_infinity_stays_in_its_channel(rng):
    x = rng.normal(size=(40, 3)).astype(FLOAT32)
    x[0, 1] = np.inf
    y, _ = batch_norm(x)
    assert not np.isfinite(y[:, 1]).all() and np.isfinite(y[:, [0, 2]]).all()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bit_sums_do_not_overflow(dtype):
    """60,000 squared is past float16, and so is the sum of a thousand 100s."""
    x = np.where(np.arange(4000) % 2, 60000.0, 100.0).reshape(1000, 1, 4).astype(dtype)
    y, cache = batch_norm(x)
    want, mean, _ = reference.batch_norm(x)
    assert_close(y, want, dtype)
    assert relative_error(cache.moments.mean, mean) < 1e-6


def test_a_sum_past_float32_is_infinite_without_a_warning():
    x = np.full((4, 2), 3e38, FLOAT32) * np.array([1, 0], FLOAT32)
    running = RunningStats(2)
    _, cache = batch_norm(x, np.ones(2, FLOAT32), running=running, training=False)
    grads = batch_norm_backward(np.full((4, 2), 100, FLOAT32), cache)
    assert np.isinf(grads.dgamma[0]) and grads.dgamma[1] == 0 and np.isfinite(grads.dx).all()


# --------------------------------------------------------------------------- in place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_may_be_x(rng, dtype):
    x = rng.normal(size=(20, 5, 9)).astype(dtype)
    want, _ = batch_norm(x.copy(), activation="relu")
    y, cache = batch_norm(x, activation="relu", out=x)
    assert y is x and same_bits(y, want)
    with refused("out", x):
        batch_norm_backward(np.ones_like(x), cache)


def test_dx_may_be_dy(rng):
    x, r, dy = rng.normal(size=(3, 20, 5, 9)).astype(FLOAT32)
    _, cache = batch_norm(x, residual=r)
    want = batch_norm_backward(dy.copy(), cache).dx
    assert same_bits(batch_norm_backward(dy, cache, out=dy).dx, want)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)], ids=str)
def test_one_value_per_channel(shape, dtype):
    x, out = np.ones(shape, dtype), np.full(shape, 7, dtype)
    running = RunningStats(4, dtype=arithmetic(dtype))
    with refused("(?i)one value", out, running):
        batch_norm(x, running=running, out=out)
    y, _ = batch_norm(x, running=running, training=False)
    assert y.shape == shape


def test_one_weighted_value_per_channel():
    with pytest.raises(KilterError, match=r"weights|one value"):
        batch_norm(np.ones((4, 3)), weights=np.array([0.0, 1.0, 0.0, 0.0]))
    with pytest.raises(KilterError, match=r"weights|one value"):
        batch_norm(np.ones((4, 3)), weights=np.zeros(4))


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
        ("running", {"running": RunningStats(2)}),
        ("running", {"running": "yes"}),
        ("running", {"training": False}),
        ("out", {"out": np.empty((4, 3), np.float32)}),
        ("out", {"out": np.empty((4, 3, 2), np.float64)}),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(map(str, v)),
)
def test_refusals_name_the_argument(name, options):
    out = options.pop("out", np.full((4, 3, 2), 7, np.float32))
    running = options.get("running", RunningStats(3)) if options.get("training", True) else None
    with refused(name, X32, out, running):
        batch_norm(X32, **{"running": running, **options}, out=out)


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
def test_backward_refusals(name, dy):
    _, cache = batch_norm(X32)
    out = np.full((4, 3, 2), 7, np.float32)
    with refused(name, out):
        batch_norm_backward(dy, cache, out=out)


@pytest.mark.parametrize("cache", [None, (X32, None), X32], ids=["none", "tuple", "array"])
def test_backward_needs_the_cache(cache):
    with refused("cache"):
        batch_norm_backward(X32, cache)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: np.zeros(2 * n, FLOAT32)[::2],
        lambda n: np.zeros(n - 1, FLOAT32),
        lambda n: np.zeros(n),
        lambda n: np.broadcast_to(np.float32(1), n),
        lambda n: [0.0] * n,
        lambda n: None,
    ],
    ids=["strided", "short", "dtype", "read-only", "list", "none"],
)
@pytest.mark.parametrize("name", ["mean", "var"])
def test_running_arrays_are_checked(name, make):
    """They may be replaced by the caller, so they are looked at in each call."""
    running, out = RunningStats(3), np.full((4, 3, 2), 7, np.float32)
    setattr(running, name, make(3))
    with refused("running", X32, out, running.mean, running.var):
        batch_norm(X32, running=running, out=out)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_running_statistics_have_the_dtype_of_the_arithmetic(dtype):
    running = RunningStats(3, dtype=dtype)
    x = X32.astype("float64" if dtype == "float32" else "float32")
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
