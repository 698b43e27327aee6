"""The schedule that follows a metric."""

import math

import numpy as np
import pytest

from kilter import optim, schedule
from support import refused


def lowered(metrics, **options):
    """The value after each metric."""
    plateau = schedule.Plateau(1.0, **options)
    values = []
    for metric in metrics:
        plateau.update(metric)
        values.append(plateau(len(values)))
    return values


@pytest.mark.parametrize(
    ("metrics", "options", "expected"),
    [
        ([3, 2, 1, 0.5], {"patience": 0}, [1, 1, 1, 1]),
        ([1, 1, 1, 1, 1], {"patience": 0}, [1, 0.1, 0.01, 0.001, 0.0001]),
        ([1, 1, 1, 1, 1, 1, 1], {"patience": 2, "factor": 0.5}, [1, 1, 1, 0.5, 0.5, 0.5, 0.25]),
        ([1, 2, 0.5, 2, 2, 2], {"patience": 1, "factor": 0.5}, [1, 1, 1, 1, 0.5, 0.5]),
        ([1, 0.95, 0.89, 0.82], {"patience": 0, "factor": 0.5, "threshold": 0.1}, [1, 0.5, 0.5, 0.25]),
        ([1, 1.05, 1.11, 1.2], {"patience": 0, "factor": 0.5, "threshold": 0.1, "mode": "max"}, [1, 0.5, 0.5, 0.25]),
        ([-1, -1.05, -1.11, -1.2], {"patience": 0, "factor": 0.5, "threshold": 0.1}, [1, 0.5, 0.5, 0.25]),
        ([1, 1, 1, 1], {"patience": 0, "factor": 0.5, "min_lr": 0.3}, [1, 0.5, 0.3, 0.3]),
        ([1, 1], {"patience": 0, "min_lr": 5.0}, [1, 1]),
        ([math.nan, math.inf, 1, math.nan], {"patience": 0, "factor": 0.5}, [0.5, 0.25, 0.25, 0.125]),
        ([1, -math.inf, -math.inf], {"patience": 0, "factor": 0.5}, [1, 1, 0.5]),
    ],
)
def test_plateau_lowers_the_value_when_the_metric_stays(metrics, options, expected):
    np.testing.assert_allclose(lowered(metrics, **options), expected, rtol=1e-15)


def test_plateau_defaults():
    assert lowered([1.0] * 23)[10:12] + lowered([1.0] * 23)[21:] == [1, 0.1, 0.1, pytest.approx(0.01)]


def test_plateau_is_a_schedule():
    plateau = schedule.Plateau(0.5, patience=0)
    assert type(plateau(0)) is type(plateau(7)) is float
    assert plateau([0, 5]).tolist() == [0.5, 0.5]
    assert schedule.warmup(plateau, 4)([0, 2, 4, 9]).tolist() == [0, 0.25, 0.5, 0.5]
    p = np.zeros(1)
    opt = optim.SGD([p], plateau)
    for metric in (1.0, 1.0, 0.5):
        opt.step([-np.ones(1)])
        plateau.update(metric)
    assert p[0] == pytest.approx(0.5 + 0.5 + 0.05)
    for step in (-1, "3", None, math.nan):
        with refused("^step: expected"):
            plateau(step)


def test_a_resumed_plateau_goes_on():
    metrics = np.random.default_rng(0).random(60)
    whole, first = (schedule.Plateau(1.0, 0.5, 3) for _ in range(2))
    second = schedule.Plateau(9.0, 0.5, 3)
    for metric in metrics[:30]:
        first.update(metric)
    second.load_state_dict(first.state_dict())
    for metric in metrics:
        whole.update(metric)
    for metric in metrics[30:]:
        second.update(np.float32(metric))
    assert second.value == whole.value < 0.1
    assert (second.bad, second.best) == (whole.bad, pytest.approx(whole.best, rel=1e-6))


def test_what_a_plateau_refuses():
    plateau = schedule.Plateau(1.0)
    good = plateau.state_dict()
    for bad in ({}, None, {**good, "more": 1}, {**good, "value": -1}, {**good, "best": "x"}, {**good, "bad": 11}):
        with refused("^state"):
            plateau.load_state_dict(bad)
        assert plateau.state_dict() == good
    for bad in ("low", None, [1, 2]):
        with refused("^metric: expected a number"):
            plateau.update(bad)


PLATEAU = {"base": 1.0, "factor": 0.1, "patience": 10, "threshold": 1e-4, "mode": "min", "min_lr": 0.0}
BAD_PLATEAU = {
    "base": [0, -1, math.nan, math.inf, "1", None],
    "factor": [0, 1, 1.5, -0.1, math.nan],
    "patience": [-1, 2.5, None, True],
    "threshold": [-1e-4, math.nan],
    "mode": ["lowest", None],
    "min_lr": [-1, math.inf],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, values in BAD_PLATEAU.items() for bad in values])
def test_plateau_arguments_are_checked(name, bad):
    with refused(f"^{name}: expected"):
        schedule.Plateau(**PLATEAU | {name: bad})
