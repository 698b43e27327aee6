"""The main job, from a configuration to a run folder, and the data files it reads."""

import json

import numpy as np
import pytest

import kilter
from kilter import nn, train
from kilter.data import digits
from kilter.data.npz import read_npz
from kilter.train.choices import OPTIMIZERS, SCHEDULES, optimizer, schedules
from small import blobs

# ---- the main job


def test_the_job_reaches_its_accuracy_on_digits(tmp_path):
    accuracy = []
    for seed in range(5):
        job = train.Job(train.Config(seed=seed), tmp_path / str(seed))
        accuracy.append(job.run()[-1]["valid_accuracy"])
    assert np.mean(accuracy) >= 0.97
    assert all(word in job.summary() for word in ("digits", "test accuracy", "images/s", str(tmp_path)))


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [*((rule, "cosine") for rule in OPTIMIZERS), *(("adamw", name) for name in SCHEDULES), ("sgd", "one_cycle")],
)
def test_every_optimizer_and_schedule_learns(tmp_path, optimizer, name):
    config = train.Config(optimizer=optimizer, schedule=name, epochs=12, norm="none", hidden=(64,))
    job = train.Job(config, tmp_path)
    history = job.run()
    assert history[-1]["valid_accuracy"] > 0.85
    assert history[-1]["lr"] < job.config.lr / 90 or name == "constant"


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_peaks_after_the_warmup(name):
    steps, warm = 700, 0 if name == "one_cycle" else 70
    lr, momentum = schedules(name, 0.5, steps, warm)
    values = np.array([lr(step) for step in range(steps)])
    assert values.max() == values[209 if name == "one_cycle" else warm] == 0.5
    assert (np.diff(values[: warm + 1]) > 0).all()
    assert callable(momentum) == (name == "one_cycle")


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_one_cycle_moves_the_momentum_of_every_rule_that_has_one(rule):
    lr, momentum = schedules("one_cycle", 0.01, 10, 0)
    options = optimizer(rule, {"w": np.ones(3)}, lr, momentum, 0.01).groups[0]
    assert options["lr"] is lr
    assert options["weight_decay"] == 0.01
    moved = options.get("momentum", options.get("betas", (None,)))
    assert momentum in (moved, *(moved if isinstance(moved, tuple) else ())) or rule in (
        "adagrad",
        "rmsprop",
        "adadelta",
    )


def test_the_saved_model_predicts_what_the_run_measured(tmp_path):
    job = train.Job(train.Config(epochs=2, dropout=0.1), tmp_path)
    history = job.run()
    config = json.loads((tmp_path / "config.json").read_text())["run"]
    model = nn.mlp(64, 10, hidden=config["hidden"], dropout=config["dropout"], seed=99)
    train.load(tmp_path / "model.safetensors", model)
    data = digits()
    assert train.evaluate(model, (data.x_test, data.y_test)).accuracy == history[-1]["valid_accuracy"]


def test_a_last_batch_of_one_sample_is_left_out_with_batch_norm(tmp_path):
    x, y = blobs(65)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    for norm, steps in (("batch", 2), ("none", 3)):
        job = train.Job(train.Config(data=str(tmp_path / "d.npz"), norm=norm, batch_size=32, epochs=1), tmp_path / norm)
        job.run()
        assert job.optimizer.calls == steps
    assert job.name == "d"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "weight"}, "norm: expected 'batch' or 'layer' or 'group' or 'rms' or 'none', got 'weight'"),
        ({"model": "cnn"}, "model: expected 'mlp', got 'cnn'"),
        ({"optimizer": "rprop"}, "optimizer: expected 'sgd' or"),
        ({"schedule": "wave"}, "schedule: expected 'constant' or"),
        ({"batch_size": 1}, "batch_size: expected at least 2"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"warmup": 99.0}, "warmup: expected 0 to 30 epochs"),
        ({"warmup": 1.0, "schedule": "one_cycle"}, "warmup: expected 0 to 0 epochs with 'one_cycle'"),
        ({"label_smoothing": 2.0}, "label_smoothing: expected"),
        ({"dropout": -0.1}, "p: expected"),
        ({"hidden": (0,)}, "features: expected at least 1"),
        ({"lr": -1.0}, "lr: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, change, message):
    with pytest.raises(kilter.KilterError, match=message):
        train.Job(train.Config(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- data files


def test_labels_far_apart_are_refused(tmp_path):
    npz(tmp_path / "a.npz", y_test=np.array([0, 10**12]))
    with pytest.raises(kilter.KilterError, match="expected labels 0, 1, 2"):
        train.Job(train.Config(data=str(tmp_path / "a.npz")), tmp_path / "run")


def npz(path, **change):
    x, y = np.zeros((4, 2, 2), np.uint8) + 51, np.array([0, 1, 2, 1])
    arrays = {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2]} | change
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    return read_npz(str(path))


def test_npz_bytes_are_scaled_and_floats_kept(tmp_path):
    data = npz(tmp_path / "a.npz", x_test=np.full((2, 2, 2), 7.0), y_test=np.array([0, 1], np.uint8))
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert (data.x_train == np.float32(0.2)).all()
    assert (data.x_test == 7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "got no y_test"),
        ({"x_train": np.zeros(4)}, "x_train: expected .* got float64"),
        ({"x_train": np.zeros((4, 2, 2), np.int64)}, "x_train: expected"),
        ({"x_train": np.full((4, 2, 2), np.nan)}, "x_train: expected finite"),
        ({"x_test": np.zeros((2, 3), np.uint8)}, r"x_test: expected samples of \(2, 2\), got \(3,\)"),
        ({"y_train": np.zeros(3, int)}, "y_train: expected one label for each of 4 inputs, got 3"),
        ({"y_train": np.zeros(4)}, "y_train: expected .* integer labels"),
        ({"y_train": np.array([0, -1, 0, 0])}, "y_train: expected"),
        ({"x_train": np.array([[object()] * 2] * 4)}, "data: expected an .npz file"),
    ],
)
def test_npz_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(kilter.KilterError, match=message):
        npz(tmp_path / "a.npz", **change)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x93NUMPY\x01\x00", b"text, text"])
def test_files_that_are_no_npz_are_named(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(kilter.KilterError, match="data: expected"):
        read_npz(str(path))
