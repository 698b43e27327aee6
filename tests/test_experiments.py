"""The experiments: what they write and print; each runs at a size where it learns nothing."""

import csv
import importlib
from types import SimpleNamespace

import numpy as np
import pytest

from kilter import KilterError, cli, experiments
from kilter.experiments import report, task
from kilter.experiments.report import Claim, Result, Table

SMALL = {  # constants that make an experiment short
    "precision": {"IMAGES": 300, "EPOCHS": 2, "BATCH": 8, "HIDDEN": (8,), "SEEDS": 2},
    "optimizers": {"IMAGES": 300, "STEPS": 30, "WINDOW": 5, "HIDDEN": (8,), "SEEDS": 2, "KAPPA": 10.0},
}


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fake(claims, text="7"):
    table = Table(("name", "value"), [("one", 0.123456), (text, None)])
    return lambda seed: Result(table, tuple(claims), lambda figure: figure.subplots().plot([seed, 1]), (2, 2))


@pytest.fixture
def digits(monkeypatch):
    """The embedded digits, whether or not Fashion-MNIST is there."""

    def missing():
        raise KilterError("not here")

    monkeypatch.setattr("kilter.data.fashion_mnist", missing)


@pytest.mark.parametrize("name", experiments.NAMES)
def test_every_experiment_writes_its_table_figure_and_claims(name, tmp_path, monkeypatch, capsys, digits):
    module = importlib.import_module(f"kilter.experiments.{name}")
    assert module.__doc__
    for constant, value in SMALL.get(name, {}).items():
        assert hasattr(module, constant)
        monkeypatch.setattr(module, constant, value)
    assert cli.main(["experiment", name, "--out", str(tmp_path), "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    folder = tmp_path / name
    assert sorted(p.name for p in folder.iterdir()) == ["claims.csv", "figure.png", "table.csv"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    table, claims = rows(folder / "table.csv"), rows(folder / "claims.csv")
    assert table
    assert claims
    for row in table:
        assert next(iter(row.values())) in out
    for claim in claims:
        assert claim["held"] in ("True", "False")
        assert f"{'held    ' if claim['held'] == 'True' else 'NOT held'}  {claim['claim']} (" in out
        assert claim["seeds"] in ("", "3", "3 to 4", "4 to 5")


def test_all_collects_the_claims(tmp_path, monkeypatch, capsys):
    claims = [Claim("a", True, "1 of 1", ""), Claim("b", False, "2, 3", "0 to 4")]
    for name, given in (("first", claims), ("second", claims[:1])):
        monkeypatch.setitem(importlib.sys.modules, f"kilter.experiments.{name}", SimpleNamespace(run=fake(given)))
    monkeypatch.setattr(experiments, "NAMES", {"first": "the first", "second": "the second"})
    assert cli.main(["experiment", "all", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "first: the first" in printed
    assert "NOT held  b (2, 3; seeds 0 to 4)" in printed
    assert "2 of 3 claims held" in printed
    collected = rows(tmp_path / "out" / "claims.csv")
    assert [(row["experiment"], row["claim"], row["held"]) for row in collected] == [
        ("first", "a", "True"),
        ("first", "b", "False"),
        ("second", "a", "True"),
    ]


def test_tables_are_exact_in_files_and_short_on_the_screen(tmp_path):
    result = fake([], text='a "b", c')(0)
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


def test_the_schedules_keep_their_claims():
    result = importlib.import_module("kilter.experiments.schedules").run(0)
    assert all(claim.held for claim in result.claims)
    assert len(result.table.rows) == 20


def test_the_task(digits):
    name, data = task.images(100, "float16")
    assert name == "digits"
    assert [a.shape for a in data] == [(100, 64), (100,), (360, 64), (360,)]
    assert data.x_train.dtype == data.x_test.dtype == np.float16
    assert abs(float(data.x_train.mean(dtype=np.float64))) < 0.05
    assert task.spread([1.0, 3.0]) == pytest.approx(2**0.5)
