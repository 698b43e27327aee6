"""The training loop and what watches it."""

import numpy as np
import pytest

import kilter
from kilter import nn, optim, schedule, train
from kilter.data import Batches
from small import Notes, blobs, run, small

COLUMNS = ["epoch", "loss", "accuracy", "valid_loss", "valid_accuracy", "lr", "seconds", "images_per_second"]


def test_fit_trains_and_reports_each_epoch():
    x, _ = blobs()
    model, optimizer, history = run(5, valid=blobs(77, seed=1), lr=schedule.linear(0.05, 0.0, 34))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    assert all(list(row) == COLUMNS for row in history)
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert history[-1]["accuracy"] > 0.9
    assert optimizer.calls == 5 * 7
    assert history[-1]["lr"] == 0
    assert history[0]["lr"] == pytest.approx(0.05 * (1 - 6 / 34))
    for row in history:
        assert row["images_per_second"] == pytest.approx(len(x) / row["seconds"])
    assert history[-1]["valid_accuracy"] == train.evaluate(model, blobs(77, seed=1)).accuracy


def test_the_loss_of_an_epoch_counts_samples_not_batches():
    x, y = blobs(10)
    model, _ = small(norm="none")
    still = optim.SGD(model.params(), 0.0)
    want = nn.softmax_cross_entropy(model(x), y)[0]
    hits = (model(x).argmax(1) == y).mean()
    for size in (10, 7, 3):
        row = train.fit(model, still, nn.softmax_cross_entropy, Batches(x, y, size, seed=0), epochs=1)[0]
        assert row["loss"] == pytest.approx(want, rel=1e-6)
        assert row["accuracy"] == pytest.approx(hits)
        metrics = train.evaluate(model, Batches(x, y, size, seed=0))
        assert metrics == (pytest.approx(want, rel=1e-6), pytest.approx(hits), 10)


def test_equal_runs_give_equal_bits_and_buffers_do_not_change_them():
    first, second = run()[0].state_dict(), run()[0].state_dict()
    model = nn.mlp(4, 3, hidden=(8,))  # the same by hand, with fresh arrays
    optimizer = optim.AdamW(model.params(), 1e-2)
    batches = Batches(*blobs(), 32, seed=0)
    for epoch in range(3):
        for x, y in batches.epoch(epoch):
            _, dlogits = nn.softmax_cross_entropy(model(x), y)
            model.backward(dlogits)
            optimizer.step(model.grads())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(first[name], value, err_msg=name)
        np.testing.assert_array_equal(second[name], value, err_msg=name)


def test_arrays_are_cut_into_batches_by_seed():
    weights = []
    for seed in (0, 0, 1):
        model, optimizer = small()
        train.fit(model, optimizer, nn.softmax_cross_entropy, blobs(), epochs=1, seed=seed)
        assert optimizer.calls == 2
        weights.append(model.params()["1.weight"])
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_after_fit_the_model_is_ready_to_predict():
    model, _, _ = run(1)
    x, _ = blobs()
    assert not any(m.training for _, m in model.modules())
    assert not np.shares_memory(model(x[:5]), model(x[5:10]))


def test_evaluate_restores_the_modes():
    model, _ = small(dropout=0.5)
    model[2].eval()
    before = model.state_dict()
    modes = [m.training for _, m in model.modules()]
    assert train.evaluate(model, blobs()) == train.evaluate(model, blobs())
    assert [m.training for _, m in model.modules()] == modes
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_regression_has_no_accuracy():
    x, _ = blobs()
    y = x[:, :1] - x[:, 1:2]
    model = nn.Sequential(nn.Linear(4, 1, seed=0))
    history = train.fit(model, optim.AdamW(model.params(), 0.1), nn.mse, (x, y), epochs=60, valid=(x[:9], y[:9]))
    assert history[-1]["accuracy"] is None
    assert history[-1]["valid_accuracy"] is None
    assert history[-1]["loss"] < 0.05 < history[0]["loss"]


def test_soft_targets_train_too():
    x, y = blobs()
    model, optimizer = small()
    history = train.fit(model, optimizer, nn.softmax_cross_entropy, (x, np.eye(3, dtype=np.float32)[y]), epochs=20)
    assert history[0]["accuracy"] is None
    assert train.evaluate(model, (x, y)).accuracy > 0.8


def test_a_scaler_trains_sixteen_bit_models_and_survives_overflow():
    x, y = blobs(dtype=np.float16)
    model = nn.mlp(4, 3, hidden=(8,), dtype=np.float16)
    scaler = optim.LossScaler(init=2.0**40)
    optimizer = optim.AdamW(model.params(), 1e-2)
    history = train.fit(model, optimizer, nn.softmax_cross_entropy, Batches(x, y, 32, seed=0), epochs=12, scaler=scaler)
    assert scaler.scale < 2.0**40
    assert np.isfinite(history[-1]["loss"])
    assert history[-1]["accuracy"] > 0.85
    assert all(np.isfinite(p).all() for p in model.params().values())


def test_a_loss_that_is_not_finite_ends_the_run_with_a_reason():
    x, y = blobs()
    model = nn.mlp(4, 3, hidden=(8,), norm="none")
    with (
        np.errstate(all="ignore"),
        pytest.raises(kilter.KilterError, match=r"loss: .* epoch 1, step \d+; try a smaller lr"),
    ):
        train.fit(model, optim.SGD(model.params(), 1e30), nn.softmax_cross_entropy, (x, y), epochs=50)


def test_callbacks_see_the_run_and_may_stop_it():
    notes = Notes(stop_after=2)
    _, _, history = run(5, callbacks=[notes])
    assert len(history) == 2
    steps = ["step"] * 7
    assert notes.calls == ["start", *steps, "epoch 1 of 5", *steps, "epoch 2 of 5", "end"]


def test_callbacks_end_after_an_interrupt():
    notes = Notes(fail_at=9)
    with pytest.raises(KeyboardInterrupt):
        run(5, callbacks=[notes])
    assert notes.calls[-2:] == ["step", "end"]


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("wanted", [True, False])
def test_progress_goes_to_a_terminal(monkeypatch, wanted):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(2, valid=blobs(50), progress=wanted)
    if not wanted:
        assert terminal.text == ""
        return
    for part in ("epoch 2/2", "left", "loss", "acc", "valid", "img/s"):
        assert part in terminal.text


def test_progress_is_quiet_elsewhere(capsys):
    run(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epochs": 0}, "epochs: expected at least 1"), ({"data": 3}, "data: expected batches or arrays")],
)
def test_mistakes_are_named(change, message):
    model, optimizer = small()
    given = {"data": blobs(), "epochs": 1} | change
    with pytest.raises(kilter.KilterError, match=message):
        train.fit(model, optimizer, nn.softmax_cross_entropy, **given)
