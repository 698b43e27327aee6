"""Layers: gradients by central differences, dtypes, and what each one promises."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest

import kilter
from gradients import F64, away_from_kinks, check_gradients, nhwc, randn
from kilter import init, nn, norm
from kilter.nn import norms

SIXTEEN = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def relu_batch_norm(**kwargs):
    layer = nn.BatchNorm(3, activation="relu", dtype=F64, **kwargs)
    layer.own_params["beta"] += 0.3
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3, seed=1, dtype=F64), (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False, seed=1, dtype=F64), (5, 4)),
    "linear, one sample": (lambda: nn.Linear(4, 3, seed=1, dtype=F64), (1, 4)),
    "batch norm": (lambda: nn.BatchNorm(3, dtype=F64), (5, 3)),
    "batch norm of images": (lambda: nn.BatchNorm(3, dtype=F64), (2, 3, 2, 2)),
    "batch norm, channels last": (lambda: nn.BatchNorm(3, axis=-1, dtype=F64), (2, 2, 2, 3)),
    "batch norm, no affine": (lambda: nn.BatchNorm(3, affine=False, dtype=F64), (5, 3)),
    "batch norm, relu": (relu_batch_norm, (5, 3)),
    "batch norm, eval": (lambda: nn.BatchNorm(3, dtype=F64).eval(), (5, 3)),
    "batch norm, relu, eval": (lambda: relu_batch_norm().eval(), (5, 3)),
    "layer norm": (lambda: nn.LayerNorm(4, dtype=F64), (5, 4)),
    "layer norm of images": (lambda: nn.LayerNorm((3, 2, 2), dtype=F64), (2, 3, 2, 2)),
    "layer norm, no affine": (lambda: nn.LayerNorm(4, affine=False, dtype=F64), (5, 4)),
    "layer norm, eval": (lambda: nn.LayerNorm(4, dtype=F64).eval(), (5, 4)),
    "layer norm of channels": (lambda: nn.LayerNorm(4, axis=1, dtype=F64), (2, 4, 2, 3)),
    "RMS norm of channels": (lambda: nn.RMSNorm(4, axis=1, dtype=F64), (2, 4, 2, 3)),
    "RMS norm": (lambda: nn.RMSNorm(4, dtype=F64), (2, 3, 4)),
    "RMS norm, no affine": (lambda: nn.RMSNorm(4, affine=False, dtype=F64), (5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4, dtype=F64), (3, 4, 2, 2)),
    "instance norm": (lambda: nn.InstanceNorm(3, dtype=F64), (2, 3, 2, 2)),
    "dropout": (lambda: nn.Dropout(0.4, seed=3), (5, 3)),
    "dropout, eval": (lambda: nn.Dropout(0.4, seed=3).eval(), (5, 3)),
    "flatten": (nn.Flatten, (2, 3, 2)),
    "flatten images": (nn.Flatten, (2, 3, 2, 2)),
    "sequential": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4, seed=1, dtype=F64), nn.ReLU()),
        (3, 2, 3),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reuse", [False, True])
def test_gradients_of_each_layer(name, reuse):
    make, shape = LAYERS[name]
    check_gradients(make().reuse_buffers(reuse), away_from_kinks(*shape))


IMAGES = [name for name, (_, shape) in LAYERS.items() if len(shape) == 4 and "channels last" not in name]


@pytest.mark.parametrize("name", IMAGES)
def test_images_in_both_orders_of_memory(name):
    make, shape = LAYERS[name]
    x = away_from_kinks(*shape)
    layer = make().reuse_buffers()
    y = layer(x).copy()
    dy = randn(*y.shape, seed=2)
    dx = layer.backward(dy).copy()
    np.testing.assert_allclose(layer(nhwc(x)), y, rtol=1e-13, atol=1e-14)
    for upstream in (dy, nhwc(dy) if dy.ndim == 4 else dy):
        np.testing.assert_allclose(layer.backward(upstream), dx, rtol=1e-11, atol=1e-12)
    if name != "layer norm of images":  # whose rows lie in C order
        assert layer.backward(dy).transpose(0, 2, 3, 1).flags.c_contiguous  # as x does


def test_a_composite_of_attributes_has_dotted_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, seed=0, dtype=F64)
            self.second = nn.Sequential(nn.Linear(3, 2, seed=1, dtype=F64), nn.BatchNorm(2, dtype=F64))

        def forward(self, x):
            return self.second(self.first(x))

        def backward(self, dy, *, need_dx=True):
            return self.first.backward(self.second.backward(dy), need_dx=need_dx)

    model = Twice()
    assert list(model.params()) == [
        "first.weight",
        "first.bias",
        "second.0.weight",
        "second.0.bias",
        "second.1.gamma",
        "second.1.beta",
    ]
    assert "second.1.running.mean" in model.state_dict()
    check_gradients(model, randn(5, 3))


# ---- Linear


def test_linear_is_he_normal_by_default_and_takes_other_inits():
    layer = nn.Linear(30, 20, seed=5, stream=2)
    np.testing.assert_array_equal(layer.params()["weight"], init.he_normal((30, 20), seed=5, stream=2, layout="io"))
    assert not layer.params()["bias"].any()
    other = nn.Linear(30, 20, seed=5, stream=2, init=init.xavier_uniform)
    np.testing.assert_array_equal(other.params()["weight"], init.xavier_uniform((30, 20), seed=5, stream=2))


INITS = [name for name in init.__all__ if name not in ("fans", "gain")]


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_initialiser_fills_the_weights_of_layers(name, dtype):
    fill = getattr(init, name)
    told = {"seed": 3, "stream": 1, "dtype": dtype}
    fans = {} if name in ("uniform", "normal", "truncated_normal") else {"layout": "oihw"}
    dense, conv = (
        nn.Linear(6, 4, seed=3, stream=1, init=fill, dtype=dtype),
        nn.Conv2d(2, 4, 3, seed=3, stream=1, init=fill, dtype=dtype),
    )
    np.testing.assert_array_equal(dense.params()["weight"], fill((6, 4), **told))
    np.testing.assert_array_equal(conv.params()["weight"], fill((4, 2, 3, 3), **told, **fans))


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear, (3, 4)), (nn.Conv2d, (3, 4, 3))], ids=["linear", "conv"])
def test_an_initialiser_is_a_function(layer, shape):
    with pytest.raises(kilter.KilterError, match="init: expected a function"):
        layer(*shape, seed=0, init="he_normal")


def test_a_weight_in_column_order_has_a_gradient_in_row_order():
    layer = nn.Linear(5, 4, seed=0, init=lambda shape, **_: np.asfortranarray(randn(*shape)), dtype=F64)
    x, dy = randn(3, 5, seed=1), randn(3, 4, seed=2)
    np.testing.assert_allclose(layer(x), x @ layer.own_params["weight"])
    np.testing.assert_allclose(layer.backward(dy), dy @ layer.own_params["weight"].T)
    np.testing.assert_allclose(layer.own_grads["weight"], x.T @ dy)


def test_options_of_initialisers_are_fixed_by_partial():
    layer = nn.Linear(6, 4, seed=3, init=partial(init.normal, std=0.01))
    np.testing.assert_array_equal(layer.params()["weight"], init.normal((6, 4), std=0.01, seed=3))


@pytest.mark.parametrize("wrong", [(5, 3), (8, 2), (8,)], ids=str)
def test_linear_refuses_gradients_of_other_batches(wrong):
    """Also those that fitted a batch before."""
    layer = nn.Linear(4, 3, seed=0).reuse_buffers()
    for n in (5, 8):
        layer.backward(layer(randn(n, 4, dtype=np.float32)).copy())
    with pytest.raises(kilter.KilterError, match=r"^dy: "):
        layer.backward(randn(*wrong, dtype=np.float32))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("reuse", [False, True])
def test_sixteen_bit_linear_rounds_once(dtype, reuse):
    layer = nn.Linear(50, 20, seed=0, dtype=dtype).reuse_buffers(reuse)
    layer.params()["bias"][:] = randn(20, seed=4).astype(dtype)
    x, dy = randn(9, 50, dtype=dtype), randn(9, 20, seed=2, dtype=dtype)
    y, dx = layer(x), layer.backward(dy)
    wide = {name: p.astype(F64) for name, p in layer.params().items()}
    exact = {
        "y": x.astype(F64) @ wide["weight"] + wide["bias"],
        "dx": dy.astype(F64) @ wide["weight"].T,
        "weight": x.astype(F64).T @ dy.astype(F64),
        "bias": dy.astype(F64).sum(0),
    }
    got = {"y": y, "dx": dx, **layer.grads()}
    eps = float(ml_dtypes.finfo(dtype).eps)
    for name, value in exact.items():
        assert got[name].dtype == dtype
        # half an ulp for the one rounding, and the float32 error of sums that cancel
        np.testing.assert_allclose(got[name].astype(F64), value, rtol=0.51 * eps, atol=2e-5, err_msg=name)


def test_float16_overflow_is_inf_without_a_warning():
    layer = nn.Linear(2, 1, bias=False, seed=0, dtype=np.float16)
    layer.params()["weight"][:] = 60000
    assert np.isinf(layer(np.full((1, 2), 1.5, np.float16))).all()


# ---- BatchNorm


def test_batch_norm_updates_running_statistics_in_training_alone():
    layer = nn.BatchNorm(1, momentum=0.1, dtype=F64)
    x = np.array([[2.0], [4.0], [6.0], [8.0]])
    layer(x)
    assert layer.running.mean[0] == pytest.approx(0.5)
    assert layer.running.var[0] == pytest.approx(1.566666666667)
    before = layer.state_dict()
    layer.eval()(x)
    layer.train().freeze()(x)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_batch_norm_keeps_arithmetic_parameters_for_sixteen_bit_data():
    model = nn.mlp(6, 4, hidden=(8,), dtype=ml_dtypes.bfloat16)
    assert model.params()["1.weight"].dtype == ml_dtypes.bfloat16
    assert model.params()["2.gamma"].dtype == np.float32
    assert model[2].running.mean.dtype == np.float32
    y = model(randn(5, 6, dtype=ml_dtypes.bfloat16))
    assert y.dtype == ml_dtypes.bfloat16
    assert model.backward(y).dtype == ml_dtypes.bfloat16


# ---- LayerNorm, RMSNorm


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_channels_is_that_of_the_last_axis(kind):
    last, channels, x = kind(4, dtype=F64), kind(4, axis=1, dtype=F64), randn(2, 3, 5, 4)
    np.testing.assert_array_equal(channels(np.moveaxis(x, -1, 1)), np.moveaxis(last(x), -1, 1))
    two = randn(5, 4)
    np.testing.assert_array_equal(channels(two), last(two))


# ---- Residual


def body(last, **options):
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, seed=0, dtype=F64), nn.ReLU(), nn.Conv2d(2, 2, 1, seed=1, dtype=F64), *last
    )


STEADY = {
    "f32": ({"activation": "relu"}, np.float32, (6, 3)),
    "f64, planes": ({}, F64, (4, 3, 5, 2)),
    "bfloat16": ({"activation": "relu"}, SIXTEEN[1], (6, 3)),
    "no affine": ({"affine": False}, np.float32, (6, 3)),
    "channels last": ({"axis": -1}, np.float32, (2, 5, 3)),
    "cumulative": ({"momentum": None}, np.float32, (6, 3)),
    "schedule": ({"momentum": lambda k: 1 / (k + 2)}, np.float32, (6, 3)),
}
CHANGES = {
    "none": lambda layer: layer,
    "eps": lambda layer: setattr(layer, "eps", 0.5),
    "momentum": lambda layer: setattr(layer.running, "momentum", 0.4),
    "unbiased": lambda layer: setattr(layer.running, "unbiased", False),
    "activation": lambda layer: setattr(layer, "activation", None),
    "frozen": lambda layer: layer.freeze(),
    "thawed": lambda layer: layer.thaw(),
    "eval": lambda layer: layer.eval(),
    "train": lambda layer: layer.train(),
    "reset": lambda layer: layer.running.reset(),
    "other statistics": lambda layer: setattr(layer.running, "mean", layer.running.mean + 1),
    "loaded": lambda layer: layer.load_state_dict({n: np.ones_like(v) for n, v in layer.state_dict().items()}),
    "converted": lambda layer: layer.to(layer.running.var.dtype),
    "fresh buffers": lambda layer: layer.reuse_buffers(layer.reuses_buffers),
}


@pytest.mark.parametrize("name", STEADY)
def test_batch_norm_over_the_same_arrays_is_that_over_fresh_ones(name):
    """Whatever changes between the steps, the arrays that stay included."""
    options, dtype, shape = STEADY[name]
    fresh, kept = (nn.BatchNorm(3, dtype=dtype, **options) for _ in range(2))
    kept.reuse_buffers()
    x, dy = np.empty(shape, dtype), np.empty(shape, dtype)
    for step, (change, part) in enumerate((c, p) for c in CHANGES for p in (slice(None), slice(None), slice(0, 2))):
        x[...], dy[...] = randn(*shape, seed=2 * step).astype(dtype), randn(*shape, seed=2 * step + 1).astype(dtype)
        seen = []
        for layer in (fresh, kept):
            if part == slice(None):
                CHANGES[change](layer)
            some = (x, dy) if part == slice(None) else (x[part], dy[part])
            seen.append([layer(some[0]).copy(), layer.backward(some[1]).copy(), *layer.grads().values()])
            seen[-1] += [layer.running.state_dict()[n] for n in ("mean", "var", "count", "updates")]
            seen[-1] += [] if not layer.training or layer.frozen else list(layer.moments)
        for one, other in zip(*seen, strict=True):
            np.testing.assert_array_equal(np.asarray(one, F64), np.asarray(other, F64), err_msg=change)


def test_a_fused_residual_over_the_same_arrays():
    fresh, kept = (nn.Residual(nn.Sequential(nn.BatchNorm(3, dtype=F64)), activation="relu") for _ in range(2))
    kept.reuse_buffers()
    x, dy = randn(6, 3), randn(6, 3, seed=1)
    for _ in range(3):
        np.testing.assert_array_equal(kept(x), fresh(x))
        np.testing.assert_array_equal(kept.backward(dy), fresh.backward(dy))
        x += 1


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[:]], ids=["itself", "a view"])
def test_the_gradient_of_batch_norm_may_be_its_next_upstream(view):
    fresh, kept, x = nn.BatchNorm(3, dtype=F64), nn.BatchNorm(3, dtype=F64).reuse_buffers(), randn(6, 3)
    one, other = (layer.backward(layer(x).copy()) for layer in (fresh, kept))
    for _ in range(3):
        one, other = fresh.backward(one), kept.backward(view(other))
        np.testing.assert_array_equal(one, other)


def test_steady_batch_norm_looks_at_its_arguments_once(monkeypatch):
    calls = []
    for function in ("batch_norm", "batch_norm_backward"):
        real = getattr(norms, function)
        monkeypatch.setattr(norms, function, lambda *a, real=real, **k: calls.append(real) or real(*a, **k))
    layer, x, dy = nn.BatchNorm(3).reuse_buffers(), randn(4, 3, dtype=np.float32), randn(4, 3, dtype=np.float32)
    for _ in range(3):
        layer(x)
        layer.backward(dy)
    assert len(calls) == 2


@pytest.mark.parametrize("place", ["own", "strided"])
@pytest.mark.parametrize("scale", [1.0, 1e37])
def test_steady_batch_norm_rounds_its_gradients_once_wherever_they_lie(place, scale):
    """Float64 sums, those past float32 as inf and without a warning."""
    layer, x = nn.BatchNorm(3).reuse_buffers(), randn(64, 3, dtype=np.float32)
    dy = np.abs(randn(64, 3, seed=1)).astype(np.float32) * np.float32(scale)
    if place == "strided":
        layer.own_grads.update({name: np.zeros(6, np.float32)[::2] for name in layer.own_grads})
    for _ in range(3):
        x[...] += 1
        layer(x)
        found = norm.batch_norm_backward(dy, layer.cache())
        layer.backward(dy)
        np.testing.assert_array_equal(layer.own_grads["gamma"], found.dgamma)
        np.testing.assert_array_equal(layer.own_grads["beta"], found.dbeta)
    assert np.isinf(found.dbeta).all() == (scale > 1)


RESIDUALS = {
    "plain": lambda: nn.Residual(body([])),
    "relu": lambda: nn.Residual(body([]), activation="relu"),
    "fused": lambda: nn.Residual(body([nn.BatchNorm(2, dtype=F64)]), activation="relu"),
    "fused sum": lambda: nn.Residual(body([nn.BatchNorm(2, dtype=F64)])),
    "a norm with its own relu": lambda: nn.Residual(body([nn.BatchNorm(2, activation="relu", dtype=F64)])),
    "eval": lambda: nn.Residual(body([nn.BatchNorm(2, dtype=F64)]), activation="relu").eval(),
    "shortcut": lambda: nn.Residual(
        body([nn.BatchNorm(2, dtype=F64)]), nn.Conv2d(2, 2, 1, seed=2, dtype=F64), activation="relu"
    ),
    "norm alone": lambda: nn.Residual(nn.Sequential(nn.BatchNorm(2, dtype=F64)), activation="relu"),
    "no layers": lambda: nn.Residual(nn.Sequential()),
    "a layer": lambda: nn.Residual(nn.Tanh()),
    "in each other": lambda: nn.Residual(nn.Residual(nn.SiLU(), nn.Tanh()), activation="relu"),
}


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("name", RESIDUALS)
def test_gradients_of_residuals(name, reuse):
    layer, x = RESIDUALS[name]().reuse_buffers(reuse), away_from_kinks(3, 2, 3, 3)
    check_gradients(layer, x, tol=1e-6)
    dy = randn(*layer(x).shape)
    layer.backward(dy)
    grads = {n: g.copy() for n, g in layer.grads().items()}
    layer(x)
    assert layer.backward(dy, need_dx=False) is None
    for n, g in layer.grads().items():
        np.testing.assert_array_equal(g, grads[n])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_fused_residual_is_the_sum_in_steps(activation):
    layer, x = nn.Residual(body([nn.BatchNorm(2, dtype=F64)]), activation=activation), randn(4, 2, 3, 3)
    want = body([nn.BatchNorm(2, dtype=F64)])(x) + x
    np.testing.assert_allclose(layer(x), want if activation is None else np.maximum(want, 0), rtol=1e-13, atol=1e-14)
    assert list(layer.params()) == [
        *(f"body.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")),
        *(f"body.3.{n}" for n in ("gamma", "beta")),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Residual(3), "body: expected a Module, got int"),
        (lambda: nn.Residual(nn.ReLU(), len), "shortcut: expected a Module, got builtin_function"),
        (lambda: nn.Residual(nn.ReLU(), activation="tanh"), "activation: expected None or 'relu', got 'tanh'"),
        (
            lambda: nn.Residual(nn.MaxPool2d(2))(randn(1, 1, 4, 4)),
            r"shortcut: expected float64 of shape \(1, 1, 2, 2\)",
        ),
        (lambda: nn.Residual(nn.ReLU()).backward(randn(1)), "backward: expected a forward of ReLU before it"),
    ],
)
def test_mistakes_of_residuals(make, message):
    with pytest.raises(kilter.KilterError, match=message):
        make()


# ---- Dropout


@pytest.mark.parametrize("dtype", [F64, np.dtype(np.float32), *SIXTEEN], ids=str)
def test_dropout_scales_what_it_keeps(dtype):
    layer = nn.Dropout(0.25, seed=7)
    x = np.ones((100, 100), dtype)
    y = layer(x)
    assert set(np.unique(y.astype(F64))) == {0.0, float(np.dtype(dtype).type(4 / 3))}
    assert abs((y == 0).mean() - 0.25) < 0.02
    np.testing.assert_array_equal(layer.backward(x).astype(F64), y.astype(F64))


def test_dropout_masks_are_a_function_of_seed_stream_and_call():
    x = np.ones((40, 30), np.float32)
    layer = nn.Dropout(0.5, seed=7, stream=3)
    first, second = layer(x), layer(x)
    assert (first != second).any()
    for seed, stream in ((8, 3), (7, 4)):
        assert (nn.Dropout(0.5, seed=seed, stream=stream)(x) != first).any()
    again = nn.Dropout(0.5, seed=7, stream=3)
    again.load_state_dict({"calls": 1})
    np.testing.assert_array_equal(again(x), second)
    assert layer.state_dict() == {"calls": 2}


def test_dropout_is_the_identity_in_eval_and_for_p_0():
    x = randn(3, 4)
    layer = nn.Dropout(0.5, seed=0).eval()
    assert layer(x) is x
    assert layer.backward(x) is x
    assert layer.calls == 0
    assert nn.Dropout(0.0, seed=0)(x) is x
