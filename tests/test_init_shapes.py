"""The two initialisers that are no plain fill: truncated normals and orthogonal matrices."""

import numpy as np
import pytest

import reference
from kilter import init
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, refused, same_bits

INSIDE = 2 / reference.truncated_deviation()  # no value lies further from the mean, in deviations


# --------------------------------------------------------------------------- truncated normal


def test_v12_deviation_of_the_truncated_normal():
    assert reference.truncated_deviation() == pytest.approx(0.87962566103423978, abs=1e-16)
    z = init.truncated_normal((784, 512), std=0.05, seed=0, dtype="float64")
    assert z.std() == pytest.approx(0.05, rel=4e-3)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 70_001])
@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
def test_truncated_normal_against_float64(size, seed):
    want = reference.truncated_normal(size, seed=seed, stream=9) / reference.truncated_deviation()
    got = init.truncated_normal(size, seed=seed, stream=9)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_truncated_normal_moments_and_bounds():
    z = init.truncated_normal(2_000_000, seed=3, dtype="float64")
    assert INSIDE * 0.999 < abs(z).max() < INSIDE
    np.testing.assert_allclose([z.mean(), z.var(), (z**3).mean()], [0, 1, 0], atol=5e-3)
    kurtosis = _fourth_moment() / reference.truncated_deviation() ** 4
    np.testing.assert_allclose((z**4).mean(), kurtosis, rtol=5e-3)


def _fourth_moment():
    """Of a standard normal within +-2, by the midpoint rule."""
    z = (np.arange(100_000) + 0.5) / 25_000 - 2
    density = np.exp(-z * z / 2)
    return (z**4 * density).sum() / density.sum()


def test_truncated_normal_is_normal_where_that_is_inside():
    plain, cut = init.normal(10_000, seed=1, dtype="float64"), init.truncated_normal(10_000, seed=1, dtype="float64")
    inside = abs(plain) < 2
    assert 0.94 < inside.mean() < 0.97
    np.testing.assert_allclose(cut[inside], plain[inside] / reference.truncated_deviation(), rtol=1e-14)
    assert same_bits(init.truncated_normal(300, seed=1, dtype="float64"), cut[:300])
    assert not (init.truncated_normal(300, seed=1, stream=1, dtype="float64") == cut[:300]).any()


def test_truncated_normal_in_every_dtype():
    double, single = (init.truncated_normal((7, 90), 3.0, 0.5, seed=4, dtype=d) for d in (FLOAT64, FLOAT32))
    np.testing.assert_allclose(single, double, rtol=2e-7)
    assert abs(double - 3).max() < 0.5 * INSIDE
    for dtype in (FLOAT16, BFLOAT16):
        assert same_bits(init.truncated_normal((7, 90), 3.0, 0.5, seed=4, dtype=dtype), single.astype(dtype))


# --------------------------------------------------------------------------- orthogonal

SHAPES = [
    ((40, 7), "io", (40, 7)),
    ((7, 40), "io", (7, 40)),
    ((9, 9), "io", (9, 9)),
    ((40, 7), "oi", (40, 7)),
    ((8, 3, 5, 5), "oihw", (8, 75)),
    ((80, 3, 3, 2), "oihw", (80, 18)),
    ((5, 5, 3, 8), "hwio", (75, 8)),
    ((3, 2, 3, 80), "hwio", (18, 80)),
    ((16, 4, 3), "oihw", (16, 12)),
]


@pytest.mark.parametrize(("shape", "layout", "matrix"), SHAPES)
@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_orthogonal(shape, layout, matrix, gain):
    w = init.orthogonal(shape, gain=gain, seed=3, layout=layout, dtype="float64")
    assert w.shape == shape
    flat = w.reshape(matrix)
    product = flat @ flat.T if matrix[0] <= matrix[1] else flat.T @ flat
    np.testing.assert_allclose(product, gain**2 * np.eye(min(matrix)), atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orthogonal_is_rounded_once(dtype):
    exact = init.orthogonal((20, 6), seed=1, dtype="float64")
    out = np.full((20, 6), 7, dtype)
    assert init.orthogonal((20, 6), seed=1, dtype=dtype, out=out) is out
    assert same_bits(out, exact.astype(dtype))


def test_orthogonal_is_the_q_of_a_normal_fill():
    a = init.normal((20, 6), seed=5, stream=2, dtype="float64")
    q = init.orthogonal((20, 6), seed=5, stream=2, dtype="float64")
    r = q.T @ a
    np.testing.assert_allclose(q @ r, a, atol=1e-13)
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-13)
    assert (np.diagonal(r) > 0).all()
    assert not (init.orthogonal((20, 6), seed=5, dtype="float64") == q).any()


def test_all_rotations_are_equally_likely():
    """Angles of 2 x 2 matrices: without the sign of R they would crowd in a half circle."""
    matrices = [init.orthogonal((2, 2), seed=0, stream=s, dtype="float64") for s in range(4000)]
    angles = np.array([np.arctan2(w[1, 0], w[0, 0]) for w in matrices])
    counts = np.histogram(angles, 16, (-np.pi, np.pi))[0]
    assert ((counts - 250) ** 2 / 250).sum() < 15 + 6 * np.sqrt(2 * 15)
    assert abs(np.mean([np.linalg.det(w) for w in matrices])) < 5 / np.sqrt(4000)


def test_orthogonal_layers_keep_the_size_of_a_signal(rng):
    x = rng.normal(size=(30, 64))
    y = x
    for layer in range(50):
        y = y @ init.orthogonal((64, 64), seed=0, stream=layer, dtype="float64")
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-12)


@pytest.mark.parametrize(("shape", "layout"), [((0, 4), "io"), ((4, 0), "oi"), ((4, 0, 3, 3), "oihw")])
def test_orthogonal_of_nothing(shape, layout):
    assert init.orthogonal(shape, seed=0, layout=layout).shape == shape


def test_gain_zero():
    assert not init.orthogonal((4, 3), gain=0.0, seed=0).any()


# --------------------------------------------------------------------------- out and refusals


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("fill", [init.truncated_normal, init.orthogonal])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": -1}),
        ("stream", {"stream": 2**32}),
        ("shape", {"shape": (4, -6)}),
        ("dtype", {"dtype": "int32"}),
        ("out", {"out": np.zeros((6, 4), FLOAT32)}),
        ("out", {"out": np.zeros((4, 6), FLOAT64)}),
        ("out", {"out": np.zeros((4, 6), FLOAT32, "F")}),
        ("out", {"out": read_only(np.zeros((4, 6), FLOAT32))}),
        ("out", {"out": [[0.0] * 6] * 4}),
    ],
)
def test_refusals(fill, name, options):
    options = {"shape": (4, 6), "seed": 0, "out": np.zeros((4, 6), FLOAT32), **options}
    with refused(rf"^{name}: expected .*got ", options["out"]):
        fill(options.pop("shape"), **options)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("std", lambda: init.truncated_normal(4, std=-1.0, seed=0)),
        ("mean", lambda: init.truncated_normal(4, np.nan, seed=0)),
        ("gain", lambda: init.orthogonal((4, 6), gain=-1.0, seed=0)),
        ("gain", lambda: init.orthogonal((4, 6), gain="relu", seed=0)),
        ("shape", lambda: init.orthogonal(4, seed=0)),
        ("shape", lambda: init.orthogonal((4, 6, 3), seed=0)),
        ("layout", lambda: init.orthogonal((4, 6), seed=0, layout="ab")),
    ],
)
def test_refusals_of_their_own(name, call):
    with refused(rf"^{name}: expected .*got "):
        call()


def test_out_is_filled_in_place():
    for dtype in DTYPES:
        out = np.full((30, 41), 7, dtype)
        assert init.truncated_normal((30, 41), 1.0, 2.0, seed=1, dtype=dtype, out=out) is out
        assert same_bits(out, init.truncated_normal((30, 41), 1.0, 2.0, seed=1, dtype=dtype))
