"""Losses: vectors, gradients by central differences, stability, mistakes."""

import ml_dtypes
import numpy as np
import pytest

import kilter
from kilter import nn

F64 = np.float64
SIXTEEN = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
DTYPES = [np.dtype(F64), np.dtype(np.float32), *SIXTEEN]


def randn(*shape, seed=0, dtype=F64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def central(f, a, h=1e-6):
    """Gradient of the number f() with respect to the array a, which f reads."""
    g = np.empty(a.shape)
    for i in np.ndindex(a.shape):
        kept = a[i]
        a[i] = kept + h
        up = f()
        a[i] = kept - h
        g[i] = (up - f()) / (2 * h)
        a[i] = kept
    return g


LOGITS = np.array([[1.0, 2.0, 3.0, 4.0]])


@pytest.mark.parametrize(
    ("eps", "others", "loss", "soft"),
    [
        (0.0, "uniform", 1.440189698561, [0, 0, 1, 0]),
        (0.1, "uniform", 1.490189698561, [0.025, 0.025, 0.925, 0.025]),
        (0.1, "rest", 1.506856365228, [0.1 / 3, 0.1 / 3, 0.9, 0.1 / 3]),
    ],
)
def test_v16_label_smoothing(eps, others, loss, soft):
    got, dlogits = nn.softmax_cross_entropy(LOGITS, np.array([2]), label_smoothing=eps, smooth_others=others)
    assert got == pytest.approx(loss, abs=1e-11)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum()
    np.testing.assert_allclose(dlogits, p - soft, atol=1e-14)
    hard = np.array([[0.0, 0.0, 1.0, 0.0]])
    for targets, kwargs in (
        (np.array([soft], F64), {}),
        (hard, {"label_smoothing": eps, "smooth_others": others}),
    ):
        again = nn.softmax_cross_entropy(LOGITS, targets, **kwargs)
        assert again[0] == pytest.approx(loss, abs=1e-11)
        np.testing.assert_allclose(again[1], dlogits, atol=1e-14)


@pytest.mark.parametrize("targets", ["labels", "soft"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0, 1.0, 3.0]])
@pytest.mark.parametrize(("eps", "others"), [(0.0, "uniform"), (0.2, "uniform"), (0.2, "rest")])
def test_softmax_cross_entropy_gradient(targets, weights, eps, others):
    z = randn(5, 3)
    y = np.array([2, 0, 1, 1, 2])
    if targets == "soft":
        y = np.random.default_rng(1).dirichlet(np.ones(3), 5)
    w = None if weights is None else np.array(weights)

    def f():
        return nn.softmax_cross_entropy(z, y, label_smoothing=eps, smooth_others=others, weights=w)[0]

    _, dlogits = nn.softmax_cross_entropy(z, y, label_smoothing=eps, smooth_others=others, weights=w)
    np.testing.assert_allclose(dlogits, central(f, z, 1e-5), atol=1e-9)


def test_softmax_cross_entropy_is_stable():
    z = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], np.float32)
    loss, dlogits = nn.softmax_cross_entropy(z, np.array([0, 0]))
    assert loss == pytest.approx(1e4)
    np.testing.assert_array_equal(dlogits, [[0, 0, 0], [-0.5, 0.5, 0]])
    loss, dlogits = nn.softmax_cross_entropy(np.array([[0.0, -np.inf]]), np.array([0]))
    assert loss == 0
    np.testing.assert_array_equal(dlogits, [[0, 0]])
    for broken in (np.nan, np.inf):
        assert np.isnan(nn.softmax_cross_entropy(np.array([[broken, 0.0]]), np.array([0]))[0])


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), *SIXTEEN], ids=str)
def test_losses_of_low_precision_compute_in_float32(dtype):
    z = randn(6, 4).astype(dtype)
    y, t = np.array([0, 1, 2, 3, 0, 1]), np.random.default_rng(1).random((6, 4))
    eps = float(ml_dtypes.finfo(dtype).eps)
    for loss, targets in ((nn.softmax_cross_entropy, y), (nn.bce_with_logits, t), (nn.mse, t)):
        value, dz = loss(z, targets)
        exact, dexact = loss(z.astype(F64), targets)
        assert isinstance(value, float)
        assert dz.dtype == dtype
        assert value == pytest.approx(exact, rel=1e-6)
        np.testing.assert_allclose(dz.astype(F64), dexact, rtol=0.51 * eps + 1e-6, atol=1e-7)


def test_weights_select_samples():
    z, y = randn(4, 3), np.array([0, 1, 2, 0])
    loss, dz = nn.softmax_cross_entropy(z, y, weights=np.array([1, 1, 0, 0]))
    part, dpart = nn.softmax_cross_entropy(z[:2], y[:2])
    assert loss == pytest.approx(part, abs=1e-15)
    np.testing.assert_allclose(dz, np.vstack([dpart, np.zeros((2, 3))]), atol=1e-16)


@pytest.mark.parametrize("loss", [nn.bce_with_logits, nn.mse])
def test_elementwise_losses(loss):
    z, t = randn(5, 3), np.random.default_rng(1).random((5, 3))
    np.testing.assert_allclose(loss(z, t)[1], central(lambda: loss(z, t)[0], z, 1e-5), atol=1e-9)
    assert nn.bce_with_logits(np.array([1e4, -1e4]), np.array([1.0, 0.0]))[0] == 0
    assert nn.mse(np.array([1.0, 3.0]), np.array([0.0, 1.0]))[0] == 2.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", ["labels", "soft"])
def test_cross_entropy_on_every_backend(backend, dtype, targets):
    z, y = randn(6, 4).astype(dtype), np.array([0, 1, 2, 3, 0, 1])
    if targets == "soft":
        y = np.eye(4, dtype=np.float32)[y] * np.float32(0.5) + np.float32(0.125)
    w = np.array([1.0, 2, 0, 1, 1, 3])
    options = {"label_smoothing": 0.1, "smooth_others": "rest"}
    loss, dz = nn.softmax_cross_entropy(*map(backend.array, (z, y)), weights=backend.array(w), **options)
    want, dwant = nn.softmax_cross_entropy(z, y, weights=w, **options)
    assert isinstance(loss, float) and loss == pytest.approx(want, rel=1e-6)
    np.testing.assert_array_equal(backend.numpy(dz), dwant)


@pytest.mark.parametrize("loss", [nn.bce_with_logits, nn.mse])
def test_elementwise_losses_on_every_backend(backend, loss):
    z, t = randn(5, 3), np.random.default_rng(1).random((5, 3))
    got, want = loss(backend.array(z), backend.array(t)), loss(z, t)
    assert got[0] == want[0]
    np.testing.assert_array_equal(backend.numpy(got[1]), want[1])


X = np.ones((2, 4), np.float32)
Y = np.array([0, 1])
BAD = {
    "label too high": (lambda: nn.softmax_cross_entropy(X, Y + 3), r"labels in \[0, 4\), got 4"),
    "label too low": (lambda: nn.softmax_cross_entropy(X, Y - 1), r"labels in \[0, 4\), got -1"),
    "float labels": (lambda: nn.softmax_cross_entropy(X, Y.astype(F64)), "targets: expected integers"),
    "list of labels": (lambda: nn.softmax_cross_entropy(X, [0, 1]), "targets: expected a NumPy array"),
    "too many labels": (lambda: nn.softmax_cross_entropy(X, np.array([0, 1, 2])), "targets: expected shape"),
    "soft shape": (lambda: nn.softmax_cross_entropy(X, np.ones((2, 3))), "targets: expected shape"),
    "soft sum": (lambda: nn.softmax_cross_entropy(X, np.ones((2, 4))), "targets: expected rows .* that sum to 1"),
    "soft negative": (
        lambda: nn.softmax_cross_entropy(X, np.array([[-1.0, 2, 0, 0], [1, 0, 0, 0]])),
        "targets: expected rows of numbers of at least 0",
    ),
    "soft NaN": (lambda: nn.softmax_cross_entropy(X, np.full((2, 4), np.nan)), "targets: expected rows"),
    "no classes": (lambda: nn.softmax_cross_entropy(X[:, :0], Y), "one class"),
    "negative weights": (lambda: nn.softmax_cross_entropy(X, Y, weights=np.array([2.0, -1])), "weights: expected"),
    "weights shape": (lambda: nn.softmax_cross_entropy(X, Y, weights=np.ones(3)), "weights: expected shape"),
    "eps": (lambda: nn.softmax_cross_entropy(X, Y, label_smoothing=1.5), "label_smoothing: expected"),
    "others": (lambda: nn.softmax_cross_entropy(X, Y, smooth_others="all"), "smooth_others: expected"),
    "rest of one": (
        lambda: nn.softmax_cross_entropy(X[:, :1], Y * 0, label_smoothing=0.1, smooth_others="rest"),
        "at least 2 classes",
    ),
    "weights": (lambda: nn.softmax_cross_entropy(X, Y, weights=np.zeros(2)), "weights: expected"),
    "empty": (lambda: nn.softmax_cross_entropy(X[:0], Y[:0]), "at least one sample"),
    "integer logits": (lambda: nn.softmax_cross_entropy(X.astype(int), Y), "logits: expected dtype float64"),
    "bce range": (lambda: nn.bce_with_logits(X, X + 1), r"targets: expected numbers in \[0, 1\]"),
    "bce shape": (lambda: nn.bce_with_logits(X, X[:1]), "targets: expected shape"),
    "mse list": (lambda: nn.mse([1.0], X), "y: expected a NumPy array"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    call, message = BAD[name]
    with pytest.raises(kilter.KilterError, match=message):
        call()
