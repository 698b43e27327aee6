"""The benches on arrays so small that they only show that everything runs and the arithmetic is right."""

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from kilter import bench, cli
from kilter.bench import fills, groups, norms, optim, peers, rows, timing, training

BENCHES = Path(__file__).parents[1] / "benches"
MB = 1 << 20


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda case: timing.measure(case, seconds=0.0, least=1))
    monkeypatch.setattr(timing, "COPY_BYTES", MB)
    monkeypatch.setattr(norms, "SPECS", [((4, 6, 3, 3), 1, "float32"), ((4, 6), -1, "bfloat16")])
    monkeypatch.setattr(rows, "SPECS", [("layer", (3, 20), "float32"), ("rms", (3, 20), "bfloat16")])
    monkeypatch.setattr(groups, "SPECS", [((2, 6, 3, 3), 3, 1, "float32"), ((2, 3, 3, 6), 2, -1, "bfloat16")])
    monkeypatch.setattr(optim, "SPECS", [optim.Spec("adamw", "3 x 5"), optim.Spec("momentum", "1 x 40")])
    monkeypatch.setattr(fills, "SIZE", 100)
    monkeypatch.setattr(training, "SAMPLES", 50)
    monkeypatch.setattr(training, "BATCHES", (16,))
    monkeypatch.setattr(training, "ROUNDS", 1)


def case(work, yard, **more):
    return timing.Case("row", work, path_bytes=300, min_bytes=200, yard=yard, yard_bytes=1000, **more)


def test_a_row_is_bytes_over_the_median_time(monkeypatch):
    now = 0.0

    def lasting(*seconds):
        times = iter(seconds)

        def work():
            nonlocal now
            now += next(times)

        return work

    rests = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timing.time, "sleep", rests.append)
    # the first two calls warm up and count, then each sample follows a call that is not timed
    own, yard = lasting(99, 9, 7, 2e-6, 7, 3e-6, 7, 9e-6), lasting(99, 9, 7, 4e-6, 7, 5e-6, 7, 1e-6)
    peer = lasting(99, 9, 7, 1e-6, 7, 6e-6, 7, 8e-6)
    row = timing.measure(case(own, yard, peers={"peer": peer}), seconds=0.0, least=3)
    assert row.ms == pytest.approx(3e-3)
    assert row.peers == {"peer": pytest.approx(6e-3)}
    assert row.rate == pytest.approx(300 / 3e-6 / 1e9)
    assert row.yardstick == pytest.approx(1000 / 4e-6 / 1e9)
    assert row.share == pytest.approx((300 / 3) / (1000 / 4))
    assert row.repeat == 1
    assert rests == [timing.REST_SECONDS] * 9
    text = timing.line(row)
    assert "40%" in text
    assert "peer 0.006 2.0x" in text


def test_short_work_is_repeated_and_goes_round_by_turns():
    calls = []
    works = [lambda: calls.append("a"), lambda: calls.append("b")]
    times, counts = timing.by_turns(works, 0.0, 3, sample=1e-4)
    assert len(times) == 2
    assert min(counts) > 1
    warm = ["a"] * 2 + ["b"] * 2
    assert calls == warm + (["a"] * (1 + counts[0]) + ["b"] * (1 + counts[1])) * 3


@pytest.mark.parametrize(
    ("shape", "axis", "itemsize", "inputs", "once"),
    [
        ((64, 256, 56, 56), 1, 4, 1, True),  # 0.8 MB for each channel
        ((64, 256, 56, 56), 1, 4, 2, True),
        ((640, 256, 56, 56), 1, 4, 1, False),
        ((4000, 1000, 8, 9), 1, 4, 1, False),  # walked by 15 channels
        ((100, 1600, 8, 8), 1, 4, 1, False),  # summed as a matrix
        ((64, 3, 300, 300), 1, 4, 1, False),  # too few channels for the threads
        ((64, 56, 56, 256), -1, 4, 1, False),
        ((8192, 1024), 1, 4, 1, False),
        ((2048, 1024), 1, 4, 1, True),  # all of it fits
        ((4096, 1024), 1, 4, 2, False),
        ((4096, 1024), 1, 2, 2, True),
    ],
)
def test_what_stays_in_cache_is_read_once(monkeypatch, shape, axis, itemsize, inputs, once):
    monkeypatch.setattr(norms, "_shared_cache", lambda: 32 * MB)
    assert norms.reads_once(shape, axis, itemsize, inputs) == once


def test_path_bytes(monkeypatch):
    size = 4 * 6 * 9 * 4
    for cache, streams in ((32 * MB, (2, 2, 3)), (0, (3, 2, 5))):
        monkeypatch.setattr(norms, "_shared_cache", lambda cache=cache: cache)
        spec = ((4, 3, 3, 6), -1, "float32")
        for what, path, least in zip(("forward", "inference", "backward"), streams, (2, 2, 3), strict=True):
            found = norms.case(spec, what)
            assert (found.path_bytes, found.min_bytes) == (path * size, least * size)
    for rule, streams in (("adamw", 7), ("momentum", 5), ("rmsprop, window of 10", 13), ("adadelta, window of 10", 25)):
        found = optim.case(optim.Spec(rule, "3 x 50"))
        assert found.path_bytes == found.min_bytes == found.yard_bytes == 4 * 150 * streams
    for dtype, extra, path, least in (
        ("float32", "clip", 32, 28),
        ("float32", "scaler", 32, 28),
        ("float32", "ema", 44, 40),
        ("bfloat16", "", 28, 28),
        ("bfloat16", "scaler", 30, 28),
        ("bfloat16", "ema", 40, 38),
    ):
        found = optim.case(optim.Spec("adamw", "2 x 10", dtype, extra))
        assert (found.path_bytes, found.min_bytes) == (20 * path, 20 * least)
    assert fills.case("normal", 50).path_bytes == 200


def test_new_array_or_not():
    spec = ((4, 6), 1, "float32")
    reused, new = (norms.case(spec, what).work for what in ("forward", "forward, new array"))
    assert np.shares_memory(reused()[0], reused()[0])
    assert not np.shares_memory(new()[0], new()[0])


FOUND = peers.installed(("numpy", "torch", "jax"))


@pytest.fixture(params=FOUND, ids=lambda peer: peer.name)
def peer(request):
    return request.param


@pytest.mark.parametrize(("shape", "axis"), [((5, 6, 3, 2), 1), ((5, 3, 2, 6), -1), ((7, 6), 1)])
def test_peers_do_the_same_batch_norm(peer, shape, axis):
    for what in ("forward", "backward"):
        found = norms.case((shape, axis, "float32"), what, [peer])
        own, other = found.work()[0], found.peers[peer.name]()
        other = np.asarray(other[0] if isinstance(other, tuple) else other)
        if own.shape != other.shape:
            other = np.moveaxis(other, 1, -1)
        np.testing.assert_allclose(other, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["layer", "rms"])
def test_peers_do_the_same_row_norms(peer, op):
    for what in ("forward", "backward"):
        found = rows.case((op, (7, 20), "float32"), what, [peer])
        own, other = found.work()[0], found.peers[peer.name]()
        other = np.asarray(other[0] if isinstance(other, tuple) else other)
        np.testing.assert_allclose(other, own, rtol=1e-4, atol=1e-5)
        assert found.path_bytes == found.min_bytes == 7 * 20 * 4 * (2 if what == "forward" else 3)


@pytest.mark.parametrize(("shape", "axis"), [((5, 6, 3, 4), 1), ((5, 3, 4, 6), -1)], ids=str)
def test_peers_do_the_same_group_norm(peer, shape, axis):
    for what in ("forward", "backward"):
        found = groups.case((shape, 2, axis, "float32"), what, [peer])
        own, other = found.work()[0], found.peers[peer.name]()
        other = np.asarray(other[0] if isinstance(other, tuple) else other)
        if peer.name == "torch" and axis == -1:
            other = np.moveaxis(other, 1, -1)
        np.testing.assert_allclose(other.reshape(shape), own, rtol=1e-4, atol=1e-5)
        assert found.path_bytes == found.min_bytes == 360 * 4 * (2 if what == "forward" else 3)


@pytest.mark.parametrize("rule", ["adamw", "momentum"])
def test_numpy_takes_the_same_steps(rule):
    p, g = np.linspace(-1, 1, 9), np.linspace(2, -1, 9)
    ours = p.copy()
    optimizer, m, v = optim.RULES[rule].make([ours]), np.zeros(9), np.zeros(9)
    for t in range(1, 4):
        optimizer.step([g])
        p, m, v = peers.step(np, rule, p, g, m, v, t)
    np.testing.assert_allclose(p, ours, rtol=1e-12)


@pytest.mark.parametrize("rule", optim.RULES)
def test_every_step_runs(rule):
    for extra in ("", "clip", "scaler", "ema"):
        for dtype in ("float32", "bfloat16"):
            found = optim.case(optim.Spec(rule, "2 x 30", dtype, extra), FOUND)
            for work in (found.work, found.yard, *found.peers.values()):
                work()


def test_the_tensors_of_resnet_50():
    sizes = optim.sizes_of("ResNet-50")
    assert (len(sizes), sum(sizes)) == (161, 25_557_032)
    assert optim.sizes_of("10,000 x 64") == [64] * 10_000


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_peers_fill(peer, kind):
    out = np.full(100, 7, np.float32)
    result = np.asarray(peer.fill(kind, out)())
    assert (result != 7).all()


def test_every_part_runs_and_is_written_as_json(tiny, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {part: len(rows) for part, rows in found.items()} == {
        "norms": 20,
        "optim": 2,
        "init": 2,
        "train": 1,
    }
    printed = capsys.readouterr().out
    for part in ("norms", "optim", "init"):
        for row in found[part]:
            assert row["name"] in printed
            assert row["ms"] > 0
            assert row["yardstick"] > 0
            assert row["share"] == pytest.approx(row["path_bytes"] / row["ms"] / 1e6 / row["yardstick"])
    assert "numpy" in found["norms"][0]["peers"]
    assert "numpy" not in found["norms"][4]["peers"]  # it has no bfloat16
    (row,) = found["train"]
    assert row["batch"] == 16
    assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
    assert {"batches", "linear layers", "batch norm and relu", "loss", "optimizer"} <= set(row["parts"])


def test_the_clock_does_not_change_what_is_trained():
    x, y, _ = training.samples(40)
    params = []
    for clocked in (False, True):
        model = training.mlp(784, 10, hidden=(8,), seed=0)
        optimizer, batches = training.AdamW(model.params()), training.Batches(x, y, 16, seed=0)
        if clocked:
            training.split(model, optimizer, batches)
        else:
            training.fit(model, optimizer, training.softmax_cross_entropy, batches, epochs=1, progress=False)
        params.append(model.state_dict())
    for name in params[0]:
        np.testing.assert_array_equal(params[0][name], params[1][name], err_msg=name)


def test_without_fashion_mnist_noise_is_trained(monkeypatch):
    def missing():
        raise training.KilterError("path: no")

    monkeypatch.setattr(training, "fashion_mnist", missing)
    x, y, name = training.samples(100)
    assert (x.shape, y.shape, name) == ((100, 784), (100,), "noise")
    assert 0 <= y.min() < y.max() < 10


def test_threads_are_compared():
    script = runpy.run_path(str(BENCHES / "threads.py"))
    rows = list(script["compared"](pairs=1))
    assert [row[0] for row in rows] == [found.name for found in script["cases"]()]
    assert all(min(one, two, ratio) > 0 for _, one, two, ratio in rows)


def test_epochs_of_both_networks_are_timed(monkeypatch, capsys):
    script = runpy.run_path(str(BENCHES / "epoch.py"))
    known = script["main"].__globals__
    x = np.random.default_rng(0).standard_normal((300, 1, 28, 28), np.float32)
    data = types.SimpleNamespace(x_train=x, y_train=np.arange(300) % 10)
    monkeypatch.setitem(known, "fashion_mnist", lambda: data)
    monkeypatch.setitem(known, "find_spec", lambda name: None)
    monkeypatch.setitem(known, "ROUNDS", 1)
    script["main"](["--samples", "256"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(name, library) for name, library, *_ in lines] == [("mlp", "with_kilter"), ("cnn", "with_kilter")]


def test_compare_says_what_is_missing(monkeypatch, capsys):
    script = runpy.run_path(str(BENCHES / "compare.py"))
    ran = []
    monkeypatch.setattr(bench, "main", lambda part, found: ran.append((part, found)))
    monkeypatch.setitem(script["main"].__globals__, "installed", lambda names: [peers.NumPy()])
    script["main"](["optim", "init"])
    assert ran == [("optim", ["numpy"]), ("init", ["numpy"])]
    assert capsys.readouterr().out.splitlines() == [
        "torch: not installed, left out",
        "jax: not installed, left out",
    ]


def test_a_peer_that_is_missing_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name != "numpy" else object())
    assert [peer.name for peer in peers.installed(("numpy", "torch", "jax"))] == ["numpy"]
