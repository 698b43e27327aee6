"""The learning rate finder: what it measures, and that it leaves nothing behind."""

import numpy as np
import pytest

import kilter
from kilter import nn, optim, schedule, train
from kilter.data import Batches
from kilter.dist import Threads
from small import blobs, small


def find(model, optimizer, **more):
    return train.lr_find(model, optimizer, nn.softmax_cross_entropy, Batches(*blobs(), 32, seed=0), **more)


def test_the_loss_falls_and_then_explodes_around_the_suggestion():
    model, optimizer = small()
    lrs, losses, suggestion = find(model, optimizer)
    assert len(lrs) == len(losses)
    np.testing.assert_allclose(lrs[1:] / lrs[:-1], 1e7 ** (1 / 99))
    assert lrs[0] == 1e-6
    assert suggestion == lrs[losses.argmin()] / 10
    assert 1e-3 < suggestion < 0.2
    assert losses.min() < losses[0] / 2
    usual = train.fit(*small(), nn.softmax_cross_entropy, blobs(), epochs=1)  # 1e-2
    model, _ = small()
    found = train.fit(model, optim.AdamW(model.params(), suggestion), nn.softmax_cross_entropy, blobs(), epochs=1)
    assert found[-1]["loss"] < 1.2 * usual[-1]["loss"]


def test_a_quadratic_gives_exactly_the_smoothed_loss():
    """One weight, loss w^2 / 2: the path of the weight is known."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False, seed=0, dtype="float64"))
    w = model.params()["0.weight"]
    w[...] = 1.0
    optimizer = optim.SGD(model.params(), 0.1)

    def loss(y, targets):
        return float(y[0, 0] ** 2 / 2), y.copy()

    x = np.ones((1, 1))
    lrs, losses, suggestion = train.lr_find(
        model, optimizer, loss, (x, x), low=1e-3, high=1e3, steps=40, smoothing=0.5, stop=100.0
    )
    weight, mean, want = 1.0, 0.0, []
    for i, lr in enumerate(1e-3 * 1e6 ** (np.arange(40) / 39)):
        mean = 0.5 * mean + 0.5 * weight**2 / 2
        want.append(mean / (1 - 0.5 ** (i + 1)))
        weight -= lr * weight
    end = next((i for i, value in enumerate(want) if value > 100 * min(want[: i + 1])), 40)
    np.testing.assert_allclose(losses, want[:end], rtol=1e-9)
    assert len(lrs) == end < 40
    assert w[0, 0] == 1.0
    assert suggestion == pytest.approx(lrs[np.argmin(want[:end])] / 10)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_model_and_optimizer_end_exactly_as_they_were(dtype):
    x, y = blobs(dtype=np.dtype(dtype))
    batches = Batches(x, y, 32, seed=0)
    scaler = optim.LossScaler(init=2.0**20, interval=5) if dtype == "float16" else None
    lr = schedule.cosine(1e-2, 50)
    results = []
    for look in (False, True):
        model = nn.mlp(4, 3, hidden=(8,), dropout=0.2, dtype=dtype)
        groups = [{"params": model.params("1")}, {"params": {**model.params("2"), **model.params("4")}, "lr": 3e-3}]
        optimizer = optim.AdamW(groups, lr)
        scaler = optim.LossScaler(init=2.0**20, interval=5) if dtype == "float16" else None
        train.fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=1, scaler=scaler)
        model[2].train()
        if look:
            before = (model.state_dict(), optimizer.state_dict(), scaler and scaler.state_dict())
            modes = [module.training for _, module in model.modules()]
            train.lr_find(model, optimizer, nn.softmax_cross_entropy, batches, scaler=scaler, steps=20)
            after = (model.state_dict(), optimizer.state_dict(), scaler and scaler.state_dict())
            assert [module.training for _, module in model.modules()] == modes
            assert optimizer.groups[0]["lr"] is lr
            assert optimizer.groups[1]["lr"] == 3e-3
            for one, other in zip(before, after, strict=True):
                for name in one or ():
                    np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        train.fit(model, optimizer, nn.softmax_cross_entropy, batches, epochs=1, scaler=scaler)
        results.append(model.state_dict())
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)


def test_an_error_leaves_nothing_behind():
    model, optimizer = small()
    before = model.state_dict()

    def loss(logits, y):
        if optimizer.calls == 5:
            raise RuntimeError("five")
        return nn.softmax_cross_entropy(logits, y)

    with pytest.raises(RuntimeError, match="five"):
        train.lr_find(model, optimizer, loss, blobs())
    assert optimizer.calls == 0
    assert optimizer.groups[0]["lr"] == 1e-2
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_groups_keep_their_ratio():
    model, _ = small()
    first, second = list(model.params().items())[:2], list(model.params().items())[2:]
    optimizer = optim.SGD([{"params": dict(first), "lr": 0.1}, {"params": dict(second), "lr": 0.025}], 1.0)
    seen = []

    def loss(logits, y):
        seen.append([group["lr"] for group in optimizer.groups])
        return nn.softmax_cross_entropy(logits, y)

    train.lr_find(model, optimizer, loss, blobs(), steps=10)
    for one, other in seen:
        assert other == pytest.approx(one / 4)


def test_ranks_find_what_one_process_finds():
    def work(comm=None):
        model, optimizer = small(dtype="float64", norm="none")
        data = Batches(*blobs(dtype=np.float64), 32, seed=0)
        return train.lr_find(model, optimizer, nn.softmax_cross_entropy, data, comm=comm)

    alone = work()
    for found in Threads(3).run(work):
        np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-8)
        assert found.suggestion == alone.suggestion


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 0.0}, "low: expected"),
        ({"high": 1e-9}, "high: expected"),
        ({"steps": 3}, "steps: expected"),
        ({"smoothing": 1.0}, "smoothing: expected"),
        ({"stop": 1.0}, "stop: expected"),
        ({"low": 1e8, "high": 1e9}, "loss: expected one that falls"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(kilter.KilterError, match=message):
        find(*small(), **change)
