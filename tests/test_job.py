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
    assert history[-1]["lr"] < job.config.lr / 90 or name in ("constant", "plateau")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_peaks_after_the_warmup(name):
    steps, warm = 700, 0 if name == "one_cycle" else 70
    lr, momentum, plateau = schedules(name, 0.5, steps, warm)
    assert (plateau is not None) == (name == "plateau")
    values = np.array([lr(step) for step in range(steps)])
    assert values.max() == values[209 if name == "one_cycle" else warm] == 0.5
    assert (np.diff(values[: warm + 1]) > 0).all()
    assert callable(momentum) == (name == "one_cycle")


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_one_cycle_moves_the_momentum_of_every_rule_that_has_one(rule):
    lr, momentum, _ = schedules("one_cycle", 0.01, 10, 0)
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
        ({"norm": "weight"}, "norm: expected 'batch' or 'layer' or .* or 'none', got 'weight'"),
        ({"model": "rnn"}, "model: expected 'mlp' or 'cnn' or 'resnet', got 'rnn'"),
        ({"optimizer": "rprop"}, "optimizer: expected 'sgd' or"),
        ({"schedule": "wave"}, "schedule: expected 'constant' or"),
        ({"batch_size": 1}, "batch_size: expected at least 2"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"warmup": 99.0}, "warmup: expected 0 to 30 epochs"),
        ({"warmup": 1.0, "schedule": "one_cycle"}, "warmup: expected 0 to 0 epochs with 'one_cycle'"),
        ({"label_smoothing": 2.0}, "label_smoothing: expected"),
        ({"dropout": -0.1}, "dropout: expected"),
        ({"hidden": (0,)}, "features: expected at least 1"),
        ({"lr": -1.0}, "lr: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, change, message):
    with pytest.raises(kilter.KilterError, match=message):
        train.Job(train.Config(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- recipes


def blob_file(path, classes=3, n=120):
    x, y = blobs(n)
    y = np.minimum(y, classes - 1)
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return str(path)


def blob_job(folder, out, **options):
    config = {
        "data": blob_file(folder / "d.npz"),
        "hidden": (8, 8),
        "epochs": 2,
        "batch_size": 20,
        "lr": 0.02,
    } | options
    return train.Job(train.Config(**config), folder / out)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_precisions(tmp_path, precision, dtype):
    job = blob_job(tmp_path, "r", precision=precision, epochs=8)
    assert {p.dtype.name for name, p in job.model.params().items() if name.endswith("weight")} == {dtype}
    assert job.data.x_train.dtype.name == job.data.x_test.dtype.name == dtype
    assert (job.scaler is not None) == (precision == "fp16")
    assert job.run()[-1]["valid_accuracy"] > 0.85


def test_a_rate_grows_with_the_batch_it_is_meant_for(tmp_path):
    job = blob_job(tmp_path, "r", lr=0.01, base_batch=16, batch_size=20, accumulate=4, warmup=0.0, schedule="constant")
    assert job.optimizer.groups[0]["lr"](0) == pytest.approx(0.01 * 80 / 16)
    job.run()
    assert job.optimizer.calls == 2 * 2  # 6 batches are a step of 4 and one of 2
    assert "lr 0.01 per 16 samples" in job.summary()


def test_a_measured_rate_is_kept_and_drawn(tmp_path):
    job = blob_job(tmp_path, "r", lr="find")
    assert 1e-4 < job.config.lr < 1
    job.run()
    assert (tmp_path / "r" / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "r" / "config.json").read_text())["run"]["lr"] == job.config.lr
    assert train.Job.resumed(tmp_path / "r").config == job.config


def test_mixing_and_augmentation_come_in_this_order(tmp_path):
    config = train.Config(augment=("crop", "flip", "noise"), cutmix=1.0, mixup=0.2, epochs=1)
    job = train.Job(config, tmp_path / "r")
    names = [getattr(t, "func", t).__name__ for t in job.batches.transforms]
    assert names == ["crop", "flip", "noise", "cutmix", "mixup"]
    (row,) = job.run()
    assert row["accuracy"] is None  # of mixed labels
    assert row["valid_accuracy"] > 0.2


def test_a_plateau_is_told_the_loss(tmp_path):
    job = blob_job(tmp_path, "r", schedule="plateau", lr=1e-9, epochs=6, warmup=0.0)
    rates = [row["lr"] for row in job.run()]
    assert rates[:4] == [1e-9] * 4
    assert rates[-1] == pytest.approx(1e-10)


def test_another_task_starts_from_a_run_with_a_new_head(tmp_path):
    blob_job(tmp_path, "a", epochs=6).run()
    learned = train.load(tmp_path / "a" / "model.safetensors").model
    few = blob_file(tmp_path / "two.npz", classes=2, n=24)
    config = train.Config(
        data=few, hidden=(8, 8), epochs=9, batch_size=12, lr=0.02, start=str(tmp_path / "a"), freeze=("1", "2", "3")
    )
    job = train.Job(config, tmp_path / "b")
    assert job.started.endswith("new: 5.weight, 5.bias")
    assert set(job.model.params()) == {"4.gamma", "4.beta", "5.weight", "5.bias"}
    history = job.run()
    assert history[-1]["valid_accuracy"] > 0.8
    assert "arrays of" in job.summary()
    for name, value in train.load(tmp_path / "b" / "model.safetensors").model.items():
        if name.startswith(("1.", "2.", "3.")):  # weights, and statistics of a frozen BatchNorm
            np.testing.assert_array_equal(value, learned[name], err_msg=name)
    assert (learned["4.running.mean"] != job.model.state_dict()["4.running.mean"]).any()
    (tmp_path / "a" / "model.safetensors").unlink()  # a run that goes on does not need it
    assert train.Job.resumed(tmp_path / "b").run() == history


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_networks_for_images(tmp_path, model):
    job = train.Job(train.Config(model=model, hidden=(4, 8), epochs=1, norm="group"), tmp_path)
    job.run()
    assert f"{model} 1x8x8-4-8-10, group norm" in job.summary()


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
