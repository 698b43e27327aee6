"""kilter.init: the random words, the variates made of them, and the scales of the schemes."""

import numpy as np
import pytest

import reference
from kilter import KilterError, _kilter, init
from support import BFLOAT16, DTYPES, FLOAT16, FLOAT32, FLOAT64, refused, same_bits

SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 127, 1000, 70_001)
SEEDS = (0, 1, 2**32, 0x0123456789ABCDEF, 2**64 - 1)
SCHEMES = {  # function: (scheme of the reference, is it uniform)
    init.he_normal: ("he", False),
    init.he_uniform: ("he", True),
    init.xavier_normal: ("xavier", False),
    init.xavier_uniform: ("xavier", True),
    init.lecun_normal: ("lecun", False),
    init.lecun_uniform: ("lecun", True),
    init.torch_default: ("torch_default", True),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda f: f.__name__)


def words(size, seed, stream=0, attempt=0):
    out = np.full(size, 7, np.uint32)
    assert _kilter.philox(out, seed, stream, attempt) is None
    return out


def unit_normal(size, **options):
    """A fan of one leaves the variates as they are."""
    return init.lecun_normal((1, size), **options)[0]


def unit_uniform(size, **options):
    """A fan of three makes the bound one: 2 u - 1."""
    return init.lecun_uniform((3, size), **options).ravel()


# --------------------------------------------------------------------------- the fill mapping


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_words(size, seed):
    for stream, attempt in ((0, 0), (5, 0), (2**32 - 1, 3)):
        want = reference.words(size, seed=seed, stream=stream, attempt=attempt)
        np.testing.assert_array_equal(words(size, seed, stream, attempt), want)


def test_words_are_those_of_random123():
    """Counter 0 with key 0: its four words lie 16 apart."""
    assert [f"{w:08x}" for w in words(64, 0)[::16]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_words_are_those_of_randomgen():
    randomgen = pytest.importorskip("randomgen")
    seed, groups = 0xFEDCBA9876543210, 40
    want = randomgen.Philox(key=seed, counter=0, number=4, width=32).random_raw(64 * groups - 4)
    got = words(64 * groups, seed).reshape(groups, 4, 16).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(got[4:], want.astype(np.uint32))  # its first draw is counter 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_bits(size, seed):
    want = 2 * reference.uniform(3 * size, seed=seed, stream=9) - 1
    np.testing.assert_array_equal(unit_uniform(size, seed=seed, stream=9), want.astype(np.float32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_normal_against_float64(size, seed):
    want = reference.normal(size, seed=seed, stream=9)
    np.testing.assert_allclose(unit_normal(size, seed=seed, stream=9), want, rtol=0, atol=1e-6)


def test_normal_moments_and_tails():
    z = unit_normal(4_000_000, seed=3).astype(np.float64)
    np.testing.assert_allclose([z.mean(), z.var(), (z**3).mean(), (z**4).mean()], [0, 1, 0, 3], atol=1e-2)
    for sigma, share in ((1, 0.317310508), (2, 0.045500264), (3, 0.002699796), (4, 6.334e-5)):
        expected = share * z.size
        assert abs((abs(z) > sigma).sum() - expected) < 5 * np.sqrt(expected)
    assert abs(z[::2] @ z[1::2]) / (z.size / 2) < 5 / np.sqrt(z.size / 2)
    assert abs(z[:-16] @ z[16:]) / z.size < 5 / np.sqrt(z.size)  # the two halves of a pair


def test_uniform_moments():
    u = unit_uniform(1_000_000, seed=4).astype(np.float64)
    assert u.min() >= -1 and u.max() < 1
    np.testing.assert_allclose([u.mean(), u.var(), (u**4).mean()], [0, 1 / 3, 1 / 5], atol=2e-3)


@pytest.mark.parametrize("variates", [unit_normal, unit_uniform])
def test_dtypes_hold_the_same_variates(variates):
    """float64 widens the float32 variate, 16 bit rounds it."""
    single = variates(5001, seed=1)
    for dtype in DTYPES:
        other = variates(5001, seed=1, dtype=dtype)
        assert other.dtype == dtype
        if dtype == FLOAT64:
            np.testing.assert_allclose(other, single, rtol=4e-16)
        else:
            assert same_bits(other, single.astype(dtype))


@schemes
def test_scaling_in_the_arithmetic_dtype(scheme):
    kind, is_uniform = SCHEMES[scheme]
    shape = (100, 333)
    scale = reference.deviation(kind, shape)
    scale, unit = (reference.bound(scale), unit_uniform) if is_uniform else (scale, unit_normal)
    variates = unit(shape[0] * shape[1] + 2, seed=8)[: 100 * 333].reshape(shape).astype(np.float64)
    # A uniform is shifted after it is scaled: its error is relative to the bound.
    double, single = scheme(shape, seed=8, dtype="float64"), scheme(shape, seed=8)
    np.testing.assert_allclose(double, variates * scale, rtol=1e-15, atol=5e-16 * scale * is_uniform)
    assert single.dtype == FLOAT32
    np.testing.assert_allclose(single, variates * scale, rtol=3e-7, atol=2e-7 * scale * is_uniform)
    for dtype in (FLOAT16, BFLOAT16):
        assert same_bits(scheme(shape, seed=8, dtype=dtype), single.astype(dtype))


@schemes
def test_seeds_and_streams_differ(scheme):
    first = scheme((8, 8), seed=1)
    assert same_bits(first, scheme((8, 8), seed=1, stream=0))
    others = [scheme((8, 8), seed=s, stream=t) for s, t in ((2, 0), (1, 1), (1 + 2**32, 0), (0, 1))]
    for a in (first, *others):
        assert sum(bool((a == b).any()) for b in (first, *others)) == 1


@schemes
def test_a_function_of_the_index(scheme):
    """A wider array of the same fan_in begins with the narrower one: nothing depends on size or history."""
    options = {"seed": 5, **({"mode": "fan_in"} if "xavier" in scheme.__name__ else {})}
    long, short = scheme((4, 50_000), **options), scheme((4, 100), **options)
    assert same_bits(long.ravel()[:400], short.ravel())


@pytest.mark.parametrize("shape", [(), 5, (5,), (0,), (2, 3, 4, 5)], ids=str)
def test_plain_fills(shape):
    size = int(np.prod(shape))
    u, z = (draw(size, seed=6, stream=2) for draw in (reference.uniform, reference.normal))
    got = init.uniform(shape, seed=6, stream=2)
    assert got.shape == ((shape,) if isinstance(shape, int) else shape)
    assert same_bits(got.ravel(), u.astype(FLOAT32))
    np.testing.assert_allclose(init.normal(shape, seed=6, stream=2).ravel(), z, atol=1e-6)
    wide = init.uniform(shape, -3.0, 5.0, seed=6, stream=2, dtype="float64")
    np.testing.assert_allclose(wide.ravel(), 8 * u - 3, atol=1e-14)
    wide = init.normal(shape, 2.0, 0.5, seed=6, stream=2, dtype="float64")
    np.testing.assert_allclose(wide.ravel(), 2 + z / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("fill", "name", "options"),
    [
        (init.uniform, "low", {"low": float("nan")}),
        (init.uniform, "low", {"low": 2.0}),
        (init.uniform, "high", {"high": float("inf")}),
        (init.normal, "mean", {"mean": float("inf")}),
        (init.normal, "mean", {"mean": "0"}),
        (init.normal, "std", {"std": -1.0}),
        (init.normal, "std", {"std": float("inf")}),
    ],
)
def test_plain_fills_are_checked(fill, name, options):
    out = np.zeros(4, FLOAT32)
    with refused(name, out):
        fill(4, seed=0, **options, out=out)


# --------------------------------------------------------------------------- scales


@pytest.mark.parametrize(
    ("shape", "xavier", "he_std", "he_bound", "torch_bound"),
    [
        ((784, 512), 0.068041381744, 0.050507627227, 0.087481776528, 0.035714285714),
        ((512, 256), 0.088388347648, 0.0625, 0.108253175473, 0.044194173824),
        ((256, 10), 0.150187852297, 0.088388347648, 0.153093108924, 0.0625),
    ],
)
def test_v12(shape, xavier, he_std, he_bound, torch_bound):
    n = np.prod(shape)
    for scheme, bound in (
        (init.xavier_uniform, xavier),
        (init.he_uniform, he_bound),
        (init.torch_default, torch_bound),
    ):
        w = scheme(shape, seed=0, dtype="float64")
        u = 2 * reference.uniform(n, seed=0) - 1
        np.testing.assert_allclose(w.ravel(), u * bound, atol=1e-11)
        assert abs(w).max() <= bound and abs(w).max() > bound * (1 - 20 / n)
    z = reference.normal(n, seed=0)
    np.testing.assert_allclose(init.he_normal(shape, seed=0, dtype="float64").ravel(), z * he_std, atol=1e-7)
    fan_in = init.xavier_normal(shape, seed=0, mode="fan_in", dtype="float64")
    np.testing.assert_allclose(fan_in.ravel(), z / np.sqrt(shape[0]), atol=1e-7)


def test_v12_relu_depth(rng):
    x = rng.normal(size=(64, 256))
    he, lecun = x, x
    for layer in range(22):
        he = np.maximum(he @ init.he_normal((256, 256), seed=0, stream=layer, dtype="float64"), 0)
        lecun = np.maximum(lecun @ init.lecun_normal((256, 256), seed=0, stream=layer, dtype="float64"), 0)
    assert 0.2 < np.sqrt((he**2).mean()) < 4
    np.testing.assert_allclose(np.linalg.norm(he) / np.linalg.norm(lecun), 2**11, rtol=1e-9)


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((784, 512), "io", (784, 512)),
        ((512, 784), "oi", (784, 512)),
        ((64, 3, 7, 5), "oihw", (105, 2240)),
        ((7, 5, 3, 64), "hwio", (105, 2240)),
        ((1, 1), "io", (1, 1)),
    ],
)
def test_fans(shape, layout, expected):
    assert init.fans(shape, layout) == expected == reference.fans(shape, layout)


def test_fans_of_other_convolutions():
    """The letters stand for the order; one and three spatial axes count as two do."""
    assert init.fans((64, 3, 5), "oihw") == (15, 320)
    assert init.fans((2, 3, 4, 6, 8), "hwio") == (144, 192)


@schemes
@pytest.mark.parametrize(("shape", "layout"), [((40, 300), "oi"), ((16, 8, 3, 5), "oihw"), ((3, 5, 8, 16), "hwio")])
def test_layouts_only_change_the_scale(scheme, shape, layout):
    kind, is_uniform = SCHEMES[scheme]
    scale = reference.deviation(kind, shape, layout) * (np.sqrt(3) if is_uniform else 1)
    n = int(np.prod(shape))
    unit = 2 * reference.uniform(n, seed=2) - 1 if is_uniform else reference.normal(n, seed=2)
    got = scheme(shape, seed=2, layout=layout, dtype="float64")
    assert got.shape == shape
    np.testing.assert_allclose(got.ravel(), unit * scale, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("nonlinearity", "a", "expected"),
    [
        ("linear", 0.0, 1.0),
        ("sigmoid", 0.0, 1.0),
        ("tanh", 0.0, 5 / 3),
        ("relu", 0.0, np.sqrt(2)),
        ("leaky_relu", 0.2, np.sqrt(2 / 1.04)),
        ("selu", 0.0, 0.75),
    ],
)
def test_gain(nonlinearity, a, expected):
    np.testing.assert_allclose(init.gain(nonlinearity, a), expected, rtol=1e-15)
    w = init.he_uniform((50, 20), seed=0, nonlinearity=nonlinearity, a=a, dtype="float64")
    unit = 2 * reference.uniform(1000, seed=0) - 1
    np.testing.assert_allclose(w.ravel(), unit * expected * np.sqrt(3 / 50), atol=1e-15)


def test_torch_default_is_he_uniform_with_a_of_root_five():
    he = init.he_uniform((30, 7), seed=1, nonlinearity="leaky_relu", a=np.sqrt(5), dtype="float64")
    np.testing.assert_allclose(init.torch_default((30, 7), seed=1, dtype="float64"), he, atol=1e-15)


@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 50), ("fan_out", 20), ("fan_avg", 35)])
def test_modes(mode, fan):
    z = reference.normal(1000, seed=0)
    he = init.he_normal((50, 20), seed=0, mode=mode, dtype="float64")
    np.testing.assert_allclose(he.ravel(), z * np.sqrt(2 / fan), atol=1e-6)


# --------------------------------------------------------------------------- out and refusals


@schemes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(scheme, dtype):
    out = np.full((30, 41), 7, dtype)
    got = scheme((30, 41), seed=1, dtype=dtype, out=out)
    assert got is out and same_bits(out, scheme((30, 41), seed=1, dtype=dtype))


def read_only(array):
    array.flags.writeable = False
    return array


@schemes
@pytest.mark.parametrize(
    "out",
    [
        np.zeros((4, 7), FLOAT32),
        np.zeros((4, 6), FLOAT64),
        np.zeros((4, 6), ">f4"),
        np.zeros((4, 12), FLOAT32)[:, ::2],
        np.zeros((4, 6), FLOAT32, "F"),
        np.zeros(97, np.uint8)[1:].view(FLOAT32).reshape(4, 6),
        read_only(np.zeros((4, 6), FLOAT32)),
        [[0.0] * 6] * 4,
    ],
    ids=["shape", "dtype", "swapped", "strided", "fortran", "misaligned", "read-only", "list"],
)
def test_bad_out(scheme, out):
    with refused("out", out):
        scheme((4, 6), seed=0, dtype="float32", out=out)


@schemes
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**64}),
        ("seed", {"seed": 1.5}),
        ("seed", {"seed": None}),
        ("stream", {"stream": -1}),
        ("stream", {"stream": 2**32}),
        ("stream", {"stream": 0.5}),
        ("shape", {"shape": (4,)}),
        ("shape", {"shape": (4, -1)}),
        ("shape", {"shape": (4, 2.5)}),
        ("shape", {"shape": (4, 6, 3, 3)}),
        ("layout", {"layout": "xy"}),
        ("dtype", {"dtype": "int32"}),
        ("dtype", {"dtype": "complex64"}),
        ("dtype", {"dtype": "nonsense"}),
    ],
)
def test_refusals(scheme, name, options):
    out = np.zeros((4, 6), FLOAT32)
    options = {"shape": (4, 6), "seed": 0, **options}
    with refused(name, out):
        scheme(options.pop("shape"), **options, **({} if name == "dtype" else {"out": out}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mode", {"mode": "fan"}),
        ("nonlinearity", {"nonlinearity": "swoosh"}),
        ("a", {"nonlinearity": "leaky_relu", "a": float("nan")}),
    ],
)
def test_he_options_are_checked(name, options):
    for scheme in (init.he_normal, init.he_uniform):
        with pytest.raises(KilterError, match=rf"\b{name}\b"):
            scheme((4, 6), seed=0, **options)
    with pytest.raises(KilterError, match="mode"):
        init.xavier_normal((4, 6), seed=0, mode="fan_out_of_order")


def test_fans_and_gain_are_checked():
    for shape, layout in (
        ((3,), "io"),
        ((3, 4), "oihw"),
        ((3, 4, 5), "io"),
        ((3, 4), "ab"),
        ("ab", "io"),
        ((3, -4), "io"),
    ):
        with pytest.raises(KilterError, match=r"shape|layout"):
            init.fans(shape, layout)
    with pytest.raises(KilterError, match="nonlinearity"):
        init.gain("swoosh")
