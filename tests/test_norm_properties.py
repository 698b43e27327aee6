"""What batch norm does to any data: drawn shapes, memory and special values, and the properties that texts name."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kilter import KilterError, nn
from kilter.norm import BatchNormGrads, batch_norm, batch_norm_backward
from kilter.stats import RunningStats
from memory import ODD, odd_kinds
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, arithmetic, assert_close, same_bits, ulp

# --------------------------------------------------------------------------- drawn calls

LARGE = {FLOAT64: 1e150, FLOAT32: 1e17, FLOAT16: 1e4, BFLOAT16: 1e17}  # the largest spread that is promised


def smallest(dtype):
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)


CHANNEL = {  # what a channel may hold: (values, generator, dtype) -> values
    "plain": lambda v, rng, dtype: v,
    "constant": lambda v, rng, dtype: np.full_like(v, v[0]),
    "zeros of both signs": lambda v, rng, dtype: np.copysign(0.0, v),
    "large": lambda v, rng, dtype: v * LARGE[dtype],
    "subnormal": lambda v, rng, dtype: np.round(v * 8) * smallest(dtype),
    "some subnormal": lambda v, rng, dtype: np.where(v > 0, v, 3 * smallest(dtype)),
    "far away": lambda v, rng, dtype: np.where(np.arange(len(v)) == rng.integers(len(v)), 1e4, v),
    "nan": lambda v, rng, dtype: np.where(np.arange(len(v)) == rng.integers(len(v)), np.nan, v),
    "infinity": lambda v, rng, dtype: np.where(np.arange(len(v)) == rng.integers(len(v)), np.inf, v),
    "both infinities": lambda v, rng, dtype: np.concatenate([[np.inf, -np.inf], v[2:]]),
    "largest": lambda v, rng, dtype: np.copysign(float(ml_dtypes.finfo(dtype).max), v),
}
CONSTANT = ("constant", "zeros of both signs")
NOT_FINITE = ("nan", "infinity", "both infinities")


@st.composite
def calls(draw):
    """(x, dy, residual or None, axis, options, kinds of the channels), all arrays in memory of some kind."""
    dtype = draw(st.sampled_from(DTYPES))
    spatial = draw(st.lists(st.integers(1, 6), max_size=3))
    n, c = draw(st.integers(1 if np.prod(spatial) > 1 else 2, 9)), draw(st.integers(1, 5))
    axis = draw(st.sampled_from((1, -1)))
    shape = (n, c, *spatial) if axis == 1 else (n, *spatial, c)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = draw(st.lists(st.sampled_from(sorted(CHANNEL)), min_size=c, max_size=c))

    def memory(values):
        with np.errstate(over="ignore", invalid="ignore"):
            return ODD[draw(st.sampled_from(odd_kinds(dtype)))](values.astype(dtype))

    x = rng.normal(size=shape)
    for channel, kind in zip(np.moveaxis(x, axis, 0), kinds, strict=True):
        channel[...] = CHANNEL[kind](channel.ravel(), rng, dtype).reshape(channel.shape)
    residual = memory(rng.normal(size=shape)) if draw(st.booleans()) else None
    steps = (1e-5, 1e-3) if dtype == FLOAT16 else (1e-5, 1e-8)  # gradients of constants are up to 1 / sqrt(eps)
    options = {"activation": draw(st.sampled_from((None, "relu"))), "eps": draw(st.sampled_from(steps))}
    if draw(st.booleans()):
        options |= {"gamma": rng.normal(size=c).astype(arithmetic(dtype))}
    if draw(st.booleans()):
        options |= {"beta": rng.normal(size=c).astype(arithmetic(dtype))}
    return memory(x), memory(rng.normal(size=shape)), residual, axis, options, kinds


def forward(backend, x, residual, axis, **options):
    """y and the cache, of arrays that are brought to the device."""
    options = {name: backend.array(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    residual = None if residual is None else backend.array(residual)
    return batch_norm(backend.array(x), axis=axis, residual=residual, **options)


def both(backend, x, dy, residual, axis, options):
    """y, m2 and the gradients, on the host."""
    y, cache = forward(backend, x, residual, axis, **options)
    grads = batch_norm_backward(backend.array(dy), cache)
    host = (None if g is None else backend.numpy(g) for g in grads)
    return backend.numpy(y), backend.numpy(cache.moments.m2), BatchNormGrads(*host)


def channel(a, axis, c):
    return np.moveaxis(np.asarray(a), axis, 0)[c : c + 1].reshape(1, -1).T


@settings(max_examples=150, deadline=None)
@given(calls())
def test_any_call(backend, call):
    x, dy, residual, axis, options, kinds = call
    dtype, real = x.dtype.newbyteorder("="), arithmetic(x.dtype.newbyteorder("="))
    y, m2, grads = both(backend, x, dy, residual, axis, options)
    assert y.shape == grads.dx.shape == x.shape and y.dtype == grads.dx.dtype == dtype
    for c, kind in enumerate(kinds):
        if kind == "largest":  # past what squares hold: any answer, in this channel alone
            continue
        xc, dyc, yc, dxc = (channel(a, axis, c).astype(dtype) for a in (x, dy, y, grads.dx))
        rc = None if residual is None else channel(residual, axis, c).astype(dtype)
        gamma, beta = (None if options.get(k) is None else options[k][c : c + 1] for k in ("gamma", "beta"))
        relu, eps = options["activation"] == "relu", options["eps"]
        if kind in NOT_FINITE:
            assert np.isnan(yc).all() and np.isnan(dxc).all()
            continue
        if kind in CONSTANT:
            assert m2[c] == 0
            xc = np.zeros_like(xc)  # has exactly the same y; the reference rounds its mean
        want, mean, var = reference.batch_norm(xc, gamma, beta, eps=eps, relu=relu, residual=rc)
        terms = reference.batch_norm(xc, gamma, eps=eps)[0], 0 if beta is None else beta, 0 if rc is None else rc
        scale = sum(np.linalg.norm(np.broadcast_to(t, xc.shape).astype(FLOAT64)) for t in terms)
        step = 1e6 * smallest(real)  # a mean among subnormal numbers, rounded to one, times rstd
        assert_close(yc, want, dtype, scale=max(scale, step / (1e-13 if real == FLOAT64 else 2e-6)))
        if relu and kind == "subnormal":  # y may round to zero where what the mask asks for does not
            assert np.isfinite(dxc.astype(FLOAT64)).all()
            continue
        yr = yc if relu else None
        wants = reference.batch_norm_backward(dyc, xc, gamma, eps=eps, y=yr)
        free = reference.batch_norm_backward(dyc, xc, gamma, eps=eps, y=yr, mean=mean, var=var)[0]
        size = np.linalg.norm(free)
        if real != dtype:  # judged element by element: one that cancels keeps the error of its terms
            size = max(size, np.abs(free).max() * np.sqrt(len(free)))
        assert_close(dxc, wants[0], dtype, scale=size)
        if gamma is not None:
            assert_close(grads.dgamma[c : c + 1], wants[1], real, scale=np.sqrt(len(xc)))
        if beta is not None:
            assert_close(grads.dbeta[c : c + 1], wants[2], real, scale=np.sqrt(len(xc)))

    # A channel does not see the others: the same bits where the special ones hold zeros instead.
    special = [c for c, kind in enumerate(kinds) if kind != "plain"]
    tame = np.array(x)
    np.moveaxis(tame, axis, 0)[special] = 0
    if not (tame.flags.c_contiguous ^ np.asarray(x).flags.c_contiguous and x.ndim > 2 and axis == 1):
        y2, _, grads2 = both(backend, tame, dy, residual, axis, options)
        for a, b in ((y, y2), (grads.dx, grads2.dx)):
            a, b = (np.delete(np.asarray(v), special, axis) for v in (a, b))
            assert same_bits(a, b)


@settings(max_examples=100, deadline=None)
@given(calls())
def test_any_evaluation(backend, call):
    """With running statistics every element stands alone: what is not finite stays where it is."""
    x, dy, residual, axis, options, kinds = call
    dtype, real = x.dtype.newbyteorder("="), arithmetic(x.dtype.newbyteorder("="))
    running = RunningStats(len(kinds), dtype=real, xp=backend.xp)
    means, variances = (np.linspace(*ends, len(kinds)).astype(real) for ends in ((-1, 2), (0.5, 4)))
    running.load_state_dict({"mean": means, "var": variances, "count": 9.0, "updates": 1})
    y, cache = forward(backend, x, residual, axis, running=running, training=False, **options)
    y, dx = backend.numpy(y), backend.numpy(batch_norm_backward(backend.array(dy), cache).dx)
    for c, kind in enumerate(kinds):
        if kind == "largest" or (kind == "large" and dtype == FLOAT16):  # the result may be past the largest number
            continue
        xc, dyc, yc, dxc = (channel(a, axis, c).astype(dtype) for a in (x, dy, y, dx))
        rc = None if residual is None else channel(residual, axis, c).astype(dtype)
        gamma, beta = (None if options.get(k) is None else options[k][c : c + 1] for k in ("gamma", "beta"))
        mean, var, eps = means[c : c + 1], variances[c : c + 1], options["eps"]
        frozen = {"eps": eps, "mean": mean, "var": var}
        want, _, _ = reference.batch_norm(xc, gamma, beta, relu=bool(options["activation"]), residual=rc, **frozen)
        finite, wide = np.isfinite(want), yc.astype(FLOAT64)
        np.testing.assert_array_equal(np.where(np.isfinite(wide), 0, wide), np.where(finite, 0, want))
        assert_close(yc[finite], want[finite], dtype, scale=4 * np.sqrt(finite.sum()))
        if options["activation"] is None:
            scale = (1 if gamma is None else gamma.astype(FLOAT64)) / np.sqrt(var.astype(FLOAT64) + eps)
            assert_close(dxc, dyc.astype(FLOAT64) * scale, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_the_largest_spread(backend, rng, dtype, axis):
    x, dy = rng.normal(size=(2, 40, 7, 70, 7))
    x, dy = (x * LARGE[dtype]).astype(dtype), dy.astype(dtype)
    y, cache = batch_norm(backend.array(x), axis=axis)
    assert_close(backend.numpy(y), reference.batch_norm(x, axis=axis)[0], dtype)
    dx = batch_norm_backward(backend.array(dy), cache).dx
    want = reference.batch_norm_backward(dy, x, axis=axis)[0]
    assert_close(backend.numpy(dx), want, dtype, scale=smallest(arithmetic(dtype)) * 1e6)


# --------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("memory", ["NHWC", "NHWC seen as NCHW"])
@pytest.mark.parametrize("shape", [(6, 5, 65, 67), (32, 16, 28, 28), (64, 24, 7, 7)], ids=str)
@pytest.mark.parametrize("mean", [0, 0.1, 3, 100, 1e3, 1e4, 1e5])
def test_layouts_agree_to_two_ulp(backend, rng, mean, shape, memory):
    """rstd within 2 ulp of float32; the mean within 2 ulp of itself, or of the spread where that is far larger."""
    if backend.xp is not np and not (shape == (64, 24, 7, 7) or mean == 1e4):
        shape = (4, *shape[1:])
    x = rng.normal(mean, 1, shape).astype(FLOAT32)
    last = backend.array(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    one = batch_norm(backend.array(x))[1]
    other = batch_norm(last, axis=-1)[1] if memory == "NHWC" else batch_norm(last.transpose(0, 3, 1, 2))[1]
    kinds = [(c.moments.mean, c.mean, c.rstd, c.moments.m2, c.moments.count) for c in (one, other)]
    both = [[backend.numpy(a) for a in kind] for kind in kinds]
    unit = np.maximum(np.abs(both[0][1]), 1 / 8 / both[0][2])
    for i in (0, 1):
        assert (np.abs(both[0][i] - both[1][i]) <= 2 * ulp(unit, FLOAT32)).all()
    exact = [1 / np.sqrt(m2 / count + 1e-5) for *_, m2, count in both]
    for pair in (exact, [c[2].astype(FLOAT64) for c in both]):
        assert (np.abs(pair[0] - pair[1]) <= 2 * ulp(pair[0], FLOAT32)).all()


# --------------------------------------------------------------------------- named properties


def test_worked_example_rounds_as_printed(backend):
    """[2, 4, 6, 8], gamma 2, beta 1. A printed 0.1 and 1.9 are 0.1056 and 1.8944: one digit, not two."""
    x = np.array([[2.0], [4.0], [6.0], [8.0]])
    xhat = backend.numpy(batch_norm(backend.array(x))[0])[:, 0]
    y = backend.numpy(batch_norm(*map(backend.array, (x, np.array([2.0]), np.array([1.0]))))[0])[:, 0]
    assert np.round(xhat, 2).tolist() == [-1.34, -0.45, 0.45, 1.34]
    assert np.round(y, 2).tolist() == [-1.68, 0.11, 1.89, 3.68]
    assert np.round(y, 6).tolist() == [-1.683279, 0.105574, 1.894426, 3.683279]
    with pytest.raises(KilterError, match="more than one value"):
        batch_norm(backend.array(x.T))  # one sample of four features: no batch


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32], ids=str)
def test_the_shape_of_a_distribution_stays(backend, rng, dtype):
    """Mean and variance become 0 and 1; skewness and kurtosis do not change, and nothing turns normal."""

    def moment(a, k):
        a = np.asarray(a, np.float64)
        return (((a - a.mean(0)) / a.std(0)) ** k).mean(0)

    x = rng.exponential(3, (20_000, 4)).astype(dtype)
    y = backend.numpy(batch_norm(backend.array(x), eps=0.0)[0])
    np.testing.assert_allclose(np.asarray(y, np.float64).mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64).var(0), 1, rtol=1e-6)
    assert (moment(x, 3) > 1.8).all()
    for k in (3, 4):
        np.testing.assert_allclose(moment(y, k), moment(x, k), rtol=1e-5)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_relu_is_relu_afterwards(backend, rng, dtype, axis):
    """The same bits in two steps, forward and backward."""
    x, dy = rng.normal(size=(2, 20, 6, 5, 6)).astype(dtype)
    gamma, beta = rng.normal(size=(2, 6)).astype(arithmetic(dtype))
    arrays = tuple(map(backend.array, (x, gamma, beta)))
    fused, cache = batch_norm(*arrays, axis=axis, activation="relu")
    plain, cache2 = batch_norm(*arrays, axis=axis)
    fused, plain, zero = backend.numpy(fused), backend.numpy(plain), dtype.type(0)
    assert same_bits(fused, np.where(plain < zero, zero, plain))
    grads = batch_norm_backward(backend.array(dy), cache)
    two_steps = batch_norm_backward(backend.array(np.where(plain > zero, dy, zero)), cache2)
    for name in ("dx", "dgamma", "dbeta"):
        one, other = (backend.numpy(getattr(g, name)) for g in (grads, two_steps))
        assert_close(one, other, one.dtype, 1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_not_written_to(backend, rng, dtype, training):
    """The functional form changes nothing; with `running`, training changes that alone, and evaluation nothing."""
    x, r, dy = map(backend.array, rng.normal(size=(3, 6, 5, 4)).astype(dtype))
    gamma, beta = map(backend.array, rng.normal(size=(2, 5)).astype(arithmetic(dtype)))
    weights = backend.array(np.array([1.0, 2, 0, 1, 1, 1]))
    running = RunningStats(5, dtype=arithmetic(dtype), xp=backend.xp)
    inputs = (x, r, dy, gamma, beta, weights, *(() if training else (running.mean, running.var)))
    before = [a.tobytes() for a in inputs]
    options = {"residual": r, "activation": "relu", "weights": weights, "training": training}
    _, cache = batch_norm(x, gamma, beta, running=None if training else running, **options)
    batch_norm_backward(dy, cache)
    assert before == [a.tobytes() for a in inputs] and running.updates == 0
    large = [a for a in cache if isinstance(a, np.ndarray) and a.size >= x.size]
    shares = backend.xp.shares_memory
    assert all(shares(a, x) or shares(a, r) for a in large), "references alone, no normalised copy"


def test_small_batches_are_noisy(rng):
    """The output of one sample depends on the batch around it, less the larger the batch: noise ~ 1 / sqrt(batch)."""
    data, noise = rng.normal(size=(64, 40, 200)), {}
    for batch in (4, 16, 64):
        parts = data.reshape(-1, batch, 200)
        noise[batch] = np.std([batch_norm(part)[1].moments.mean for part in parts])
    assert noise[4] / noise[16] == pytest.approx(2, rel=0.1)
    assert noise[16] / noise[64] == pytest.approx(2, rel=0.1)
    sample = data[:1, 0]
    outputs = [batch_norm(np.concatenate([sample, data[1 : 1 + b, 0]]))[0][0] for b in (1, 7, 63)]
    assert not np.allclose(outputs[0], outputs[1], atol=0.1) and not np.allclose(outputs[1], outputs[2], atol=0.1)


@pytest.mark.parametrize("order", ["before the activation", "after it"])
def test_batch_norm_stands_anywhere(rng, order):
    """Before or after the activation; biased variance and eps inside the root in both."""
    x, dy = rng.normal(size=(2, 12, 3))
    norm = nn.BatchNorm(3, dtype=FLOAT64)
    norm.params()["gamma"][:], norm.params()["beta"][:] = [1.5, -1, 2], [0.1, 0.2, -0.3]
    model = nn.Sequential(norm, nn.ReLU()) if order == "before the activation" else nn.Sequential(nn.ReLU(), norm)
    z = x if order == "before the activation" else np.maximum(x, 0)
    want = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) * [1.5, -1, 2] + [0.1, 0.2, -0.3]
    want = np.maximum(want, 0) if order == "before the activation" else want
    np.testing.assert_allclose(model(x), want, rtol=1e-12, atol=1e-13)
    dx = model.backward(dy)
    for i in np.ndindex(4, 3):
        ends = []
        for h in (1e-6, -1e-6):
            moved = x.copy()
            moved[i] += h
            ends.append((model(moved) * dy).sum())
        assert dx[i] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)
