"""Checks of layers: gradients by central differences, and images in both orders of memory."""

import numpy as np

from kilter import nn

F64 = np.float64


def randn(*shape, seed=0, dtype=F64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def away_from_kinks(*shape, seed=0):
    """Normals with a gap around 0, as far apart from each other as a step of the differences needs."""
    x = randn(*shape, seed=seed)
    return x + 0.1 * np.sign(x)


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


def check_gradients(model, x, tol=1e-7, h=1e-6):
    """Compare dx and the gradients of all parameters with central differences of sum(r * y)."""
    dropouts = [m for _, m in model.modules() if isinstance(m, nn.Dropout)]

    def forward():
        for layer in dropouts:
            layer.calls = 0  # the same masks each time
        return model(x)

    r = randn(*forward().shape, seed=9)
    dx = model.backward(r).copy()
    assert dx.shape == x.shape
    grads = {name: g.copy() for name, g in model.grads().items()}
    np.testing.assert_allclose(dx, central(lambda: (r * forward()).sum(), x, h), rtol=tol, atol=tol)
    assert grads.keys() == model.params().keys()
    for name, p in model.params().items():
        want = central(lambda: (r * forward()).sum(), p, h)
        np.testing.assert_allclose(grads[name], want, rtol=tol, atol=tol, err_msg=name)


def nhwc(x):
    """The same images (N, C, H, W), in memory as (N, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


ORDERS = {"nchw": np.ascontiguousarray, "nhwc": nhwc}
