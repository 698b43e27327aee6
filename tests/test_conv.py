"""Conv2d: values and gradients for every kind of window, dtypes, memory, mistakes."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import kilter
from gradients import F64, ORDERS, check_gradients, nhwc, randn
from kilter import init, nn
from reference_nn import conv2d

F32 = np.dtype(np.float32)
SIXTEEN = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]

# channels in and out, kernel, size of the image, options
SHAPES = {
    "one pixel": (1, 1, 1, (1, 1), {}),
    "one channel": (1, 2, 3, (9, 8), {"padding": 1}),
    "few channels, wide image": (2, 3, 3, (3, 14), {"padding": 1}),
    "many channels": (6, 4, 3, (5, 4), {"padding": 1}),
    "no padding": (3, 2, 3, (5, 6), {}),
    "the kernel fills the image": (2, 3, (3, 4), (3, 4), {}),
    "kernel 1": (4, 3, 1, (3, 5), {}),
    "kernel 1, stride 2": (4, 3, 1, (5, 4), {"stride": 2}),
    "kernel 1, padding": (2, 3, 1, (2, 2), {"padding": 1}),
    "kernel 2": (3, 2, 2, (4, 5), {"padding": 1}),
    "kernel 5": (2, 3, 5, (6, 7), {"padding": 2}),
    "stride 2": (3, 4, 3, (6, 8), {"stride": 2, "padding": 1}),
    "stride 2, odd image": (3, 4, 3, (7, 5), {"stride": 2, "padding": 1}),
    "stride past the kernel": (2, 2, 2, (8, 7), {"stride": 3}),
    "two numbers each": (2, 3, (2, 3), (6, 5), {"stride": (2, 1), "padding": (1, 2)}),
    "padding past the kernel": (2, 3, 2, (3, 3), {"padding": 3}),
    "groups": (4, 6, 3, (4, 5), {"groups": 2, "padding": 1}),
    "groups, stride 2": (4, 6, 3, (5, 5), {"groups": 2, "stride": 2}),
    "groups, kernel 1": (6, 3, 1, (3, 4), {"groups": 3}),
    "depthwise": (4, 4, 3, (4, 6), {"groups": 4, "padding": 1}),
    "no bias": (3, 4, 3, (4, 4), {"padding": 1, "bias": False}),
}


def made(shape, dtype=F64, seed=1):
    ins, outs, kernel, _, options = shape
    layer = nn.Conv2d(ins, outs, kernel, seed=seed, dtype=dtype, **options)
    if "bias" in layer.own_params:
        layer.own_params["bias"][:] = randn(outs, seed=5).astype(dtype)
    return layer


def images(shape, count=3, dtype=F64, seed=0):
    return randn(count, shape[0], *shape[3], seed=seed, dtype=dtype)


def want(layer, x):
    look = layer.window
    params = {name: p.astype(F64) for name, p in layer.own_params.items()}
    return conv2d(x, params["weight"], params.get("bias"), look.stride, look.padding, layer.groups)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name, order):
    layer, x = made(SHAPES[name]).reuse_buffers(order == "nhwc"), ORDERS[order](images(SHAPES[name]))
    np.testing.assert_allclose(layer(x), want(layer, x), rtol=1e-12, atol=1e-12)
    check_gradients(layer, x, tol=2e-7, h=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_without_dx_and_of_a_frozen_layer(name):
    layer, x = made(SHAPES[name]), images(SHAPES[name])
    dy = randn(*layer(x).shape, seed=3)
    dx = layer.backward(dy)
    grads = {n: g.copy() for n, g in layer.grads().items()}
    layer(x)
    assert layer.backward(dy, need_dx=False) is None
    for n, g in layer.grads().items():
        np.testing.assert_allclose(g, grads[n], rtol=1e-12, atol=1e-13)
        g[...] = 7
    layer.freeze()(x)
    np.testing.assert_array_equal(layer.backward(dy), dx)
    assert layer.backward(dy, need_dx=False) is None
    assert all((g == 7).all() for g in layer.own_grads.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [1, 7, 40])
def test_many_images_are_taken_a_few_at_a_time(count, order, monkeypatch):
    monkeypatch.setattr("kilter.nn.windows.HOST_BYTES", 20_000)
    for name in ("many channels", "one channel", "stride 2", "groups", "kernel 1"):
        layer, x = made(SHAPES[name]).reuse_buffers(), ORDERS[order](images(SHAPES[name], count))
        y, dy = layer(x), randn(*layer(x).shape, seed=2)
        np.testing.assert_allclose(y, want(layer, x), rtol=1e-12, atol=1e-12)
        dx, grads = layer.backward(dy).copy(), {n: g.copy() for n, g in layer.grads().items()}
        monkeypatch.setattr("kilter.nn.windows.HOST_BYTES", 1 << 30)
        layer(x)
        np.testing.assert_allclose(dx, layer.backward(dy), rtol=1e-12, atol=1e-12)
        for n, g in layer.grads().items():
            np.testing.assert_allclose(grads[n], g, rtol=1e-12, atol=1e-12)
        monkeypatch.setattr("kilter.nn.windows.HOST_BYTES", 20_000)


@pytest.mark.parametrize("dtype", [F32, *SIXTEEN], ids=str)
@pytest.mark.parametrize("name", ["many channels", "one channel", "stride 2", "groups", "kernel 1", "depthwise"])
def test_short_dtypes_compute_in_float32_and_round_once(name, dtype):
    layer, x = made(SHAPES[name], dtype).reuse_buffers(), images(SHAPES[name], dtype=dtype)
    wide = made(SHAPES[name])
    for n, p in layer.own_params.items():
        wide.own_params[n][...] = p.astype(F64)
    y = layer(x)
    dy = randn(*y.shape, seed=3).astype(dtype)
    exact = {"y": wide(x.astype(F64)), "dx": wide.backward(dy.astype(F64)), **wide.grads()}
    got = {"y": y, "dx": layer.backward(dy), **layer.grads()}
    eps = float(ml_dtypes.finfo(dtype).eps)
    for n, value in exact.items():
        assert got[n].dtype == dtype
        bound = {"rtol": 0.51 * eps, "atol": 2e-5} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(got[n].astype(F64), value, err_msg=n, **bound)


def test_the_outputs_lie_in_memory_as_nhwc():
    layer, x = made(SHAPES["many channels"]), images(SHAPES["many channels"])
    y = layer(x)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    assert layer.backward(y).transpose(0, 2, 3, 1).flags.c_contiguous


def test_other_memory_gives_the_same_bits():
    layer = made(SHAPES["many channels"])
    x = images(SHAPES["many channels"])
    y = layer(nhwc(x))
    dy = randn(*y.shape, seed=3)
    dx = layer.backward(nhwc(dy))
    for other in (x, np.asfortranarray(x), np.repeat(x, 2, axis=3)[..., ::2], x[::-1].copy()[::-1]):
        np.testing.assert_array_equal(layer(other), y)
        for upstream in (dy, np.asfortranarray(dy)):
            np.testing.assert_array_equal(layer.backward(upstream), dx)


def test_reused_buffers_give_the_same_bits_for_batches_of_any_size():
    for name in ("many channels", "one channel", "stride 2", "groups", "kernel 1, stride 2"):
        fresh, kept = made(SHAPES[name]), made(SHAPES[name]).reuse_buffers()
        for count in (4, 2, 4, 9, 1):
            x = images(SHAPES[name], count, seed=count)
            y = fresh(x)
            np.testing.assert_array_equal(kept(x), y)
            np.testing.assert_array_equal(kept.backward(y), fresh.backward(y))
            for n, g in fresh.grads().items():
                np.testing.assert_array_equal(g, kept.grads()[n])


@pytest.mark.parametrize("dtype", [F32, SIXTEEN[0]], ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 4}, {"kernel": 1, "padding": 0}], ids=str)
def test_a_steady_loop_allocates_nothing_large(options, dtype):
    layer = nn.Conv2d(16, 32, **{"kernel": 3, "padding": 1, **options}, seed=0, dtype=dtype).reuse_buffers()
    x = nhwc(randn(64, 16, 14, 14)).astype(dtype, order="K")
    dy = nhwc(np.zeros(layer(x).shape)).astype(dtype, order="K")
    layer.backward(dy)
    tracemalloc.start()
    for count in (64, 40, 64):
        layer(x[:count])
        layer.backward(dy[:count])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # the smallest activation has 40 * 16 * 14 * 14 * 2 bytes, a quarter of a million


def test_no_images():
    for name in ("many channels", "one channel", "stride 2", "kernel 1"):
        layer, x = made(SHAPES[name]), images(SHAPES[name], 0)
        for grad in layer.own_grads.values():
            grad[...] = 7
        assert layer.backward(layer(x)).shape == x.shape
        assert not any(g.any() for g in layer.grads().values())
        layer.backward(layer(x), need_dx=False)


def test_the_weights_are_he_normal_by_default_and_take_other_inits():
    layer = nn.Conv2d(4, 6, (3, 2), groups=2, seed=5, stream=2)
    want = init.he_normal((6, 2, 3, 2), seed=5, stream=2, layout="oihw")
    np.testing.assert_array_equal(layer.params()["weight"], want)
    assert not layer.params()["bias"].any()
    other = nn.Conv2d(4, 6, 3, seed=5, init=init.xavier_uniform, dtype=F64)
    want = init.xavier_uniform((6, 4, 3, 3), seed=5, layout="oihw", dtype=F64)
    np.testing.assert_array_equal(other.params()["weight"], want)


X = np.ones((2, 4, 5, 5), np.float32)
BAD = {
    "channels": (lambda: nn.Conv2d(3, 2, 3, seed=0)(X), r"x: expected shape \(N, 3, H, W\), got \(2, 4, 5, 5\)"),
    "axes": (lambda: nn.Conv2d(4, 2, 3, seed=0)(X[0]), r"x: expected shape \(N, 4, H, W\), got \(4, 5, 5\)"),
    "dtype of x": (lambda: nn.Conv2d(4, 2, 3, seed=0)(X.astype(F64)), "x: expected dtype float32, got float64"),
    "no array": (lambda: nn.Conv2d(4, 2, 3, seed=0)(X.tolist()), "x: expected a NumPy array, got list"),
    "small image": (
        lambda: nn.Conv2d(4, 2, 7, seed=0)(X),
        r"x: expected images of at least the kernel's size \(7, 7\), got \(5, 5\) with the border",
    ),
    "no kernel": (lambda: nn.Conv2d(4, 2, 0, seed=0), "kernel: expected a whole number of at least 1, or two, got 0"),
    "three kernels": (lambda: nn.Conv2d(4, 2, (3, 3, 3), seed=0), "kernel: expected a whole number"),
    "stride": (lambda: nn.Conv2d(4, 2, 3, stride=0, seed=0), "stride: expected a whole number of at least 1"),
    "half a stride": (lambda: nn.Conv2d(4, 2, 3, stride=1.5, seed=0), "stride: expected a whole number"),
    "padding": (lambda: nn.Conv2d(4, 2, 3, padding=-1, seed=0), "padding: expected a whole number of at least 0"),
    "padding in words": (lambda: nn.Conv2d(4, 2, 3, padding="same", seed=0), "padding: .* got 'same'"),
    "groups": (lambda: nn.Conv2d(4, 2, 3, groups=4, seed=0), "groups: expected a divisor of 4 and 2, got 4"),
    "no group": (lambda: nn.Conv2d(4, 2, 3, groups=0, seed=0), "groups: expected a whole number of at least 1, got 0"),
    "no channels": (lambda: nn.Conv2d(0, 2, 3, seed=0), "in_channels: expected a whole number of at least 1, got 0"),
    "no outputs": (lambda: nn.Conv2d(4, 0, 3, seed=0), "out_channels: expected a whole number of at least 1, got 0"),
    "dtype": (lambda: nn.Conv2d(4, 2, 3, seed=0, dtype="int32"), "dtype: expected dtype float64"),
    "dy": (lambda: upstream(X[:, :2, :3, :2]), r"dy: expected shape \(2, 2, 3, 3\), got \(2, 2, 3, 2\)"),
    "dtype of dy": (lambda: upstream(np.ones((2, 2, 3, 3))), "dy: expected dtype float32, got float64"),
    "no forward": (lambda: nn.Conv2d(4, 2, 3, seed=0).backward(X), "backward: expected a forward of Conv2d before it"),
}


def upstream(dy):
    layer = nn.Conv2d(4, 2, 3, seed=0)
    layer(X)
    layer.backward(dy)


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    call, message = BAD[name]
    with pytest.raises(kilter.KilterError, match=message):
        call()
