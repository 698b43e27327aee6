"""Activations: values, derivatives, accuracy, limits, dtypes, mistakes."""

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import kilter
from gradients import F64, ORDERS, away_from_kinks, check_gradients, nhwc, randn
from kilter import nn
from reference_nn import gelu

DTYPES = [np.dtype(t) for t in (F64, np.float32, np.float16, ml_dtypes.bfloat16)]


def gelu_by_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


LAYERS = {  # a layer, and its formula
    "relu": (nn.ReLU, lambda x: np.maximum(x, 0)),
    "leaky relu": (nn.LeakyReLU, lambda x: np.where(x > 0, x, 0.01 * x)),
    "leaky relu 0.3": (lambda: nn.LeakyReLU(0.3), lambda x: np.where(x > 0, x, 0.3 * x)),
    "tanh": (nn.Tanh, np.tanh),
    "sigmoid": (nn.Sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "silu": (nn.SiLU, lambda x: x / (1 + np.exp(-x))),
    "gelu": (nn.GELU, gelu),
    "gelu by tanh": (lambda: nn.GELU("tanh"), gelu_by_tanh),
}
# y and dx for infinity, minus infinity, and numbers far out
LIMITS = {
    "relu": ([np.inf, 0, 1e4, 0], [1, 0, 1, 0]),
    "leaky relu 0.3": ([np.inf, -np.inf, 1e4, -3e3], [1, 0.3, 1, 0.3]),
    "tanh": ([1, -1, 1, -1], [0, 0, 0, 0]),
    "sigmoid": ([1, 0, 1, 0], [0, 0, 0, 0]),
    "silu": ([np.inf, 0, 1e4, 0], [1, 0, 1, 0]),
    "gelu": ([np.inf, 0, 1e4, 0], [1, 0, 1, 0]),
    "gelu by tanh": ([np.inf, 0, 1e4, 0], [1, 0, 1, 0]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name, order):
    make, formula = LAYERS[name]
    layer, x = make().reuse_buffers(order == "nhwc"), ORDERS[order](3 * away_from_kinks(2, 3, 2, 3))
    np.testing.assert_allclose(layer(x), formula(x), rtol=1e-13, atol=1e-14)
    check_gradients(layer, x)
    assert layer.backward(x, need_dx=False) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes(name, dtype):
    make, formula = LAYERS[name]
    layer, x = make(), randn(1000, dtype=dtype)
    layer.reuse_buffers()
    y, wide = layer(x), make()
    np.testing.assert_allclose(wide(x.astype(F64)), formula(x.astype(F64)), rtol=1e-12, atol=1e-15)
    eps = {8: 1e-12, 4: 1e-6, 2: 0.51 * float(ml_dtypes.finfo(dtype).eps)}[dtype.itemsize]
    if name.startswith("leaky") and dtype.itemsize == 2:
        eps *= 3  # the slope is rounded too
    for got, want in ((y, wide(x.astype(F64))), (layer.backward(x), wide.backward(x.astype(F64)))):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(F64), want, rtol=eps, atol=3e-6 if dtype != F64 else 1e-15)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name, dtype):
    layer = LAYERS[name][0]()
    x = np.array([np.inf, -np.inf, 1e4, -1e4, np.nan, 0.0, -0.0], dtype)
    y, dx = layer(x), layer.backward(np.ones(7, dtype))
    for got, want in ((y, LIMITS[name][0]), (dx, LIMITS[name][1])):
        np.testing.assert_allclose(got[:4], want, rtol=1e-6, atol=1e-40)
    assert np.isnan(y[4])
    assert np.isfinite(dx[5:]).all() and y[5] == y[6] == (0.5 if name == "sigmoid" else 0)


@pytest.mark.parametrize(("dtype", "relative", "absolute"), [(DTYPES[0], 1e-14, 2e-15), (DTYPES[1], 1e-6, 3e-7)])
def test_gelu_is_as_accurate_as_it_says(dtype, relative, absolute):
    x = np.concatenate([np.linspace(-9, 9, 4001), np.linspace(-1e-3, 1e-3, 101), [1e-30]]).astype(dtype)
    layer, want = nn.GELU(), gelu(x)
    y = layer(x).astype(F64)
    np.testing.assert_allclose(y, want, rtol=0, atol=absolute)
    near = x > -5
    np.testing.assert_allclose(y[near], want[near], rtol=relative, atol=0)
    np.testing.assert_allclose(y, want, rtol=4 * relative, atol=0)
    density = np.exp(-(x.astype(F64) ** 2) / 2) / math.sqrt(2 * math.pi)
    share = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(F64)])
    np.testing.assert_allclose(layer.backward(np.ones_like(x)), share + x * density, rtol=0, atol=absolute)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_blocks_do_not_show(name, monkeypatch):
    layer, x = LAYERS[name][0](), randn(1000, dtype=np.float32)
    y, dx = layer(x), layer.backward(x)
    monkeypatch.setattr("kilter.nn.smooth.HOST_BLOCK", 64)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.backward(x), dx)


@pytest.mark.parametrize("name", LAYERS)
def test_other_memory(name):
    layer, x = LAYERS[name][0](), randn(2, 3, 4, 5)
    dy = randn(2, 3, 4, 5, seed=1)
    y, dx = layer(x), layer.backward(dy)
    for other in (nhwc(x), np.asfortranarray(x), np.repeat(x, 2, axis=3)[..., ::2]):
        np.testing.assert_array_equal(layer(other), y)
        for upstream in (dy, nhwc(dy), np.asfortranarray(dy)):
            np.testing.assert_array_equal(layer.backward(upstream), dx)
    assert layer(nhwc(x)).transpose(0, 2, 3, 1).flags.c_contiguous
    assert layer(np.ones((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_steady_loop_allocates_nothing_large(name, dtype):
    layer = LAYERS[name][0]().reuse_buffers()
    x = nhwc(randn(64, 16, 28, 28)).astype(dtype, order="K")
    layer.backward(layer(x))
    tracemalloc.start()
    for count in (64, 40, 64):
        layer(x[:count])
        layer.backward(x[:count])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # the mask of ReLU alone has 40 * 16 * 28 * 28 bytes, half a million


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_keeps_nan(dtype):
    layer = nn.ReLU()
    y = layer(np.array([[-1, 0, 2, np.nan, np.inf, -np.inf]], dtype))
    np.testing.assert_array_equal(y.astype(F64), [[0, 0, 2, np.nan, np.inf, 0]])
    assert y.dtype == dtype
    dx = layer.backward(np.ones((1, 6), dtype))
    np.testing.assert_array_equal(dx.astype(F64), [[0, 0, 1, 0, 1, 0]])
    assert dx.dtype == dtype


X = np.ones((2, 3), np.float32)
BAD = {
    "slope": (lambda: nn.LeakyReLU(1.5), r"negative_slope: expected a number in \[0, 1\], got 1.5"),
    "approximate": (lambda: nn.GELU("erf"), "approximate: expected 'none' or 'tanh', got 'erf'"),
    "no array": (lambda: nn.SiLU()([1.0]), "x: expected a NumPy array, got list"),
    "dtype": (lambda: nn.Tanh()(X.astype(int)), "x: expected dtype float64"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_dy_is_refused(name):
    layer = LAYERS[name][0]()
    with pytest.raises(kilter.KilterError, match="backward: expected a forward of"):
        layer.backward(X)
    layer(X)
    for dy, message in ((X[:1], r"dy: expected shape \(2, 3\)"), (X.astype(F64), "dy: expected dtype float32")):
        with pytest.raises(kilter.KilterError, match=message):
            layer.backward(dy)


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    call, message = BAD[name]
    with pytest.raises(kilter.KilterError, match=message):
        call()
