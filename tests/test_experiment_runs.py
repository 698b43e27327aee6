"""Every experiment at a size where it learns nothing: what it writes and prints."""

import csv
import importlib
import re

import numpy as np
import pytest

from kilter import KilterError, cli, experiments
from kilter.experiments import report, task

TEXTS = (report.ESSAY, report.SURVEY, report.GUIDE, report.NOTES, report.TRICKS, report.OWN)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def digits(monkeypatch):
    """The embedded digits, whether or not Fashion-MNIST is there."""

    def missing():
        raise KilterError("not here")

    monkeypatch.setattr("kilter.data.fashion_mnist", missing)


@pytest.mark.parametrize("name", experiments.NAMES)
def test_every_experiment_writes_its_table_figure_and_claims(name, tmp_path, capsys, digits):
    assert importlib.import_module(f"kilter.experiments.{name}").__doc__
    assert cli.main(["experiment", name, "--quick", "--out", str(tmp_path), "--seed", "3"]) == 0
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
        assert claim["text"] in TEXTS
        assert re.fullmatch(r"|[34]( to \d+)?", claim["seeds"])
        assert claim["numbers"]


def test_the_task(digits):
    name, data = task.images(100, test=50)
    assert name == "digits"
    assert [a.shape for a in data] == [(100, 64), (100,), (50, 64), (50,)]
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    assert abs(float(data.x_train.mean(dtype=np.float64))) < 0.05
