"""What goes wrong is one line on stderr and a status, and leaves nothing half written."""

import csv
import gzip
import json
import os
import struct
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from kilter import cli
from kilter.data.sources import FASHION_MNIST
from kilter.train import checkpoint
from small import blobs

FAST = ["train", "--hidden", "8", "--epochs", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(capsys, *args, words=(), status=2):
    assert cli.main([str(word) for word in args]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kilter: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return err


# ---- data


def npz(**change):
    x, y = blobs(40)
    arrays = {"x_train": x, "y_train": y, "x_test": x[:9], "y_test": y[:9]} | change
    np.savez("d.npz", **{name: a for name, a in arrays.items() if a is not None})


def damaged_zip():
    npz()
    with open("d.npz", "r+b") as file:
        file.seek(300)
        file.write(b"\xff" * 40)


def text():
    Path("d.npz").write_text("x,y\n1,2\n")


def cut():
    npz()
    os.truncate("d.npz", 700)


BAD_DATA = {
    "text": (text, ["d.npz", "expected an .npz file"]),
    "cut off": (cut, ["d.npz", "expected an .npz file"]),
    "damaged": (damaged_zip, ["d.npz"]),
    "a folder": (lambda: os.mkdir("d.npz"), ["d.npz"]),
    "an array missing": (lambda: npz(y_test=None), ["got no y_test"]),
    "objects": (lambda: npz(x_train=np.array([[object()]] * 40)), ["expected an .npz file"]),
    "no samples": (lambda: npz(x_test=np.zeros((0, 4)), y_test=np.zeros(0, int)), ["y_test"]),
    "no width": (lambda: npz(x_train=np.zeros((40, 0)), x_test=np.zeros((9, 0))), ["expected"]),
    "one axis": (lambda: npz(x_train=np.zeros(40)), ["x_train"]),
    "other samples": (lambda: npz(x_test=np.zeros((9, 5))), ["x_test", "(4,)", "(5,)"]),
    "too few labels": (lambda: npz(y_train=np.zeros(7, int)), ["y_train", "40", "7"]),
    "labels of numbers": (lambda: npz(y_train=np.zeros(40)), ["y_train", "integer labels"]),
    "negative labels": (lambda: npz(y_train=np.full(40, -1)), ["y_train", "at least 0"]),
    "labels far away": (lambda: npz(y_test=np.full(9, 10**9)), ["labels 0, 1, 2"]),
    "NaN": (lambda: npz(x_test=np.full((9, 4), np.nan)), ["x_test", "finite"]),
    "words": (lambda: npz(x_train=np.full((40, 4), "a")), ["x_train"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_files(capsys, case):
    make, words = BAD_DATA[case]
    make()
    fails(capsys, *FAST, "--data", "d.npz", "--out", "r", words=words)
    assert not os.path.exists("r")


def idx(array, kind=8):
    header = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


IMAGES, LABELS = np.zeros((3, 28, 28), np.uint8), np.arange(3)
BAD_IDX = {
    "cut off": ({0: gzip.compress(idx(IMAGES))[:-9]}, ["complete gzip"]),
    "no IDX": ({1: b"hello, this is text"}, ["IDX"]),
    "short": ({2: idx(IMAGES)[:-1]}, ["bytes"]),
    "other images": ({0: idx(IMAGES[:, :9])}, ["(N, 28, 28)"]),
    "labels out of range": ({1: idx(np.array([1, 2, 200]))}, ["labels 0..9", "200"]),
    "too few labels": ({3: idx(LABELS[:2])}, ["3 uint8 labels"]),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files(capsys, monkeypatch, case):
    change, words = BAD_IDX[case]
    os.mkdir("d")
    for at, (name, good) in enumerate(zip(FASHION_MNIST, [IMAGES, LABELS] * 2, strict=True)):
        Path("d", name).write_bytes(change.get(at, idx(good)))
    monkeypatch.setenv("KILTER_DATA", "d")
    fails(capsys, *FAST, "--data", "fashion-mnist", "--out", "r", words=words)
    assert not os.path.exists("r")


# ---- options


def earlier(*options):
    """A run in the folder `before`."""
    assert cli.main([*FAST, "--out", "before", *options]) == 0


BAD_OPTIONS = {
    "no number": (["--mixup", "much"], ["--mixup", "expected a number, got 'much'"]),
    "no whole number": (["--accumulate", "1.5"], ["--accumulate", "expected a whole number, got '1.5'"]),
    "no rate": (["--lr", "fast"], ["--lr", "a number or 'find'"]),
    "accumulate": (["--accumulate", "0"], ["accumulate: expected at least 1"]),
    "mixup": (["--mixup", "-1"], ["mixup"]),
    "cutmix": (["--cutmix", "nan"], ["cutmix"]),
    "augment": (["--augment", "flip,spin"], ["augment", "'spin'", "crop"]),
    "average": (["--ema", "1"], ["decay"]),
    "clip": (["--clip-norm", "0"], ["clip_norm"]),
    "base batch": (["--base-batch", "0"], ["base_batch"]),
    "base batch of a measured rate": (["--base-batch", "64", "--lr", "find"], ["base_batch", "find"]),
    "steps": (["--checkpoint-every", "0"], ["every"]),
    "others": (["--smooth-others", "most"], ["--smooth-others", "rest"]),
    "precision": (["--precision", "fp8"], ["--precision", "bf16"]),
    "from nowhere": (["--from", "nowhere"], ["nowhere", "no such file"]),
    "from a folder of letters": (["--from", "letters"], ["letters", "no such file"]),
    "from what does not fit": (["--from", "before", "--hidden", "9", "--data", "d.npz"], ["from", "before"]),
    "freeze what is not there": (["--freeze", "7"], ["'7'"]),
    "freeze all": (["--freeze", "1,2,3"], ["freeze", "something left to train"]),
    "resume and train": (["--resume", "before"], ["--resume", "--hidden", "--epochs"]),
    "images of vectors": (["--data", "d.npz", "--augment", "flip"], ["flip", "expected images", "(4,)"]),
    "parts of vectors": (["--data", "d.npz", "--cutmix", "1"], ["cutmix", "expected images"]),
    "no folder": (["--out", "d.npz"], ["d.npz", "expected a folder"]),
    "below a file": (["--out", "d.npz/r"], ["d.npz"]),
    "an unwritable folder": (["--out", "/proc/r"], ["/proc/r"]),
    "a folder of letters": (["--out", "letters"], ["letters", "empty folder"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(capsys, case):
    options, words = BAD_OPTIONS[case]
    npz()
    os.mkdir("letters")
    Path("letters/letter.txt").write_text("dear")
    if "before" in options:
        earlier()
        capsys.readouterr()
    fails(capsys, *FAST, *options, words=words)
    assert sorted(os.listdir()) == sorted(["d.npz", "letters", *(["before"] if "before" in options else [])])
    assert os.listdir("letters") == ["letter.txt"]


def test_no_gpu_is_one_line(capsys):
    if sys.modules.get("cupy") is None and os.path.exists("/dev/nvidia0"):
        pytest.skip("there may be one")
    fails(capsys, *FAST, "--device", "cuda", "--out", "r", words=["device: expected", "'cuda'"])
    assert not os.path.exists("r")


def spoil(name, content):
    Path("before", name).write_bytes(content)


def changed_config(**change):
    config = json.loads(Path("before/config.json").read_text())
    config["run"] |= change
    spoil("config.json", json.dumps(config).encode())


def spoil_both():
    for name in ("last.safetensors", "last.previous.safetensors"):
        spoil(name, b"\x80\x04cos\nsystem\n")


BAD_RUNS = {
    "no folder": (lambda: os.rename("before", "gone"), ["before/config.json", "No such file"]),
    "no configuration": (lambda: spoil("config.json", b"[]"), ["before/config.json"]),
    "damaged configuration": (lambda: spoil("config.json", b'{"run": {'), ["before/config.json"]),
    "of another version": (lambda: changed_config(colour="red"), ["config.json", "colour"]),
    "impossible": (lambda: changed_config(norm="weight"), ["norm", "'weight'"]),
    "of another network": (lambda: changed_config(hidden=[9]), ["last.safetensors", "shape"]),
    "no checkpoint that can be read": (spoil_both, ["last.safetensors", "last.previous.safetensors", "expected"]),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_runs_that_cannot_be_resumed(capsys, case):
    make, words = BAD_RUNS[case]
    earlier()
    make()
    files = {path: path.read_bytes() for path in Path().glob("*/*")}
    capsys.readouterr()
    fails(capsys, "train", "--resume", "before", words=words)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_spoilt_checkpoint_is_named_and_the_run_goes_on(capsys):
    earlier()
    spoil("last.safetensors", b"nothing")
    capsys.readouterr()
    assert cli.main(["train", "--resume", "before"]) == 0
    out, err = capsys.readouterr()
    assert "2 epochs" in out
    assert err.startswith("kilter: before/last.safetensors: expected a kilter checkpoint")
    assert "continuing from last.previous.safetensors" in err
    assert err.count("\n") == 1


# ---- the disk


def assert_whole(folder):
    """Every file is one that can be read."""
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        if name.endswith(".safetensors"):
            checkpoint.read(path)
        elif name == "metrics.csv":
            with open(path, newline="") as file:
                assert all(None not in row.values() and None not in row for row in csv.DictReader(file))
        elif name == "config.json":
            json.loads(Path(path).read_text())
        else:
            assert name == "curves.png"
            assert Path(path).read_bytes().endswith(b"IEND\xaeB\x60\x82")


@pytest.mark.parametrize("at", range(7))
def test_a_full_disk(capsys, monkeypatch, at):
    """The files of a run wait for the disk one after the other: each may be the one that finds it full."""
    calls, real = count(), os.fsync

    def full(descriptor):
        if next(calls) >= at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    fails(capsys, *FAST, "--out", "r", words=["No space left on device"])
    assert_whole("r")
    monkeypatch.setattr(os, "fsync", real)
    if at:
        assert cli.main(["train", "--resume", "r"]) == 0
        assert_whole("r")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("command", [["info"], [*FAST, "--out", "r"]])
def test_a_full_disk_under_the_output(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kilter", *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == "kilter: [Errno 28] No space left on device\n"
