"""Layers and losses: gradients by central differences, dtypes, buffers, state."""

import copy
import pickle
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import kilter
from kilter import init, nn

F64 = np.float64
SIXTEEN = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


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


def check_gradients(model, x, tol=1e-7):
    """Compare dx and the gradients of all parameters with central differences of sum(r * y)."""
    dropouts = [m for _, m in model.modules() if isinstance(m, nn.Dropout)]

    def forward():
        for layer in dropouts:
            layer.calls = 0  # the same masks each time
        return model(x)

    r = randn(*forward().shape, seed=9)
    dx = model.backward(r)
    grads = {name: g.copy() for name, g in model.grads().items()}
    np.testing.assert_allclose(dx, central(lambda: (r * forward()).sum(), x), rtol=tol, atol=tol)
    assert grads.keys() == model.params().keys()
    for name, p in model.params().items():
        want = central(lambda: (r * forward()).sum(), p)
        np.testing.assert_allclose(grads[name], want, rtol=tol, atol=tol, err_msg=name)


def away_from_kinks(*shape, seed=0):
    x = randn(*shape, seed=seed)
    return x + 0.1 * np.sign(x)


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
    "RMS norm": (lambda: nn.RMSNorm(4, dtype=F64), (2, 3, 4)),
    "RMS norm, no affine": (lambda: nn.RMSNorm(4, affine=False, dtype=F64), (5, 4)),
    "relu": (nn.ReLU, (5, 3)),
    "dropout": (lambda: nn.Dropout(0.4, seed=3), (5, 3)),
    "dropout, eval": (lambda: nn.Dropout(0.4, seed=3).eval(), (5, 3)),
    "flatten": (nn.Flatten, (2, 3, 2)),
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


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "rms", "none"])
def test_the_whole_model_against_finite_differences(norm):
    model = nn.mlp(6, 4, hidden=(8, 5), norm=norm, seed=3, dtype=F64)
    x, y = randn(7, 2, 3), np.array([0, 3, 1, 2, 2, 0, 1])

    def f():
        return nn.softmax_cross_entropy(model(x), y, label_smoothing=0.1)[0]

    _, dlogits = nn.softmax_cross_entropy(model(x), y, label_smoothing=0.1)
    dx = model.backward(dlogits)
    grads = {name: g.copy() for name, g in model.grads().items()}
    assert len(grads) == {"batch": 8, "layer": 10, "group": 10, "rms": 8, "none": 6}[norm]
    for name, p in model.params().items():
        np.testing.assert_allclose(grads[name], central(f, p, 1e-5), rtol=1e-6, atol=1e-8, err_msg=name)
    np.testing.assert_allclose(dx, central(f, x, 1e-5), rtol=1e-6, atol=1e-8)


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


# ---- ReLU, Dropout


@pytest.mark.parametrize("dtype", [F64, np.dtype(np.float32), *SIXTEEN], ids=str)
def test_relu_keeps_nan(dtype):
    layer = nn.ReLU()
    y = layer(np.array([[-1, 0, 2, np.nan, np.inf, -np.inf]], dtype))
    np.testing.assert_array_equal(y.astype(F64), [[0, 0, 2, np.nan, np.inf, 0]])
    assert y.dtype == dtype
    dx = layer.backward(np.ones((1, 6), dtype))
    np.testing.assert_array_equal(dx.astype(F64), [[0, 0, 1, 0, 1, 0]])
    assert dx.dtype == dtype


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


# ---- containers, freezing, modes


def test_sequential_is_a_sequence():
    layers = nn.Linear(2, 2, seed=0), nn.ReLU()
    model = nn.Sequential(*layers)
    assert len(model) == 2
    assert tuple(model) == layers
    assert model[1] is layers[1]


def test_train_and_eval_reach_every_layer():
    model = nn.mlp(4, 2, hidden=(3,), dropout=0.5)
    assert model.eval() is model
    assert not any(m.training for _, m in model.modules())
    assert all(m.training for _, m in model.train().modules())


def test_frozen_layers_have_no_parameters_to_train_but_keep_their_state():
    model = nn.mlp(4, 2, hidden=(3,), dtype=F64)
    everything = set(model.params())
    model[1].freeze()
    assert set(model.params()) == set(model.grads()) == everything - {"1.weight"}
    assert everything <= set(model.state_dict())
    x = randn(5, 4)
    before = model[1].own_grads["weight"].copy()
    y = model(x)
    assert model.backward(y).shape == x.shape
    np.testing.assert_array_equal(model[1].own_grads["weight"], before)
    model.thaw()
    assert set(model.params()) == everything


def test_backward_without_dx_gives_the_same_gradients():
    model = nn.mlp(6, 3, hidden=(5,), dtype=F64)
    x = randn(4, 2, 3)
    dy = randn(4, 3, seed=1)
    model(x)
    model.backward(dy)
    full = {name: g.copy() for name, g in model.grads().items()}
    model(x)
    assert model.backward(dy, need_dx=False) is None
    for name, g in model.grads().items():
        np.testing.assert_array_equal(g, full[name])


def test_gradients_and_parameters_are_stable_arrays():
    model = nn.mlp(6, 3, hidden=(5,))
    params, grads = model.params(), model.grads()
    for seed in range(2):
        model.backward(model(randn(4, 6, seed=seed, dtype=np.float32)))
    model.load_state_dict(model.state_dict())
    for before, after in ((params, model.params()), (grads, model.grads())):
        assert all(after[name] is value for name, value in before.items())


# ---- buffers


def test_reused_buffers_give_the_same_bits_for_batches_of_any_size():
    fresh, kept = (nn.mlp(6, 3, hidden=(5, 4), dropout=0.3, seed=1) for _ in range(2))
    kept.reuse_buffers(True)
    for n in (8, 5, 8, 12, 1000):
        x, dy = randn(n, 6, seed=n, dtype=np.float32), randn(n, 3, seed=n + 1, dtype=np.float32)
        for model in (fresh, kept):
            model.result = model(x), model.backward(dy)
        for a, b in zip(fresh.result, kept.result, strict=True):
            np.testing.assert_array_equal(a, b)
        for name, g in fresh.grads().items():
            np.testing.assert_array_equal(g, kept.grads()[name])


def test_outputs_are_fresh_unless_buffers_are_reused():
    model = nn.mlp(6, 3, hidden=(5,))
    x = randn(4, 6, dtype=np.float32)
    assert not np.shares_memory(model(x), model(x))
    model.reuse_buffers(True)
    assert model(x) is model(x)
    assert model.reuse_buffers(False)(x) is not model(x)


def test_a_steady_loop_allocates_nothing_large():
    model = nn.mlp(200, 10, hidden=(300, 200), dropout=0.2).reuse_buffers(True)
    plain = nn.mlp(200, 10, hidden=(300, 200), norm="none").reuse_buffers(True)
    x, dy = randn(256, 200, dtype=np.float32), randn(256, 10, dtype=np.float32)
    for net in (model, plain):
        net.backward(net(x), need_dx=False)
        tracemalloc.start()
        for n in (256, 100, 256):
            net(x[:n])
            net.backward(dy[:n], need_dx=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 70_000  # NumPy's cast buffers; the smallest activation has 100 * 200 * 4 bytes


# ---- dtype


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_to_converts_parameters_and_statistics(dtype):
    model = nn.mlp(6, 3, hidden=(5,))
    model(randn(4, 6, dtype=np.float32))
    before = model.state_dict()
    assert model.to(dtype) is model
    assert model.params()["1.weight"].dtype == dtype
    after = model.state_dict()
    assert after["2.running.mean"].dtype == (F64 if dtype == "float64" else np.float32)
    for name, value in before.items():
        np.testing.assert_allclose(np.asarray(after[name], F64), value, rtol=0.005, err_msg=name)
    y = model(randn(4, 6).astype(dtype))
    assert y.dtype == model.backward(y).dtype == dtype
    assert all(g.dtype == p.dtype for g, p in zip(model.grads().values(), model.params().values(), strict=True))


def test_a_model_can_be_copied_and_pickled():
    model = nn.mlp(6, 3, hidden=(5,), dropout=0.2)
    x = randn(4, 6, dtype=np.float32)
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(twin.eval()(x), copy.deepcopy(model).eval()(x))


# ---- state


def test_state_dict_round_trip():
    one, other = (nn.mlp(6, 3, hidden=(5,), dropout=0.2, seed=s) for s in (0, 1))
    x = randn(4, 6, dtype=np.float32)
    one(x)
    state = one.state_dict()
    assert other.load_state_dict(state) == ([], [])
    np.testing.assert_array_equal(one.eval()(x), other.eval()(x))
    assert other.state_dict().keys() == state.keys()
    one.train()(x)  # the snapshot does not follow
    assert (state["2.running.mean"] != one.state_dict()["2.running.mean"]).any()


def test_a_state_that_does_not_fit_changes_nothing():
    model = nn.mlp(6, 3, hidden=(5,))
    good = model.state_dict()
    changed = {name: np.asarray(value) + 1 for name, value in good.items()}
    bad_states = [
        (changed | {"3.weight": np.ones((2, 2))}, r"3.weight: expected shape \(5, 3\), got \(2, 2\)"),
        ({n: v for n, v in changed.items() if n != "3.bias"}, "missing 3.bias"),
        (changed | {"9.weight": np.ones(1)}, "unexpected 9.weight"),
        (changed | {"3.bias": np.array(["a", "b", "c"])}, "3.bias: expected numbers"),
    ]
    for bad, message in bad_states:
        with pytest.raises(kilter.KilterError, match=message):
            model.load_state_dict(bad)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, good[name])


def test_loading_without_strict_takes_what_fits():
    model, other = nn.mlp(6, 3, hidden=(5,)), nn.mlp(6, 4, hidden=(5,), seed=1)
    report = other.load_state_dict(model.state_dict() | {"extra": 1}, strict=False)
    assert report.missing == ["3.bias", "3.weight"]
    assert report.unexpected == ["3.bias", "3.weight", "extra"]
    np.testing.assert_array_equal(other.params()["1.weight"], model.params()["1.weight"])


# ---- mistakes


X = np.ones((2, 4), np.float32)
BAD = {
    "wrong width": (lambda: nn.Linear(3, 2, seed=0)(X), r"x: expected shape \(N, 3\), got \(2, 4\)"),
    "wrong dtype": (lambda: nn.Linear(4, 2, seed=0)(X.astype(F64)), "x: expected dtype float32, got float64"),
    "no array": (lambda: nn.Linear(4, 2, seed=0)([[1.0] * 4]), "x: expected a NumPy array, got list"),
    "dy": (lambda: _forward_then_backward(nn.Linear(4, 2, seed=0)), r"dy: expected shape \(2, 2\)"),
    "dy of relu": (lambda: _forward_then_backward(nn.ReLU()), r"dy: expected shape \(2, 4\)"),
    "no features": (lambda: nn.Linear(0, 2, seed=0), "features: expected at least 1"),
    "dtype": (lambda: nn.Linear(2, 2, seed=0, dtype="int32"), "dtype: expected dtype float64, float32"),
    "device": (lambda: nn.ReLU().to("cuda"), "dtype: expected dtype float64, .* got 'cuda'"),
    "activation": (lambda: nn.BatchNorm(2, activation="gelu"), "activation: expected None or 'relu'"),
    "p": (lambda: nn.Dropout(1.0, seed=0), r"p: expected a number in"),
    "stream": (lambda: nn.Dropout(0.5, seed=0, stream=2**31), "stream: expected"),
    "no module": (lambda: nn.Sequential(nn.ReLU(), 3), r"layers\[1\]: expected a Module, got int"),
    "twice": (lambda: nn.Sequential(*[nn.ReLU()] * 2), "layers: 1 is the same module as 0"),
    "equal weights": (
        lambda: nn.Sequential(nn.Linear(2, 2, seed=0), nn.ReLU(), nn.Linear(2, 2, seed=0)),
        "layers: 2 has the same seed and stream as 0",
    ),
    "norm": (lambda: nn.mlp(4, 2, norm="weight"), "norm: expected 'batch' or 'layer' or 'group' or 'rms' or 'none'"),
}


def _forward_then_backward(layer):
    layer(X)
    layer.backward(X[:, :3])


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    call, message = BAD[name]
    with pytest.raises(kilter.KilterError, match=message):
        call()


def test_arrays_from_elsewhere_are_refused_with_a_hint():
    class Foreign:
        shape, dtype, ndim = (4, 3), np.dtype(np.float32), 2

    Foreign.__module__ = "cupy"
    for layer in (nn.Linear(3, 2, seed=0), nn.ReLU(), nn.BatchNorm(3)):
        with pytest.raises(kilter.KilterError, match=r"x: .*cupy"):
            layer(Foreign())
    with pytest.raises(kilter.KilterError, match=r"y: .*cupy"):
        nn.mse(Foreign(), Foreign())
