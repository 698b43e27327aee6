"""What experiments share: files, screen, summary, the task, differences over seeds."""

import csv
import importlib
from types import SimpleNamespace

import numpy as np
import pytest

from kilter import KilterError, cli, experiments, nn
from kilter.data import digits
from kilter.experiments import compare, report, task
from kilter.experiments.report import Claim, Result, Table
from kilter.train import evaluate


def fake(claims, text="7"):
    table = Table(("name", "value"), [("one", 0.123456), (text, None)])
    return lambda seed, quick: Result(table, tuple(claims), lambda figure: figure.subplots().plot([seed, 1]), (2, 2))


def test_all_collects_the_claims(tmp_path, monkeypatch, capsys):
    claims = [Claim(report.NOTES, "a", True, "1 of 1", ""), Claim(report.ESSAY, "b", False, "2, 3", "0 to 4")]
    for name, given in (("first", claims), ("second", claims[:1])):
        monkeypatch.setitem(importlib.sys.modules, f"kilter.experiments.{name}", SimpleNamespace(run=fake(given)))
    monkeypatch.setattr(experiments, "NAMES", {"first": "the first", "second": "the second"})
    assert cli.main(["experiment", "all", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "first: the first" in printed
    summary = printed[printed.index("essay on batch norm: 0 of 1 held here") :].splitlines()
    assert summary[1:6] == [
        "NOT held  b (2, 3; seeds 0 to 4)",
        "",
        "notes on optimizers: 2 of 2 held here",
        "held      a (1 of 1)",
        "held      a (1 of 1)",
    ]
    assert summary[-1].startswith("2 of 3 claims held; ")
    with open(tmp_path / "out" / "claims.csv", newline="", encoding="utf-8") as file:
        collected = list(csv.DictReader(file))
    assert [(row["experiment"], row["text"], row["claim"], row["held"]) for row in collected] == [
        ("first", "notes on optimizers", "a", "True"),
        ("first", "essay on batch norm", "b", "False"),
        ("second", "notes on optimizers", "a", "True"),
    ]


def test_tables_are_exact_in_files_and_short_on_the_screen(tmp_path):
    result = fake([], text='a "b", c')(0, False)
    report.write(tmp_path, result)
    assert (tmp_path / "table.csv").read_text() == 'name,value\none,0.123456\n"a ""b"", c",\n'
    assert report.text(result.table).splitlines() == ["name       value", "one       0.1235", 'a "b", c']
    assert report.seeds(4, 1) == "4"
    assert report.seeds(4, 3) == "4 to 6"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["dance"], ["NAME", "dance", "schedules", "all"]), (["schedules", "--seed", "-1"], ["seed"]), ([], ["NAME"])],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, capsys):
    assert cli.main(["experiment", *arguments, "--out", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert not (tmp_path / "x").exists()
    with pytest.raises(KilterError, match=r"^experiment: expected"):
        experiments.run(["dance"], tmp_path / "x")


def test_a_missing_extra_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(importlib.sys.modules, "matplotlib", None)
    assert cli.main(["experiment", "schedules", "--out", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "kilter: matplotlib is not installed: pip install 'kilter[train]'\n")
    assert not (tmp_path / "x").exists()


def test_quick_is_passed_on(tmp_path, monkeypatch):
    seen = []

    def run(seed, quick):
        seen.append((seed, quick))
        return fake([])(seed, quick)

    monkeypatch.setitem(importlib.sys.modules, "kilter.experiments.schedules", SimpleNamespace(run=run))
    experiments.run(["schedules"], tmp_path, 5)
    experiments.run(["schedules"], tmp_path, 5, quick=True)
    assert seen == [(5, False), (5, True)]


def test_a_watch_keeps_its_own_time_out(monkeypatch):
    clock = iter([10.0, 11.0, 15.0, 17.0, 18.0])  # start; two looks, each from and to
    monkeypatch.setattr(task.time, "perf_counter", lambda: next(clock))
    model = nn.mlp(64, 10, hidden=(4,))
    found = task.rows(digits(), 60)
    watch = task.Watch(found.x_test, found.y_test, every=2)
    state = SimpleNamespace(model=model, step=0)
    watch.on_start(state)
    for state.step in range(1, 5):
        watch.on_step(state)
    curve = watch.curve()
    np.testing.assert_array_equal(curve.steps, [2, 4])
    np.testing.assert_array_equal(curve.seconds, [1, 3])
    assert curve.accuracy[0] == pytest.approx(evaluate(model, (found.x_test, found.y_test)).accuracy)


def test_when_a_curve_reaches_an_accuracy():
    curve = task.Curve(*np.array([[10, 20, 30], [1.0, 2.0, 3.0], [0.5, 0.8, 0.7], [3, 2, 1]]))
    assert curve.reached(0.7) == (20, 2.0)
    assert curve.reached(0.5) == (10, 1.0)
    assert curve.reached(0.9) is None
    assert task.Watch(None, None, 1).curve().reached(0.1) is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 9, 19, 99])
def test_quantiles_are_those_of_student(freedom):
    wanted = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 7: 2.36462, 9: 2.26216, 19: 2.09302, 99: 1.98422}
    assert compare.student(freedom) == pytest.approx(wanted[freedom], rel=0.01 if freedom > 2 else 1e-5)


def test_differences_of_pairs():
    gap = compare.difference([2.0, 3.0, 4.0, 6.0], [1.0, 1.0, 1.0, 1.0])  # 1, 2, 3, 5: mean 2.75, sd 1.708
    assert gap.mean == pytest.approx(2.75)
    assert gap.half == pytest.approx(3.18245 * 1.70783 / 2, rel=0.01)
    assert (gap.first_higher, gap.pairs, gap.above, gap.below, gap.clear) == (4, 4, True, False, True)
    assert str(gap) == "difference +2.75 ± 2.7"
    less = compare.difference([1.0, 1.0, 1.0, 1.0], [2.0, 3.0, 4.0, 6.0])
    assert (less.above, less.below, less.clear) == (False, True, True)
    assert not compare.difference([1.0, 2.0], [2.0, 1.0]).clear
    assert compare.spread([1.0, 3.0]) == pytest.approx(2**0.5)
    assert compare.mean_and_spread([1.0, 3.0]) == "2 ± 1.4"
    for first, second in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(KilterError, match=r"^first, second: expected"):
            compare.difference(first, second)


def test_an_interval_holds_the_truth_95_times_in_100():
    pairs = np.random.default_rng(0).standard_normal((2000, 5))
    held = [not compare.difference(row, np.zeros(5)).clear for row in pairs]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
