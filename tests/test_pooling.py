"""Pooling layers: values and gradients, in both orders of memory, dtypes, ties, mistakes."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import kilter
from gradients import F64, ORDERS, check_gradients, nhwc, randn
from kilter import nn
from reference_nn import avg_pool2d, max_pool2d

DTYPES = [np.dtype(t) for t in (F64, np.float32, np.float16, ml_dtypes.bfloat16)]
POOLS = {nn.MaxPool2d: max_pool2d, nn.AvgPool2d: avg_pool2d}

WINDOWS = {  # kernel, stride, padding, size of the image
    "tiles": (2, None, 0, (4, 6)),
    "tiles of two sizes": ((3, 1), None, 0, (6, 3)),
    "a rest": (2, None, 0, (5, 7)),
    "overlap": (3, 2, 1, (7, 6)),
    "overlap, odd": (3, 1, 0, (5, 4)),
    "gaps": (2, 3, 0, (8, 7)),
    "border": (2, 2, 1, (4, 5)),
    "two numbers": ((2, 3), (1, 2), (1, 0), (4, 7)),
    "the whole image": ((4, 3), None, 0, (4, 3)),
    "kernel 1": (1, 1, 0, (3, 3)),
    "kernel 1, stride 2": (1, 2, 0, (4, 5)),
}


def made(pool, name):
    kernel, stride, padding, size = WINDOWS[name]
    return pool(kernel, stride, padding), size


def apart(*shape, dtype=F64, seed=0):
    """Values that differ by more than a step of the differences, and stay different in 16 bit."""
    count = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(count).reshape(shape) / 8 - count / 16).astype(dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("pool", POOLS)
def test_values_and_gradients(pool, name, order):
    layer, size = made(pool, name)
    x = ORDERS[order](apart(2, 3, *size))
    look = layer.reuse_buffers(order == "nhwc").window
    np.testing.assert_allclose(layer(x), POOLS[pool](x, look.kernel, look.stride, look.padding), rtol=1e-14, atol=1e-14)
    check_gradients(layer, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tiles", "overlap"])
@pytest.mark.parametrize("pool", POOLS)
def test_dtypes(pool, name, dtype):
    layer, size = made(pool, name)
    x = apart(2, 2, *size, dtype=dtype)
    y, wide = layer(x), made(pool, name)[0]
    dy = randn(*y.shape, dtype=dtype)
    eps = 0.51 * float(ml_dtypes.finfo(dtype).eps) if dtype.itemsize == 2 else 1e-6
    for got, want in ((y, wide(x.astype(F64))), (layer.backward(dy), wide.backward(dy.astype(F64)))):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(F64), want, rtol=eps, atol=1e-6)


def test_the_border_never_wins():
    x = np.full((1, 1, 3, 3), -5.0)
    assert (nn.MaxPool2d(3, 2, 1)(x) == -5).all()
    np.testing.assert_allclose(nn.AvgPool2d(3, 2, 1)(x), np.full((1, 1, 2, 2), -20 / 9))  # its zeros count


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1)])
def test_of_equal_values_one_gets_the_gradient(kernel, stride, padding):
    layer = nn.MaxPool2d(kernel, stride, padding)
    y = layer(np.zeros((1, 2, 4, 4)))
    assert layer.backward(np.ones(y.shape)).sum() == y.size
    layer = nn.MaxPool2d(2)
    layer(np.array([[[[1.0, 3.0], [3.0, 3.0]]]]))
    np.testing.assert_array_equal(layer.backward(np.ones((1, 1, 1, 1))), [[[[0, 0], [1, 0]]]])


def test_nan_and_infinity_come_through():
    x = np.array([[[[1.0, np.nan, np.inf, 2.0], [0.0, 1.0, 3.0, -np.inf]]]])
    np.testing.assert_array_equal(nn.MaxPool2d(2)(x), [[[[np.nan, np.inf]]]])
    layer = nn.MaxPool2d(2)
    layer(x)
    assert np.isfinite(layer.backward(np.ones((1, 1, 1, 2)))).all()


def test_outputs_keep_the_order_in_memory():
    x = apart(2, 3, 4, 4)
    for layer in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1)):
        assert layer(x).flags.c_contiguous
        assert layer.backward(layer(x)).flags.c_contiguous
        assert layer(nhwc(x)).transpose(0, 2, 3, 1).flags.c_contiguous
        assert layer.backward(layer(nhwc(x))).transpose(0, 2, 3, 1).flags.c_contiguous
    assert nn.GlobalAvgPool2d()(nhwc(x)).flags.c_contiguous


@pytest.mark.parametrize("order", ORDERS)
def test_the_global_mean(order):
    layer, x = nn.GlobalAvgPool2d(), ORDERS[order](randn(3, 4, 2, 5))
    np.testing.assert_allclose(layer(x), x.mean(axis=(2, 3)), rtol=1e-14)
    check_gradients(layer, x)
    assert layer.backward(layer(x), need_dx=False) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_global_mean(dtype):
    layer, x = nn.GlobalAvgPool2d().reuse_buffers(), randn(2, 3, 40, 30).astype(dtype)
    y = layer(x)
    dx = layer.backward(y)
    assert y.dtype == dx.dtype == dtype
    eps = 0.51 * float(ml_dtypes.finfo(dtype).eps) if dtype.itemsize == 2 else 1e-6
    np.testing.assert_allclose(y.astype(F64), x.astype(F64).mean(axis=(2, 3)), rtol=eps, atol=1e-7)
    share = np.broadcast_to(y.astype(F64)[:, :, None, None] / 1200, x.shape)
    np.testing.assert_allclose(dx.astype(F64), share, rtol=2 * eps, atol=1e-7)


def test_no_images():
    x = np.ones((0, 2, 4, 4))
    for layer in (nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1), nn.GlobalAvgPool2d()):
        assert layer.backward(layer(x)).shape == x.shape


def test_a_steady_loop_allocates_nothing_large():
    x = nhwc(randn(64, 16, 28, 28)).astype(np.float32, order="K")
    for layer in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.GlobalAvgPool2d()):
        layer.reuse_buffers()
        dy = layer(x).copy(order="K")
        layer.backward(dy)
        tracemalloc.start()
        for count in (64, 40, 64):
            layer(x[:count])
            layer.backward(dy[:count])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000  # the smallest mask of a window has 40 * 16 * 14 * 14 bytes


X = np.ones((2, 3, 4, 4), np.float32)
BAD = {
    "kernel": (lambda: nn.MaxPool2d(0), "kernel: expected a whole number of at least 1, or two, got 0"),
    "stride": (lambda: nn.AvgPool2d(2, 0), "stride: expected a whole number of at least 1"),
    "padding": (lambda: nn.MaxPool2d(2, 2, 2), r"padding: expected at most half the kernel \(2, 2\), got \(2, 2\)"),
    "no padding": (lambda: nn.MaxPool2d(2, 2, -1), "padding: expected a whole number of at least 0"),
    "image": (lambda: nn.MaxPool2d(5)(X), r"x: expected images of at least the kernel's size \(5, 5\), got \(4, 4\)"),
    "axes": (lambda: nn.AvgPool2d(2)(X[0]), r"x: expected shape \(N, C, H, W\), got \(3, 4, 4\)"),
    "dtype": (lambda: nn.MaxPool2d(2)(X.astype(int)), "x: expected dtype float64"),
    "dy": (lambda: upstream(nn.MaxPool2d(2), X), r"dy: expected shape \(2, 3, 2, 2\), got \(2, 3, 4, 4\)"),
    "dtype of dy": (lambda: upstream(nn.AvgPool2d(4), np.ones((2, 3, 1, 1))), "dy: expected dtype float32"),
    "dy of the mean": (lambda: upstream(nn.GlobalAvgPool2d(), X), r"dy: expected shape \(2, 3\), got"),
    "no positions": (lambda: nn.GlobalAvgPool2d()(X[:, :, :0]), "x: expected at least one position"),
    "no forward": (lambda: nn.MaxPool2d(2).backward(X), "backward: expected a forward of MaxPool2d before it"),
}


def upstream(layer, dy):
    layer(X)
    layer.backward(dy)


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    call, message = BAD[name]
    with pytest.raises(kilter.KilterError, match=message):
        call()
