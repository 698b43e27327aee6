"""Runs that are cut off and go on: equal bits with the uninterrupted run."""

import csv
import os
import subprocess
import sys
import time
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import kilter
from kilter import nn, optim, schedule, train
from kilter.data import Batches, mixup
from kilter.train import checkpoint
from small import Notes, blobs
from support import BFLOAT16

LAST, PREVIOUS = "last.safetensors", "last.previous.safetensors"
KILLS = int(os.environ.get("KILTER_KILLS", "3"))
TIMES = ("seconds", "images_per_second")


# ---- in one process


def parts(dtype="float32", norm="batch", dropout=0.0, accumulate=1, ema=None, every=None, plateau=False, mixed=False):
    """Everything that a run is made of, new."""
    dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    x, y = blobs(dtype=dtype)
    model = nn.mlp(4, 3, hidden=(8, 8), norm=norm, dropout=dropout, dtype=dtype)
    lr = schedule.Plateau(1e-2, patience=0, threshold=0.5) if plateau else schedule.one_cycle(2e-2, 4 * 7).lr
    transform = partial(mixup, classes=3) if mixed else None
    callbacks = [train.Monitor(every=3)] + ([train.FollowPlateau(lr)] if plateau else [])
    return SimpleNamespace(
        model=model,
        optimizer=optim.AdamW(model.params(), lr, clip_norm=1.0),
        batches=Batches(x, y, 32, seed=3, transform=transform),
        scaler=optim.LossScaler(init=2.0**30, interval=3) if dtype == np.float16 else None,
        ema=None if ema is None else optim.WeightEMA(model.params(), ema),
        accumulate=accumulate,
        callbacks=callbacks,
        valid=blobs(50, seed=1, dtype=dtype),
        every=every,
    )


def fit(p, folder, *more, epochs=4, resume=False):
    return train.fit(
        p.model,
        p.optimizer,
        nn.softmax_cross_entropy,
        p.batches,
        epochs=epochs,
        valid=p.valid,
        accumulate=p.accumulate,
        scaler=p.scaler,
        ema=p.ema,
        callbacks=[*p.callbacks, *more],
        checkpoint=train.Checkpoints(folder, every=p.every),
        resume=resume,
    )


def timeless(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)
        assert getattr(other[name], "dtype", None) == getattr(value, "dtype", None)


def assert_equal_files(one, other):
    """All parts, and the place, but for the clock."""
    (states, metadata), (others, its) = checkpoint.read(one), checkpoint.read(other)
    assert states.keys() == others.keys()
    for part in states:
        assert_equal_states(states[part], others[part])
    for found in (metadata, its):
        found["run"]["history"] = timeless(found["run"]["history"])
    assert metadata == its


CASES = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "accumulate": {"accumulate": 3, "every": 1, "norm": "none"},
    "average": {"ema": 0.9, "every": 2},
    "every step": {"every": 1, "dropout": 0.1},
    "float16": {"dtype": "float16", "ema": 0.9, "every": 3},
    "bfloat16": {"dtype": "bfloat16", "norm": "layer", "every": 4},
    "plateau": {"plateau": True, "every": 4},
    "mixup": {"mixed": True, "every": 2},
}


@pytest.mark.parametrize("at", [2, 12])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(tmp_path, case, at):
    whole = parts(**CASES[case])
    want = fit(whole, tmp_path / "whole")
    at = min(at, 11 if whole.accumulate > 1 else at)
    with pytest.raises(KeyboardInterrupt):
        fit(parts(**CASES[case]), tmp_path / "cut", Notes(fail_at=at))
    again = parts(**CASES[case])
    history = fit(again, tmp_path / "cut", resume=True)
    assert timeless(history) == timeless(want)
    for name in ("model", "optimizer", "ema", "scaler"):
        if (found := getattr(whole, name)) is not None:
            assert_equal_states(found.state_dict(), getattr(again, name).state_dict())
    assert_equal_files(tmp_path / "whole" / LAST, tmp_path / "cut" / LAST)
    assert sorted(os.listdir(tmp_path / "cut")) == [PREVIOUS, LAST]


def test_a_checkpoint_within_an_epoch_is_taken_up_there(tmp_path):
    p = parts(every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(p, tmp_path, Notes(fail_at=12))
    _, metadata = checkpoint.read(tmp_path / LAST)
    assert (metadata["run"]["step"], metadata["run"]["batch"], len(metadata["run"]["history"])) == (10, 3, 1)
    notes = Notes()
    fit(parts(every=2), tmp_path, notes, epochs=2, resume=True)
    assert notes.calls == ["start", *["step"] * 4, "epoch 2 of 2", "end"]


def test_a_finished_run_is_not_trained_further(tmp_path):
    p = parts()
    want = fit(p, tmp_path, epochs=2)
    notes = Notes()
    assert fit(parts(), tmp_path, notes, epochs=2, resume=True) == want
    assert notes.calls == ["start", "end"]
    assert len(fit(parts(), tmp_path, epochs=3, resume=True)) == 3


def test_a_stopped_run_stays_stopped(tmp_path):
    assert len(fit(parts(), tmp_path, Notes(stop_after=2))) == 2
    assert len(fit(parts(), tmp_path, resume=True)) == 2


def test_without_a_checkpoint_training_starts_and_old_ones_do_not_stay(tmp_path):
    (tmp_path / "a").mkdir()
    stale = tmp_path / "a" / f"{LAST}.77.tmp"
    stale.write_bytes(b"half")
    fit(parts(), tmp_path / "a", epochs=2, resume=True)
    assert not stale.exists()
    with pytest.raises(KeyboardInterrupt):
        fit(parts(), tmp_path / "a", Notes(fail_at=1))
    assert sorted(os.listdir(tmp_path / "a")) == [LAST]  # of the new run
    assert checkpoint.read(tmp_path / "a" / LAST)[1]["run"]["step"] == 0


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


SPOILT = {
    "a flipped bit": flip_a_bit,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04\x95\x1a\x00cposix\nsystem\n"),
    "foreign": lambda path: save_file({"w": np.ones(3)}, path),
    "a model alone": lambda path: train.save(path, parts().model),
    "of another network": lambda path: fit_other(path),
}


def fit_other(path):
    other = parts(norm="none")
    fit(other, path.parent / "other", epochs=1)
    path.write_bytes((path.parent / "other" / LAST).read_bytes())


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    whole = parts()
    fit(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(parts(), tmp_path / "r", Notes(fail_at=16))
    SPOILT[how](tmp_path / "r" / LAST)
    good = (tmp_path / "r" / PREVIOUS).read_bytes()
    p = parts()
    with pytest.warns(UserWarning, match=rf"{LAST}.*; continuing from {PREVIOUS}"), pytest.raises(KeyboardInterrupt):
        fit(p, tmp_path / "r", Notes(fail_at=8), resume=True)
    assert (tmp_path / "r" / PREVIOUS).read_bytes() == good  # never replaced by the spoilt one
    with pytest.warns(UserWarning, match="continuing from"):
        fit(p := parts(), tmp_path / "r", resume=True)
    assert_equal_states(whole.model.state_dict(), p.model.state_dict())
    assert_equal_files(tmp_path / "whole" / PREVIOUS, tmp_path / "r" / PREVIOUS)


@pytest.mark.parametrize("how", SPOILT)
def test_two_spoilt_checkpoints_are_an_error_and_change_nothing(tmp_path, how):
    fit(parts(), tmp_path, epochs=2)
    for name in (LAST, PREVIOUS):
        SPOILT[how](tmp_path / name)
    p = parts()
    before = p.model.state_dict()
    with pytest.raises(kilter.KilterError, match=rf"{LAST}.*; .*{PREVIOUS}"):
        fit(p, tmp_path, resume=True)
    assert_equal_states(before, p.model.state_dict())
    assert p.optimizer.calls == 0


def test_killed_between_two_renames_the_one_before_is_taken(tmp_path):
    fit(parts(), tmp_path, epochs=2)
    (tmp_path / LAST).unlink()
    assert len(fit(parts(), tmp_path, epochs=2, resume=True)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 2}, "accumulate 2, got 1"),
        ({"ema": 0.9}, "model, optimizer, ema, Monitor0, got model, optimizer, Monitor0"),
        ({"dtype": "float16"}, "scaler"),
        ({"plateau": True}, "FollowPlateau0"),
        ({"norm": "none"}, "state: expected the names"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    fit(parts(), tmp_path, epochs=1)
    with pytest.raises(kilter.KilterError, match=message):
        fit(parts(**change), tmp_path, resume=True)


def test_other_data_are_refused(tmp_path):
    fit(parts(), tmp_path, epochs=1)
    p = parts()
    for name, batches in {
        "batches": Batches(*blobs(), 20, seed=3),
        "samples": Batches(*blobs(199), 32, seed=3),
        "seed": Batches(*blobs(), 32, seed=4),
    }.items():
        p.batches = batches
        with pytest.raises(kilter.KilterError, match=f"a run with {name}"):
            fit(p, tmp_path, resume=True)


def test_resume_needs_a_place():
    p = parts()
    with pytest.raises(kilter.KilterError, match="checkpoint: expected a folder to resume from, got None"):
        train.fit(p.model, p.optimizer, nn.softmax_cross_entropy, p.batches, epochs=1, resume=True)
    with pytest.raises(kilter.KilterError, match="every: expected None or a whole number"):
        train.Checkpoints("here", every=0)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_full_disk_leaves_two_good_checkpoints(tmp_path, monkeypatch, at):
    fit(parts(), tmp_path, epochs=2)
    before = {name: (tmp_path / name).read_bytes() for name in (LAST, PREVIOUS)}
    calls, real = count(), os.fsync

    def full(descriptor):
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit(parts(every=3), tmp_path, resume=True)
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, LAST]
    if at == 0:
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    for name in before:
        checkpoint.read(tmp_path / name)


# ---- killed


OPTIONS = {
    "hidden": 48,
    "epochs": 4 * KILLS,
    "batch-size": 32,
    "accumulate": 2,
    "dropout": 0.2,
    "mixup": 0.2,
    "ema": 0.98,
    "clip-norm": 2,
    "schedule": "one_cycle",
    "precision": "bf16",
    "checkpoint-every": 7,
}
FRESH = ["--monitor", *(str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value))]


def run(folder, *args, timeout=None):
    """Run the command, or kill it after so many seconds; what it said on stderr."""
    command = [sys.executable, "-m", "kilter", "train", *args]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as killed:  # by SIGKILL
        return (killed.stderr or b"").decode()
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows(path):
    with open(path, newline="") as file:
        return timeless(csv.DictReader(file))


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(tmp_path):
    before = time.time()
    assert run(tmp_path, *FRESH, "--out", "whole") == ""
    begin = (tmp_path / "whole" / "config.json").stat().st_mtime - before
    rng = np.random.default_rng()  # moments differ from run to run; the outcome must not
    for _ in range(KILLS):
        again = ["--resume", "cut"] if (tmp_path / "cut" / "config.json").exists() else [*FRESH, "--out", "cut"]
        assert run(tmp_path, *again, timeout=rng.uniform(0.8, 1.8) * begin) == ""
    assert run(tmp_path, "--resume", "cut") == ""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert sorted(os.listdir(whole)) == sorted(os.listdir(cut))
    assert_equal_files(whole / LAST, cut / LAST)
    assert_equal_states(train.load(whole / "model.safetensors").model, train.load(cut / "model.safetensors").model)
    assert rows(whole / "metrics.csv") == rows(cut / "metrics.csv")
