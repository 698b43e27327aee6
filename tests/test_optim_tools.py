"""kilter.optim: clipping of gradients, and estimates of the curvature."""

import math

import numpy as np
import pytest

from kilter import nn
from kilter.optim import Adam, clip_grad_norm, clip_grad_value, gauss_newton_bartlett, hutchinson
from optimizers import on, read
from support import DTYPES, FLOAT16, FLOAT32, FLOAT64, arithmetic, copied, refused, relative_error, same_bits, ulp

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(arrays):
    """All numbers of a list of arrays as one float64 vector."""
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])


def some(rng, dtype, sizes=((3, 4), (7,), (), (0,))):
    return [np.asarray(rng.normal(size=size)).astype(dtype) for size in sizes]


# --------------------------------------------------------------------------- clipping


@dtypes
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6, math.inf])
def test_clip_grad_norm(backend, rng, dtype, limit):
    grads = on(backend, some(rng, dtype))
    grads[0] = grads[0].T  # a view is changed where it lies
    before = wide(read(backend, grads))
    norm = clip_grad_norm(grads, limit)
    grads = read(backend, grads)
    np.testing.assert_allclose(norm, np.linalg.norm(before), rtol=1e-12)
    want = before * min(1.0, limit / (norm + 1e-6))
    if limit > norm:
        assert (wide(grads) == before).all()
    elif dtype.itemsize == 2:
        assert (np.abs(wide(grads) - want) <= 0.501 * ulp(want, dtype)).all()  # float32's factor, one rounding
    else:
        np.testing.assert_allclose(wide(grads), want, rtol=1e-15 if dtype == FLOAT64 else 2e-7)


@pytest.mark.parametrize(("dtype", "limit"), [(FLOAT64, 1e-13), (FLOAT32, 1e-6)], ids=str)
def test_clipping_before_the_step_is_clipping_in_the_step(backend, rng, dtype, limit):
    inside, outside = on(backend, [np.ones(50, dtype), np.ones(50, dtype)])
    one, two = Adam([inside], clip_norm=0.5), Adam([outside])
    for g in rng.normal(size=(10, 50)).astype(dtype):
        report = one.step([backend.array(g)])
        own = [backend.array(g.copy())]
        assert clip_grad_norm(own, 0.5) == report.grad_norm
        two.step(own)
    assert relative_error(*read(backend, [inside, outside])) < limit


@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_not_scaled(backend, dtype, bad):
    before = [np.full(5, 100, dtype), np.array([1, bad, 3], dtype)]
    grads = on(backend, before)
    norm = clip_grad_norm(grads, 1.0)
    grads = read(backend, grads)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert all(same_bits(g, b) for g, b in zip(grads, before, strict=True))


def test_norms_beyond_the_range_of_squares(backend):
    for values, norm in (
        ([np.full(4, 1e30, FLOAT32)], 2e30),
        ([np.array([3e200]), np.array([-4e200]), np.zeros(0)], 5e200),
        ([np.full(2, 1e308)], math.sqrt(2) * 1e308),
        ([np.full(2, 60000, FLOAT16)], math.sqrt(2) * 60000),
    ):
        grads = on(backend, values)
        tolerance = 1e-2 if values[0].dtype == FLOAT16 else 1e-6
        np.testing.assert_allclose(clip_grad_norm(grads, 1.0), norm, rtol=tolerance)
        np.testing.assert_allclose(np.linalg.norm(wide(read(backend, grads))), 1.0, rtol=1e-3)


def test_zero_and_no_gradients(backend):
    grads = [backend.array(np.zeros(3, FLOAT16))]
    assert clip_grad_norm(grads, 1e-8) == 0.0
    assert (grads[0] == 0).all()
    assert clip_grad_norm([], 1.0) == clip_grad_norm([backend.array(np.zeros((0, 3)))], 1.0) == 0.0


@dtypes
def test_clip_grad_value(backend, dtype):
    values = np.array([-7, -0.25, -0.0, 0.25, 7, math.inf, -math.inf, math.nan]).astype(dtype)
    grads = {"w": backend.array(values), "b": backend.array(values)[::-1].reshape(2, 4)}
    assert clip_grad_value(grads, 0.5) is None
    grads = read(backend, grads)
    want = [-0.5, -0.25, 0, 0.25, 0.5, 0.5, -0.5, math.nan]
    np.testing.assert_array_equal(grads["w"].astype(FLOAT64), want)
    np.testing.assert_array_equal(grads["b"].astype(FLOAT64).ravel(), want[::-1])


@dtypes
def test_a_limit_beyond_the_dtype_limits_nothing(backend, dtype):
    grads = [backend.array(np.array([-100, 3], dtype))]
    clip_grad_value(grads, 1e300)
    assert grads[0].astype(float).tolist() == [-100, 3]


@pytest.mark.parametrize("clip", [clip_grad_norm, clip_grad_value])
def test_what_clipping_refuses(clip):
    good, locked = np.full(3, 9.0), np.full(3, 9.0)
    locked.flags.writeable = False
    for match, grads, limit in (
        (r"grads\[b\]: expected a writable", {"w": good, "b": locked}, 1.0),
        (r"grads\[b\]: expected a writable", {"w": good, "b": np.broadcast_to(good, (2, 3))}, 1.0),
        (r"grads\[1\]: expected an array of its own, got that of grads\[0\]", [good, good], 1.0),
        *(("^max_", [good], limit) for limit in (0, -1.0, math.nan, "1", None)),
    ):
        with refused(match, good, locked):
            clip(grads, limit)


# --------------------------------------------------------------------------- curvature


@dtypes
def test_hutchinson_is_exact_on_a_diagonal(backend, rng, dtype):
    like = on(backend, {"w": np.zeros((3, 4), dtype), "b": np.zeros(5, dtype)})
    values = {name: (2.0 ** rng.integers(-3, 4, a.shape)).astype(dtype) for name, a in like.items()}
    h = on(backend, values)
    got = read(backend, hutchinson(lambda v: {name: h[name] * v[name] for name in v}, like, seed=3))
    for name in h:
        assert same_bits(got[name], values[name].astype(arithmetic(dtype)))


def symmetric(rng, n):
    a = rng.normal(size=(n, n))
    return a + a.T


def test_hutchinson_meets_its_mean_and_variance(rng):
    H = symmetric(rng, 12)

    def hvp(v):
        flat = H @ np.concatenate([v[0].ravel(), v[1]])
        return [flat[:6].reshape(2, 3), flat[6:]]

    like = [np.zeros((2, 3)), np.zeros(6)]
    estimates = np.array([wide(hutchinson(hvp, like, seed=seed, probes=4)) for seed in range(2000)])
    deviation = np.sqrt((np.sum(H**2, axis=1) - np.diag(H) ** 2) / 4)
    error = (estimates.mean(0) - np.diag(H)) / (deviation / math.sqrt(2000))
    assert np.abs(error).max() < 4
    np.testing.assert_allclose(estimates.std(0), deviation, rtol=0.1)


def test_signs_are_a_function_of_seed_and_probe():
    seen = []

    def hvp(v):
        seen.append(v[0].copy())
        v[0][...] = 7  # what is done to v stays outside
        return [np.ones(200)]

    one = hutchinson(hvp, [np.zeros(200, FLOAT32)], seed=1, probes=2)[0]
    two = hutchinson(hvp, [np.zeros(200, FLOAT32)], seed=1, probes=2)[0]
    hutchinson(hvp, [np.zeros(200, FLOAT32)], seed=2)
    assert same_bits(one, two)
    assert set(np.unique(seen)) == {-1, 1}
    assert same_bits(seen[0], seen[2]) and same_bits(seen[1], seen[3])
    for a, b in ((0, 1), (0, 4), (1, 4)):
        assert abs(seen[a] @ seen[b]) < 60  # 4 standard deviations
    np.testing.assert_array_equal(one, (seen[0] + seen[1]) / 2)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("^probes", {"probes": 0}),
        ("^probes", {"probes": 1.5}),
        ("^probes", {"probes": True}),
        ("^seed", {"seed": -1}),
        ("^seed", {"seed": 0.5}),
        (r"^hvp\(v\): .*no w", {"hvp": lambda v: {}}),
        (r"^hvp\(v\): .*also b", {"hvp": lambda v: {**v, "b": np.ones(3)}}),
        (r"^hvp\(v\)\[w\]: expected shape", {"hvp": lambda v: {"w": np.ones(4)}}),
        (r"^hvp\(v\)\[w\]", {"hvp": lambda v: {"w": 1.0}}),
        (r"^hvp\(v\)", {"hvp": lambda v: None}),
    ],
)
def test_what_hutchinson_refuses(match, change):
    with refused(match):
        hutchinson(**{"hvp": lambda v: v, "like": {"w": np.ones(3)}, "seed": 0, **change})


def classifier(rng, dtype=FLOAT64, features=3, classes=4):
    model = nn.Sequential(nn.Linear(features, classes, seed=0, dtype=dtype))
    model[0].own_params["bias"][...] = rng.normal(size=classes)
    return model, rng.normal(size=(8, features)).astype(dtype)


def test_gauss_newton_bartlett_meets_the_gauss_newton_matrix(rng):
    """Softmax regression: the diagonal is mean(x_a^2 p_k (1 - p_k))."""
    model, x = classifier(rng)
    p = np.exp(model(x))
    p /= p.sum(1, keepdims=True)
    want = np.einsum("na,nk->ak", x**2, p * (1 - p)) / len(x)
    draws = [gauss_newton_bartlett(model, x, seed=seed) for seed in range(3000)]
    for name, exact in (("0.weight", want), ("0.bias", (p * (1 - p)).mean(0))):
        estimates = np.array([d[name] for d in draws])
        assert (estimates >= 0).all()
        error = (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(3000))
        assert np.abs(error).max() < 4


@dtypes
def test_gauss_newton_bartlett_is_the_squared_gradient_of_drawn_labels(rng, dtype):
    """One sample, two classes of equal probability: either label gives the gradient ±x/2."""
    model = nn.Sequential(nn.Linear(2, 2, seed=0, dtype=dtype))
    model[0].own_params["weight"][...] = 0
    x = np.array([[2.0, -4.0]]).astype(dtype)
    for seed in range(10):
        h = gauss_newton_bartlett(model, x, seed=seed)
        assert h.keys() == model.params().keys()
        assert h["0.weight"].dtype == arithmetic(dtype)
        assert h["0.weight"].tolist() == [[1, 1], [4, 4]]
        assert h["0.bias"].tolist() == [0.25, 0.25]


def test_gauss_newton_bartlett_leaves_the_gradients_alone(rng):
    model, x = classifier(rng)
    _, dlogits = nn.softmax_cross_entropy(model(x), np.arange(8) % 4)
    model.backward(dlogits)
    grads, before = model.grads(), copied(model.grads())
    one, two, other = (gauss_newton_bartlett(model, x, seed=seed) for seed in (5, 5, 6))
    assert all(same_bits(grads[name], before[name]) for name in before)
    assert all(same_bits(one[name], two[name]) for name in one)
    assert not same_bits(one["0.weight"], other["0.weight"])


def test_labels_of_probability_zero_are_not_drawn():
    """Then the gradient is zero: the model is sure of its label."""
    model = nn.Sequential(nn.Linear(1, 3, seed=0))
    model[0].own_params["weight"][...] = [[-1000.0, 1000.0, -1000.0]]
    x = np.ones((2000, 1), FLOAT32)
    for seed in range(5):
        assert all((h == 0).all() for h in gauss_newton_bartlett(model, x, seed=seed).values())


def test_what_gauss_newton_bartlett_refuses(rng):
    model, x = classifier(rng)
    for seed in (-1, 0.5, None):
        with refused("^seed"):
            gauss_newton_bartlett(model, x, seed=seed)

    class Flat(nn.Module):
        def forward(self, x):
            return x.ravel()

    for bad in (x, x[:0]):
        with refused(r"^model\(x\): expected logits"):
            gauss_newton_bartlett(Flat() if bad is x else model, bad, seed=0)
