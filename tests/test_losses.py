"""Losses: vectors, gradients by central differences, stability, mistakes."""

import ml_dtypes
import numpy as np
import pytest

import kilter
import reference_nn as reference
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


# Whole blocks of rows and not, rows longer than a block, groups of exponentials and what is left.
SHAPES = [(1, 1), (1, 2), (3, 7), (128, 10), (513, 10), (5, 512), (3, 1031), (2000, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", ["labels", "soft", "uniform", "rest"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_cross_entropy_follows_the_reference(backend, dtype, targets, shape, weighted):
    (samples, classes), rng = shape, np.random.default_rng(5)
    if targets == "rest" and classes == 1:
        pytest.skip("there is no rest")
    z, labels = randn(*shape, dtype=F64).astype(dtype), rng.integers(0, classes, samples)
    y, q, options = labels, np.eye(classes)[labels], {}
    if targets == "soft":
        y = q = rng.dirichlet(np.ones(classes), samples).astype(np.float32)
    elif targets != "labels":
        q, options = (
            reference.smoothed(labels, classes, 0.1, targets),
            {"label_smoothing": 0.1, "smooth_others": targets},
        )
    w = rng.integers(0, 4, samples) + (np.arange(samples) == 0) if weighted else None
    want, dwant = reference.softmax_cross_entropy(z, q, w)
    loss, dz = nn.softmax_cross_entropy(
        backend.array(z), backend.array(y), weights=None if w is None else backend.array(w), **options
    )
    # On the host arithmetic is in float64, and only the gradient is rounded.
    host = isinstance(dz, np.ndarray) and type(dz) is np.ndarray
    eps = float(ml_dtypes.finfo(np.float32 if dtype.itemsize < 8 else F64).eps)
    assert isinstance(loss, float) and dz.dtype == dtype and dz.shape == shape
    assert loss == pytest.approx(want, rel=1e-14 if host else 40 * eps, abs=1e-14 if host else 10 * eps)
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    scale = 1 / samples if w is None else w.max() / w.sum()
    # p - q cancels: what is lost counts in units of p, which is at most 1.
    lost = 8 * F64(np.finfo(F64).eps if host else eps) * scale
    np.testing.assert_allclose(backend.numpy(dz).astype(F64), dwant, rtol=1.01 * unit, atol=lost + tiny)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64", ">i4"])
def test_labels_of_every_integer_type_and_any_layout(kind):
    z, y = randn(6, 4, dtype=np.float32), np.array([0, 1, 2, 3, 0, 1])
    want = nn.softmax_cross_entropy(z, y)
    apart = np.zeros((6, 2), kind)
    apart[:, 0] = y
    for logits in (z, np.asfortranarray(z), np.repeat(z, 2, axis=1)[:, ::2], z.astype(">f4")):
        loss, dz = nn.softmax_cross_entropy(logits, apart[:, 0])
        assert loss == want[0]
        np.testing.assert_array_equal(dz, want[1])
        assert dz.flags.c_contiguous and not np.shares_memory(dz, logits)


def test_a_label_far_outside_is_refused():
    for label in (2**63 - 1, -(2**63), np.uint64(2**64 - 1)):
        with pytest.raises(kilter.KilterError, match=r"targets: expected labels in \[0, 4\), got"):
            nn.softmax_cross_entropy(X, np.array([0, label], np.uint64 if label > 2**63 else np.int64))


def test_a_sample_has_the_gradient_that_it_has_alone(backend):
    """Bit for bit, whatever block or thread it falls to."""
    z, y = randn(9000, 10, dtype=np.float32), np.arange(9000) % 10
    for at in (0, 50, 51, 4500, 8999):
        weights = (np.arange(9000) == at).astype(F64)
        among = nn.softmax_cross_entropy(*map(backend.array, (z, y)), weights=backend.array(weights))
        alone = nn.softmax_cross_entropy(*(backend.array(a[at : at + 1]) for a in (z, y)))
        assert among[0] == alone[0]
        np.testing.assert_array_equal(backend.numpy(among[1])[at], backend.numpy(alone[1])[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("at", [0, 3], ids=["own", "other"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_logits_without_bounds_on_every_backend(backend, value, at, eps):
    """Only -inf beside a label leaves numbers, where nothing is smoothed; other samples keep their gradients."""
    z = randn(4, 5, dtype=np.float32)
    z[0, at] = value
    logits, labels = backend.array(z), backend.array(np.array([0, 1, 2, 3]))
    loss, dz = nn.softmax_cross_entropy(logits, labels, label_smoothing=eps)
    _, dz_rest = nn.softmax_cross_entropy(z[1:], np.array([1, 2, 3]), label_smoothing=eps)
    np.testing.assert_allclose(backend.numpy(dz)[1:], dz_rest * 0.75, atol=1e-7)
    if np.isfinite(value) or (at == 3 and value < 0 and not eps):
        assert np.isfinite(loss) and np.isfinite(backend.numpy(dz)).all()
    else:
        assert not np.isfinite(loss)


LABELS, ROWS = r"labels in \[0, 4\)", "rows of numbers of at least 0 that sum to 1"
REFUSED = {  # targets of the second of two samples, and what is said of them
    "label": (4, f"{LABELS}, got 4$"),
    "negative label": (-1, f"{LABELS}, got -1$"),
    "negative": ([1.5, -0.5, 0.0, 0.0], f"{ROWS}, got -0.5$"),
    "sum": ([0.5, 0.5, 0.5, 0.0], f"{ROWS}, got a sum of 1.5$"),
    "NaN": ([np.nan, 0.5, 0.5, 0.0], f"{ROWS}, got a sum of (NaN|nan)$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_are_refused_in_the_same_words(backend, name):
    wrong, message = REFUSED[name]
    targets = np.array([[1.0, 0.0, 0.0, 0.0], wrong] if isinstance(wrong, list) else [0, wrong])
    with pytest.raises(kilter.KilterError, match=f"^targets: expected {message}"):
        nn.softmax_cross_entropy(backend.array(X), backend.array(targets))


def test_a_graph_replays_the_loss(cuda, recorder):
    """The loss is then a number on the device."""
    logits, labels = cuda.array(randn(5, 4, dtype=np.float32)), cuda.array(np.array([0, 1, 2, 3, 0]))
    nn.softmax_cross_entropy(logits, labels)
    with recorder.graph() as graph:
        loss, dz = nn.softmax_cross_entropy(logits, labels)
    for seed in range(3):
        logits.set(randn(5, 4, seed=seed, dtype=np.float32))
        recorder.replay(graph)
        want = nn.softmax_cross_entropy(cuda.numpy(logits), cuda.numpy(labels))
        assert float(loss) == pytest.approx(want[0], rel=1e-6)
        np.testing.assert_allclose(cuda.numpy(dz), want[1], atol=1e-7)


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
