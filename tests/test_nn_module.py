"""What all modules share: names, modes, freezing, buffers, dtypes, devices, state, mistakes."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest

import cudasim
import kilter
from gradients import F64, nhwc, randn
from kilter import nn

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


def test_modules_freeze_and_thaw_by_name():
    model = nn.Sequential(nn.mlp(4, 3, hidden=(3,)), nn.Residual(nn.mlp(3, 3, hidden=(3,), seed=1)), *[nn.ReLU()] * 1)
    everything = set(model.params())
    model.freeze("0", "1.body.1")
    assert set(model.params()) == {n for n in everything if not n.startswith(("0.", "1.body.1."))}
    assert everything <= set(model.state_dict())
    model.thaw("0.1")
    assert set(model.params("0")) == {"0.1.weight"}
    assert set(model.thaw().params()) == everything
    with pytest.raises(
        kilter.KilterError, match=r"name: expected a module \(0, 0.0, 0.1, 0.2 and .* more\), got '1.bod'"
    ):
        model.freeze("0", "1.bod")
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


# ---- devices


ON_DEVICE = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5, seed=0)),
    "conv": lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, seed=0),
    "conv, stride 2": lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2, seed=0),
    "one channel": lambda: nn.Sequential(nn.Conv2d(2, 1, 1, seed=0), nn.Conv2d(1, 3, 3, padding=1, seed=1)),
    "batch norm": lambda: nn.BatchNorm(2, activation="relu"),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "avg pool": lambda: nn.AvgPool2d(2),
    "global": nn.GlobalAvgPool2d,
    "relu": nn.ReLU,
    "leaky relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "dropout": lambda: nn.Dropout(0.4, seed=3),
    "residual": lambda: nn.Residual(nn.Conv2d(2, 2, 3, padding=1, seed=0), activation="relu"),
    "cnn": lambda: nn.cnn((2, 6, 6), 3, hidden=(2, 4), norm="none"),
    "cnn, batch norm": lambda: nn.cnn((2, 6, 6), 3, hidden=(2, 4)),
    "cnn, layer norm": lambda: nn.cnn((2, 6, 6), 3, hidden=(2, 4), norm="layer"),
    "resnet": lambda: nn.resnet((2, 6, 6), 3, hidden=(2, 4)),
}


@pytest.mark.parametrize("order", [lambda x: x, nhwc], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ON_DEVICE)
def test_layers_work_on_the_arrays_of_their_input(name, dtype, order, cuda):
    """On arrays of another library, whose functions refuse NumPy's."""
    here, there = ON_DEVICE[name]().to(dtype), ON_DEVICE[name]().to(dtype).reuse_buffers()
    for _, module in there.modules():
        module.move(cuda.xp)
    x = order(randn(3, 2, 6, 6).astype(dtype))
    on_device = (
        cuda.array(np.ascontiguousarray(x))
        if order is not nhwc
        else (cuda.array(np.ascontiguousarray(x.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2))
    )
    y = here(x)
    for _ in range(2):  # the second time in buffers that are there
        for layer in (here, there):
            for _, module in layer.modules():
                if isinstance(module, nn.Dropout):
                    module.calls = 0
        y, got = here(x), there(on_device)
        dx, got_dx = here.backward(y), there.backward(got)
        for one, other in ((got, y), (got_dx, dx), *((there.grads()[n], g) for n, g in here.grads().items())):
            assert isinstance(one, cudasim.SimArray)
            np.testing.assert_allclose(cuda.numpy(one).astype(F64), other.astype(F64), rtol=1e-3, atol=1e-5)


def test_a_model_moves_and_its_state_stays_on_the_host(cuda):
    model = nn.cnn((1, 8, 8), 3, hidden=(2,))
    model(randn(4, 1, 8, 8, dtype=np.float32))
    before = model.state_dict()
    for _, module in model.modules():
        module.move(cuda.xp)
    assert all(isinstance(p, cudasim.SimArray) for p in (*model.params().values(), *model.grads().values()))
    assert isinstance(model[1].running.mean, cudasim.SimArray)
    state = model.state_dict()
    assert state.keys() == before.keys()
    for name, value in state.items():
        assert not isinstance(value, cudasim.SimArray)
        np.testing.assert_array_equal(value, before[name])
    params = model.params()
    changed = {name: value + 1 for name, value in state.items()}
    model.load_state_dict(changed)
    assert all(model.params()[name] is p for name, p in params.items())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, changed[name])
    assert model.to("cpu") is model
    assert all(type(p) is np.ndarray for p in model.params().values())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, changed[name])


def test_what_a_device_needs_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)  # as if it were not installed
    model = nn.mlp(4, 2)
    params = model.params()
    with pytest.raises(kilter.KilterError, match=r"device: expected CuPy for 'cuda', got none; pip install"):
        model.to("cuda")
    assert all(model.params()[name] is p for name, p in params.items())
    assert model.to("cpu").to("float64") is model


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
    "device": (lambda: nn.ReLU().to("gpu"), "dtype: expected dtype float64, .* got 'gpu'"),
    "activation": (lambda: nn.BatchNorm(2, activation="gelu"), "activation: expected None or 'relu'"),
    "p": (lambda: nn.Dropout(1.0, seed=0), r"p: expected a number in"),
    "stream": (lambda: nn.Dropout(0.5, seed=0, stream=2**31), "stream: expected"),
    "no module": (lambda: nn.Sequential(nn.ReLU(), 3), r"layers\[1\]: expected a Module, got int"),
    "twice": (lambda: nn.Sequential(*[nn.ReLU()] * 2), "layers: 1 is the same module as 0"),
    "equal weights": (
        lambda: nn.Sequential(nn.Linear(2, 2, seed=0), nn.ReLU(), nn.Linear(2, 2, seed=0)),
        "layers: 2 has the same seed and stream as 0",
    ),
    "axis": (lambda: nn.LayerNorm((2, 3), axis=1), "axis: expected -1, or 1 for a single size, got 1"),
    "another axis": (lambda: nn.RMSNorm(2, axis=2), "axis: expected -1, or 1 for a single size, got 2"),
    "rows": (lambda: nn.LayerNorm(3)(X), r"x: expected last axes \(3,\), got shape \(2, 4\)"),
    "channels": (lambda: nn.LayerNorm(3, axis=1)(X), r"x: expected 3 channels on axis 1, got shape \(2, 4\)"),
    "no forward": (lambda: nn.Linear(4, 2, seed=0).backward(X), "backward: expected a forward of Linear before it"),
    "no forward of a norm": (lambda: nn.BatchNorm(4).backward(X), "backward: expected a forward of BatchNorm"),
    "no axes": (lambda: nn.Flatten()(np.float32(3) * X[0, 0].reshape(())), "x: expected"),
    "dy of flatten": (lambda: _forward_then_backward(nn.Flatten()), r"dy: expected shape \(2, 4\)"),
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
