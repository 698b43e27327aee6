"""Checkpoints and run folders: whole or not at all."""

import csv
import json
import os
import struct
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kilter
from kilter import nn, optim, train
from kilter.data import Batches
from kilter.train import checkpoint
from small import Notes, blobs, run, small

COLUMNS = ["epoch", "loss", "accuracy", "valid_loss", "valid_accuracy", "lr", "seconds", "images_per_second"]


# ---- checkpoints


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    path = tmp_path / "c.safetensors"
    model, optimizer, _ = run(2)
    train.save(path, model, optimizer, metadata={"epoch": 2, "names": ["a"]})
    other, restored = small(seed=5)
    found = train.load(path, other, restored)
    assert found.metadata == {"epoch": 2, "names": ["a"]}
    assert restored.calls == optimizer.calls
    batches = Batches(*blobs(), 32, seed=0)
    for m, o in ((model, optimizer), (other, restored)):
        train.fit(m, o, nn.softmax_cross_entropy, batches, epochs=1)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_checkpoints_keep_dtypes_and_plain_numbers(tmp_path, dtype):
    path = tmp_path / "c.safetensors"
    model = nn.mlp(4, 3, hidden=(8,), dropout=0.5, dtype=dtype)
    model(blobs()[0].astype(dtype))
    train.save(path, model)
    state, optimizer, metadata = train.load(path)
    assert optimizer is None
    assert metadata == {}
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(state[name], value)
        assert getattr(state[name], "dtype", None) == getattr(value, "dtype", None)
    assert state["3.calls"] == 1
    assert os.listdir(tmp_path) == ["c.safetensors"]


def damage(path, how):
    data = bytearray(path.read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    if how == "empty":
        data = b""
    elif how == "cut in the header":
        data = data[:40]
    elif how == "cut in the data":
        data = data[:-3]
    elif how == "longer":
        data += b"\0" * 8
    elif how == "one bit":
        data[8 + header + 11] ^= 4
    elif how == "text":
        data = b"this is no checkpoint, but a text of some length"
    elif how == "one bit of a number":
        at = data.index(b"calls") + 10
        data[at] ^= 1
    elif how == "another version":
        data = data.replace(b'\\"version\\": 2', b'\\"version\\": 7')
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "cut in the header",
        "cut in the data",
        "longer",
        "one bit",
        "one bit of a number",
        "text",
        "another version",
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(tmp_path, how):
    path = tmp_path / "c.safetensors"
    train.save(path, *small(seed=1))
    damage(path, how)
    model, optimizer = small()
    before = model.state_dict()
    with pytest.raises(kilter.KilterError, match=r"c\.safetensors"):
        train.load(path, model, optimizer)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "c.safetensors"
    model, optimizer = small()
    before = model.state_dict()
    other = nn.mlp(4, 3, hidden=(9,), seed=1)
    train.save(path, other)
    with pytest.raises(kilter.KilterError, match=r"expected shape \(4, 8\), got \(4, 9\)|expected shape"):
        train.load(path, model)
    train.save(path, small(seed=1)[0])
    with pytest.raises(kilter.KilterError, match="expected the state of an optimizer"):
        train.load(path, model, optimizer)
    train.save(path, small(seed=1)[0], optim.AdamW(other.params()))
    with pytest.raises(kilter.KilterError):
        train.load(path, model, optimizer)
    save_file({"w": np.ones(3)}, path)
    with pytest.raises(kilter.KilterError, match="foreign safetensors file"):
        train.load(path)
    with pytest.raises(kilter.KilterError, match="no such file"):
        train.load(tmp_path / "none")
    with pytest.raises(kilter.KilterError, match="cannot be read"):
        train.load(tmp_path)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    model, _ = small()
    train.save(path, model)
    good = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train.save(path, small(seed=1)[0])
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["c.safetensors"]
    with pytest.raises(kilter.KilterError, match="metadata: expected JSON"):
        train.save(path, model, metadata={"a": object()})


def test_parts_of_any_name_come_back(tmp_path):
    states = {"a": {"x.y": np.ones(3), "n": 3, "kind": "SGD"}, "b": {"s": np.float32(2), "t": True, "u": float("inf")}}
    checkpoint.write(tmp_path / "c", states, {"rows": [{"loss": float("nan")}]})
    found, metadata = checkpoint.read(tmp_path / "c")
    np.testing.assert_array_equal(found["a"].pop("x.y"), np.ones(3))
    assert found["b"].pop("s") == 2
    assert found == {"a": {"n": 3, "kind": "SGD"}, "b": {"t": True, "u": float("inf")}}
    assert np.isnan(metadata["rows"][0]["loss"])
    with pytest.raises(kilter.KilterError, match="expected the state of a model, got a, b"):
        train.load(tmp_path / "c")


@pytest.mark.parametrize("sync", [True, False])
def test_a_new_file_takes_its_place_or_leaves_no_trace(tmp_path, sync):
    path, old = tmp_path / "f[1]", tmp_path / "old"
    for content in (b"one", b"two"):
        with checkpoint.replacing(path, keep=old, sync=sync) as file:
            file.write(content)
    assert (path.read_bytes(), old.read_bytes()) == (b"two", b"one")
    with pytest.raises(TypeError), checkpoint.replacing(path, keep=old, sync=sync) as file:
        file.writelines([b"thr", None])
    assert (path.read_bytes(), old.read_bytes()) == (b"two", b"one")
    (tmp_path / "f[1].77.tmp").touch()
    (tmp_path / "f1.77.tmp").touch()
    checkpoint.sweep(path)
    assert sorted(os.listdir(tmp_path)) == ["f1.77.tmp", "f[1]", "old"]


# ---- run folders


def read_metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_is_complete(tmp_path):
    folder = tmp_path / "deep" / "run"
    model, _, history = run(3, callbacks=[train.RunFolder(folder, {"lr": 1e-2}, title="blobs")])
    assert sorted(os.listdir(folder)) == ["config.json", "curves.png", "metrics.csv", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["run"] == {"lr": 1e-2}
    assert config["kilter"] == kilter.__version__
    rows = read_metrics(folder)
    assert list(rows[0]) == COLUMNS
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in history]
    assert rows[0]["valid_loss"] == ""
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    state, _, metadata = train.load(folder / "model.safetensors")
    assert metadata == {"run": {"lr": 1e-2}, "epochs": 3}
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(state[name], value)
    assert "model.1.weight" in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("at", "epochs"), [(1, 0), (17, 2)])
def test_an_interrupted_run_leaves_the_last_whole_epoch(tmp_path, at, epochs):
    with pytest.raises(KeyboardInterrupt):
        run(5, callbacks=[train.RunFolder(tmp_path, {}), Notes(fail_at=at)])
    assert len(read_metrics(tmp_path)) == epochs
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    state, _, metadata = train.load(tmp_path / "model.safetensors")
    assert metadata["epochs"] == epochs
    expected = run(epochs)[0] if epochs else nn.mlp(4, 3, hidden=(8,))
    for name, value in expected.state_dict().items():
        np.testing.assert_array_equal(state[name], value)


def test_a_run_folder_works_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=lambda: run(1, callbacks=[train.RunFolder(tmp_path, {})]))
    thread.start()
    thread.join()
    assert len(read_metrics(tmp_path)) == 1


def test_foreign_folders_are_refused_and_own_ones_taken_over(tmp_path):
    run(2, callbacks=[train.RunFolder(tmp_path / "a", {})])
    run(1, callbacks=[train.RunFolder(tmp_path / "a", {})])
    assert len(read_metrics(tmp_path / "a")) == 1
    foreign = tmp_path / "b"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for path, message in ((foreign, "an empty folder or a run"), (tmp_path / "file", "a folder, got a file")):
        with pytest.raises(kilter.KilterError, match=message):
            train.RunFolder(path, {})
    (foreign / "config.json").write_text("[1, 2]")
    with pytest.raises(kilter.KilterError, match="an empty folder or a run"):
        train.RunFolder(foreign, {})
    assert sorted(os.listdir(foreign)) == ["config.json", "thesis.tex"]


def test_a_run_that_goes_on_mends_what_a_crash_has_left(tmp_path):
    """A line too many, half a line, an old model: the checkpoint knows better."""
    whole = run(4)[0].state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(4, callbacks=[train.RunFolder(tmp_path, {"a": 1}), Notes(fail_at=16)], checkpoint=tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("3,0.1,0.9,,,0.01,1,1\n3,0.")
    train.save(tmp_path / "model.safetensors", small(seed=9)[0])
    (tmp_path / "metrics.csv.77.tmp").touch()
    with pytest.raises(KeyboardInterrupt):
        run(4, callbacks=[train.RunFolder(tmp_path, {"a": 1}), Notes(fail_at=15)], checkpoint=tmp_path, resume=True)
    assert [row["epoch"] for row in read_metrics(tmp_path)] == ["1", "2"]
    assert train.load(tmp_path / "model.safetensors").metadata["epochs"] == 2
    run(4, callbacks=[train.RunFolder(tmp_path, {"a": 1})], checkpoint=tmp_path, resume=True)
    assert [row["epoch"] for row in read_metrics(tmp_path)] == ["1", "2", "3", "4"]
    state = train.load(tmp_path / "model.safetensors").model
    for name, value in whole.items():
        np.testing.assert_array_equal(state[name], value)
    assert (tmp_path / "config.json").read_bytes() == config
    assert not list(tmp_path.glob("*.tmp"))


def test_the_model_of_an_averaged_run_has_the_averages(tmp_path):
    model, optimizer = small()
    ema = optim.WeightEMA(model.params(), 0.9)
    train.fit(
        model,
        optimizer,
        nn.softmax_cross_entropy,
        blobs(),
        epochs=2,
        ema=ema,
        callbacks=[train.RunFolder(tmp_path, {})],
    )
    state = train.load(tmp_path / "model.safetensors").model
    for name, value in ema.state_dict().items():
        if name.startswith("average."):
            np.testing.assert_array_equal(state[name.removeprefix("average.")], value)


def test_columns_of_callbacks_are_in_the_metrics(tmp_path):
    run(2, callbacks=[train.Monitor(), train.RunFolder(tmp_path, {})])
    rows = read_metrics(tmp_path)
    assert list(rows[0]) == [*COLUMNS, "grad_norm", "update_ratio", "nonfinite"]
    assert all(float(row["grad_norm"]) > 0 for row in rows)
