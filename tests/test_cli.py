"""The command line, as a user runs it."""

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import kilter as package
from kilter import cli, train

CHECKPOINTS = ["last.previous.safetensors", "last.safetensors"]
FILES = ["config.json", "curves.png", *CHECKPOINTS, "metrics.csv", "model.safetensors"]
FAST = ("train", "--hidden", "16", "--epochs", "2")


def kilter(*args, cwd, **kwargs):
    command = [sys.executable, "-m", "kilter", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, **kwargs)


def assert_one_line(done, status, *words):
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("kilter: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""


def test_train_without_options(tmp_path):
    done = kilter("train", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no terminal, no bar
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-mlp-batch-")
    assert sorted(os.listdir(folder)) == FILES
    for word in (
        "digits",
        "1,437",
        "360",
        "parameters",
        "test accuracy",
        "images/s",
        str(folder.relative_to(tmp_path)),
    ):
        assert word in done.stdout
    assert len((folder / "metrics.csv").read_text().splitlines()) == 31


def test_two_runs_get_two_folders(tmp_path):
    for _ in range(2):
        assert kilter(*FAST, "--norm", "none", cwd=tmp_path).returncode == 0
    folders = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("digits-mlp-none-") for name in folders)


@pytest.mark.parametrize(("norm", "words"), [("layer", "layer norm"), ("rms", "RMS norm")])
def test_norms_of_rows_train(tmp_path, norm, words):
    done = kilter(*FAST, "--norm", norm, cwd=tmp_path)
    assert done.returncode == 0 and words in done.stdout


def test_every_option_arrives(tmp_path):
    assert kilter(*FAST, "--hidden", "64", "--out", "before", cwd=tmp_path).returncode == 0
    options = {
        "data": "digits",
        "model": "mlp",
        "norm": "none",
        "hidden": "64,16",
        "dropout": "0.1",
        "optimizer": "sgd",
        "lr": "0.03",
        "weight-decay": "0.001",
        "clip-norm": "2",
        "schedule": "linear",
        "warmup": "0.5",
        "batch-size": "50",
        "accumulate": "2",
        "base-batch": "64",
        "epochs": "3",
        "label-smoothing": "0.1",
        "smooth-others": "rest",
        "mixup": "0.2",
        "cutmix": "0.5",
        "augment": "crop,noise",
        "ema": "0.9",
        "precision": "fp16",
        "device": "cpu",
        "from": "before",
        "freeze": "1",
        "checkpoint-every": "5",
        "seed": "7",
    }
    flat = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = kilter("train", *flat, "--monitor", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "here" / "config.json").read_text())["run"]
    assert run == train.load(tmp_path / "here" / "model.safetensors").metadata["run"]
    given = {"start" if name == "from" else name.replace("-", "_"): value for name, value in options.items()}
    assert run.keys() == given.keys() | {"monitor"}
    assert run.pop("monitor") is True
    for name, value in run.items():
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        assert shown in (given[name], f"{given[name]}.0"), name
    for words in ("lr 0.03 per 64 samples", "accumulate 2", "augment crop and noise", "precision fp16", "of before"):
        assert words in done.stdout


def test_train_on_a_file(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    x = rng.standard_normal((60, 5)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    done = kilter(*FAST, "--data", "mine.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mine: 60 training and 60 test" in done.stdout
    assert "mlp 5-16-3" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "many"], ["--epochs", "many", "kilter train --help"]),
        (["--norm", "weight"], ["--norm", "weight", "batch"]),
        (["--colour", "red"], ["--colour"]),
        (["--hidden", "10,x"], ["--hidden", "sizes such as 256,128", "10,x"]),
        (["--hidden", "0"], ["--hidden"]),
        (["--hidden", "999999999999"], ["kilter: "]),
        (["--seed", "99999999999999999999999"], ["seed"]),
        (["--lr", "-1"], ["lr"]),
        (["--batch-size", "1"], ["batch_size", "at least 2"]),
        (["--data", "nowhere.npz"], ["data", "nowhere.npz", "digits"]),
        (["--data", "bad.npz"], ["data", "bad.npz"]),
        (["--out", "full"], ["full", "empty folder"]),
        (["--out", "bad.npz"], ["bad.npz", "folder"]),
        (["--out", "bad.npz/run"], ["bad.npz"]),
        (["--out", "/proc/kilter/run"], ["/proc/kilter"]),
    ],
    ids=lambda value: "-".join(value) if value and value[0].startswith("--") else "",
)
def test_mistakes_are_one_line(tmp_path, options, words):
    (tmp_path / "bad.npz").write_bytes(b"no zip file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert_one_line(kilter("train", *options, cwd=tmp_path), 2, *words)
    assert not (tmp_path / "runs").exists()
    assert os.listdir(tmp_path / "full") == ["letter.txt"]


def test_a_diverging_run_is_one_line_and_leaves_a_valid_folder(tmp_path):
    done = kilter("train", "--norm", "none", "--optimizer", "sgd", "--lr", "1e30", "--out", "r", cwd=tmp_path)
    assert_one_line(done, 2, "loss: expected a finite number", "smaller lr")
    assert sorted(os.listdir(tmp_path / "r")) == [name for name in FILES if "previous" not in name]


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kilter.data.sources._places", lambda: [tmp_path])
    assert cli.main(["train", "--data", "fashion-mnist", "--out", str(tmp_path / "r")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kilter: ")
    assert err.count("\n") == 1
    assert "apt-get install dataset-fashion-mnist" in err


def test_bench_runs_the_parts_that_were_named(monkeypatch):
    ran = []
    fake = SimpleNamespace(main=ran.append)
    monkeypatch.setitem(sys.modules, "kilter.bench", fake)
    monkeypatch.setattr(package, "bench", fake, raising=False)
    assert cli.main(["bench", "optim", "norms"]) == 0
    assert ran == ["optim", "norms"]
    ran.clear()
    assert cli.main(["bench"]) == 0
    assert ran == ["norms", "optim", "init", "train"]


@pytest.mark.parametrize("name", ["safetensors", "matplotlib", "tqdm"])
def test_a_missing_extra_says_how_to_get_it(tmp_path, name):
    script = f"import sys; sys.modules[{name!r}] = None; from kilter.cli import main; sys.exit(main(['train']))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert_one_line(done, 2, name, "pip install 'kilter[train]'")
    assert os.listdir(tmp_path) == []


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    done = kilter("train", "--hidden", "256", "--out", "r", cwd=tmp_path, preexec_fn=small_files)
    assert_one_line(done, 2, "File too large")
    assert sorted(os.listdir(tmp_path / "r")) == ["config.json", "metrics.csv"]


def start(args, cwd):
    command = [sys.executable, "-m", "kilter", *args]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_ctrl_c_leaves_a_valid_run_folder(tmp_path):
    process = start(["train", "--epochs", "100000", "--out", "r"], tmp_path)
    deadline = time.monotonic() + 60
    while lines(tmp_path / "r" / "metrics.csv") < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.startswith("kilter: interrupted after ")
    assert err.count("\n") == 1
    assert "100000 epochs; the run so far is in r, and kilter train --resume r continues it" in err
    assert sorted(os.listdir(tmp_path / "r")) == FILES
    epochs = lines(tmp_path / "r" / "metrics.csv") - 1
    assert epochs >= 3
    assert f"after {epochs} of" in err
    assert train.load(tmp_path / "r" / "model.safetensors").metadata["epochs"] == epochs
    assert (tmp_path / "r" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_terminal_sees_a_bar(tmp_path):
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kilter", *FAST], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=secondary
    )
    os.close(secondary)
    seen = b""
    while True:
        try:
            part = os.read(primary, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(primary)
    assert process.wait(timeout=60) == 0
    for word in (b"epoch 2/2", b"loss", b"acc", b"valid", b"img/s", b"left"):
        assert word in seen


def test_info(tmp_path):
    done = kilter("info", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    for word in ("kilter", "numpy", "BLAS", "CPU level", "threads", "safetensors", "matplotlib", "tqdm"):
        assert word in done.stdout


def test_help_and_no_command(tmp_path):
    done = kilter("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("train", "info", "bench"):
        assert word in done.stdout
    done = kilter("train", "--help", cwd=tmp_path)
    for word in ("--data", "fashion-mnist", "--label-smoothing", "default"):
        assert word in done.stdout
    assert_one_line(kilter(cwd=tmp_path), 2, "COMMAND")
    assert_one_line(kilter("dance", cwd=tmp_path), 2, "dance")
    assert_one_line(kilter("bench", "dance", cwd=tmp_path), 2, "dance")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    process = start(["info"], tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)
