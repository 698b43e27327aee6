"""Ready-made networks: whole gradients by central differences, shapes, norms, memory, transfer to another task."""

import tracemalloc

import numpy as np
import pytest

import kilter
from gradients import F64, central, nhwc, randn
from kilter import nn, optim

NORMS = nn.models.NORMS
SMALL = {
    "mlp": lambda norm, **more: nn.mlp((1, 2, 3), 4, hidden=(8, 5), norm=norm, seed=3, **more),
    "cnn": lambda norm, **more: nn.cnn((1, 8, 9), 3, hidden=(2, 4), norm=norm, seed=3, **more),
    "resnet": lambda norm, **more: nn.resnet((2, 5, 4), 3, hidden=(2, 4), norm=norm, seed=3, **more),
}
SHAPES = {"mlp": (1, 2, 3), "cnn": (1, 8, 9), "resnet": (2, 5, 4)}
CASES = [
    *(("mlp", norm) for norm in NORMS if norm != "instance"),
    *(("cnn", norm) for norm in NORMS),
    *(("resnet", norm) for norm in ("batch", "group", "layer", "none")),
]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_the_whole_model_against_finite_differences(name, norm):
    model, x = SMALL[name](norm, dtype=F64), randn(4, *SHAPES[name], seed=1)
    y = np.array([0, 2, 1, 2])
    for p in model.params().values():
        if p.ndim == 1:
            p += 0.1 * randn(p.size, seed=p.size)  # no zeros in front of a ReLU

    def f():
        return nn.softmax_cross_entropy(model(x), y, label_smoothing=0.1)[0]

    _, dlogits = nn.softmax_cross_entropy(model(x), y, label_smoothing=0.1)
    dx = model.backward(dlogits).copy()
    grads = {n: g.copy() for n, g in model.grads().items()}
    assert grads.keys() == model.params().keys()
    # a layer norm of two channels turns within the root of its eps: a small step there
    h, tol = (2e-7, 2e-7) if norm == "layer" else (1e-5, 1e-8)
    for n, p in model.params().items():
        np.testing.assert_allclose(grads[n], central(f, p, h), rtol=1e-6, atol=tol, err_msg=n)
    np.testing.assert_allclose(dx, central(f, x, h), rtol=1e-6, atol=tol)


COUNTS = {  # of parameters: norms that take the mean of a channel away spare the biases in front of them
    "mlp": {"batch": 8, "layer": 10, "rms": 8, "none": 6},
    "cnn": {"batch": 8, "group": 10, "instance": 8, "rms": 8, "none": 6},
    "resnet": {"batch": 20, "none": 14},
}


@pytest.mark.parametrize("name", COUNTS)
def test_biases_stand_where_no_norm_takes_the_mean_away(name):
    assert {norm: len(SMALL[name](norm).params()) for norm in COUNTS[name]} == COUNTS[name]


@pytest.mark.parametrize("name", nn.MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)], ids=str)
def test_every_model_is_built_by_shape_and_classes(name, shape):
    model = nn.MODELS[name](shape, 7, dropout=0.2, seed=5)
    x = randn(2, *shape, dtype=np.float32)
    y = model(x)
    assert y.shape == (2, 7)
    assert model.backward(y).shape == x.shape
    assert any(isinstance(m, nn.Dropout) for _, m in model.modules())
    again, other = nn.MODELS[name](shape, 7, dropout=0.2, seed=5), nn.MODELS[name](shape, 7, seed=6)
    np.testing.assert_array_equal(again(x), y)
    assert (other(x) != y).any()


def test_the_cnn_pools_while_the_image_is_large():
    kinds = [type(layer).__name__ for layer in nn.cnn((1, 28, 28), 10)]
    block = ["Conv2d", "BatchNorm", "MaxPool2d"]
    assert kinds == [*block, *block, "Conv2d", "BatchNorm", "Flatten", "Linear"]
    assert sum(p.size for p in nn.cnn((1, 28, 28), 10).params().values()) == 54_778


def test_the_resnet_halves_a_large_image_and_then_at_each_stage_but_the_first():
    model = nn.resnet((3, 32, 32), 10, blocks=2)
    x, sizes = randn(1, 3, 32, 32, dtype=np.float32), []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Residual):
            sizes.append((x.shape[1:], layer.shortcut is not None))
    assert sizes == [
        ((16, 16, 16), False),
        ((16, 16, 16), False),
        ((32, 8, 8), True),
        ((32, 8, 8), False),
        ((64, 4, 4), True),
        ((64, 4, 4), False),
    ]


@pytest.mark.parametrize("name", ["cnn", "resnet"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_order_of_images_in_memory_does_not_matter(name, norm):
    model, x = SMALL[name](norm, dtype=F64), randn(4, *SHAPES[name])
    y, dy = model(x), randn(4, 3)
    dx = model.backward(dy)
    np.testing.assert_allclose(model(nhwc(x)), y, rtol=1e-12)
    np.testing.assert_allclose(model.backward(dy), dx, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", nn.MODELS)
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_reused_buffers_give_the_same_bits_for_batches_of_any_size(name, norm):
    fresh, kept = (SMALL[name](norm, dropout=0.3) for _ in range(2))
    kept.reuse_buffers()
    for n in (8, 5, 8, 12):
        x = randn(n, *SHAPES[name], seed=n, dtype=np.float32)
        y = fresh(x)
        np.testing.assert_array_equal(kept(x), y)
        np.testing.assert_array_equal(kept.backward(y), fresh.backward(y))
        for key, g in fresh.grads().items():
            np.testing.assert_array_equal(g, kept.grads()[key])


@pytest.mark.parametrize("name", nn.MODELS)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_steady_loop_allocates_nothing_large(name, norm):
    model = nn.MODELS[name]((1, 28, 28), 10, dropout=0.2, norm=norm).reuse_buffers()
    x, dy = randn(64, 1, 28, 28, dtype=np.float32), randn(64, 10, dtype=np.float32)
    model.backward(model(x), need_dx=False)
    tracemalloc.start()
    for n in (64, 40, 64):
        model(x[:n])
        model.backward(dy[:n], need_dx=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250_000  # statistics and casts; an activation of the cnn has 500 kB and more


@pytest.mark.parametrize("name", nn.MODELS)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(name, dtype):
    x = randn(6, *SHAPES[name])
    wide, model = SMALL[name]("batch", dtype=F64), SMALL[name]("batch").to(dtype)
    y = model(x.astype(dtype))
    assert y.dtype == model.backward(y).dtype == dtype
    np.testing.assert_allclose(y.astype(F64), wide(x), atol={"float64": 1e-5, "float16": 0.02, "bfloat16": 0.2}[dtype])


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_they_learn(name):
    """Bars across an image against bars along it."""
    rng, across = np.random.default_rng(0), np.arange(64) % 2
    x = 0.3 * rng.standard_normal((64, 1, 9, 9)).astype(np.float32)
    for i, row in enumerate(rng.integers(0, 9, 64)):
        if across[i]:
            x[i, 0, row] += 1
        else:
            x[i, 0, :, row] += 1
    model = nn.MODELS[name]((1, 9, 9), 2, hidden=(4, 8))
    optimizer = optim.Adam(model.params(), 1e-2)
    for _ in range(30):
        loss, dlogits = nn.softmax_cross_entropy(model(x), across)
        model.backward(dlogits, need_dx=False)
        optimizer.step(model.grads())
    assert loss < 0.2


# ---- transfer to another task


def trained(name, classes=3, seed=3):
    model = nn.MODELS[name](SHAPES[name], classes, hidden=(4, 8), seed=seed)
    for n in range(3):
        model(randn(6, *SHAPES[name], seed=n, dtype=np.float32) + 1)
    return model


@pytest.mark.parametrize("name", nn.MODELS)
def test_a_new_head_on_a_frozen_body_with_its_running_statistics(name):
    old, new = trained(name), trained(name, classes=5, seed=8)
    head = str(len(new) - 1)
    report = new.load_state_dict(old.state_dict(), strict=False)
    assert report.missing == report.unexpected == [f"{head}.bias", f"{head}.weight"]
    new.freeze().thaw(head)
    assert list(new.params()) == [f"{head}.weight", f"{head}.bias"]
    x, y = randn(20, *SHAPES[name], dtype=np.float32) + 1, np.arange(20) % 5
    features = old.eval()[:-1](x)
    before = new.state_dict()
    np.testing.assert_array_equal(new.train()[:-1](x), features)  # training mode: the frozen statistics all the same
    optimizer = optim.SGD(new.params(), 0.5)
    losses = []
    for _ in range(20):
        loss, dlogits = nn.softmax_cross_entropy(new(x), y)
        assert new.backward(dlogits, need_dx=False) is None
        optimizer.step(new.grads())
        losses.append(loss)
    assert losses[-1] < losses[0]
    after = new.state_dict()
    assert after.keys() == before.keys()
    changed = {n for n in before if np.any(np.asarray(before[n]) != np.asarray(after[n]))}
    assert changed == {f"{head}.weight", f"{head}.bias"}


def test_a_slice_with_another_head_shares_the_layers():
    old = trained("cnn")
    new = nn.Sequential(*old[:-1], nn.Linear(8 * 4 * 4, 5, seed=1))
    assert new[0] is old[0]
    assert [*new.params()][:-2] == [*old.params()][:-2]
    assert new(randn(2, 1, 8, 9, dtype=np.float32)).shape == (2, 5)


def test_groups_of_parameters_by_the_names_of_modules():
    model = trained("resnet")
    head = model.params("5")
    body = {n: p for n, p in model.params().items() if n not in head}
    assert list(head) == ["5.weight", "5.bias"] and len(body) + 2 == len(model.params())
    assert list(model.grads("5")) == list(head)
    assert model.params("2.body.0", "5") == {"2.body.0.weight": model[2].body[0].own_params["weight"], **head}
    optimizer = optim.SGD([{"params": body, "lr": 0.0}, {"params": head, "lr": 1.0}], 0.1)
    before = model.state_dict()
    x = randn(6, *SHAPES["resnet"], dtype=np.float32)
    _, dlogits = nn.softmax_cross_entropy(model(x), np.arange(6) % 3)
    model.backward(dlogits, need_dx=False)
    optimizer.step(model.grads())
    for n, p in model.params().items():
        assert (p != before[n]).any() == (n in head)


# ---- mistakes

BAD = {
    "norm": (lambda: nn.mlp(4, 2, norm="weight"), "norm: expected 'batch' or 'layer' or 'group' or 'rms' or 'none'"),
    "norm of instances": (lambda: nn.mlp(4, 2, norm="instance"), "norm: expected 'batch' or .* got 'instance'"),
    "norm of the cnn": (lambda: nn.cnn((1, 8, 8), 2, norm="l"), "norm: expected 'batch' or 'layer' .* got 'l'"),
    "norm of the resnet": (lambda: nn.resnet((1, 8, 8), 2, norm=None), "norm: expected 'batch' or .* got None"),
    "shape": (lambda: nn.cnn((8, 8), 2), r"shape: expected \(channels, height, width\), got \(8, 8\)"),
    "a number": (lambda: nn.resnet(64, 2), r"shape: expected \(channels, height, width\), got 64"),
    "no pixels": (lambda: nn.cnn((1, 0, 8), 2), r"shape: expected \(channels, height, width\)"),
    "channels": (lambda: nn.cnn((1, 8, 8), 2, hidden=(0,)), "out_channels: expected a whole number of at least 1"),
    "no stages": (lambda: nn.resnet((1, 8, 8), 2, hidden=()), "hidden: expected at least one number of channels"),
    "blocks": (lambda: nn.resnet((1, 8, 8), 2, blocks=0), "blocks: expected a whole number of at least 1, got 0"),
    "classes": (lambda: nn.cnn((1, 8, 8), 0), "features: expected at least 1"),
    "dropout": (lambda: nn.resnet((1, 8, 8), 2, dropout=1.0), "p: expected a number in"),
    "name": (lambda: nn.mlp(4, 2).freeze("9"), r"name: expected a module \(0, 1, 2, 3 and 2 more\), got '9'"),
    "part of a name": (lambda: nn.mlp(4, 2).params("1.w"), "name: expected a module .* got '1.w'"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    call, message = BAD[name]
    with pytest.raises(kilter.KilterError, match=message):
        call()
