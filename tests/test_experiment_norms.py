"""The experiment on batch norm: its numbers are those of theory."""

import numpy as np
import pytest

from kilter.experiments import norms


@pytest.fixture(scope="module")
def result():
    return norms.run(1)


def test_what_holds_and_what_does_not(result):
    assert len(result.claims) == 8
    wrong = [claim for claim in result.claims if not claim.held]
    assert [claim.numbers.split(";")[0] for claim in wrong] == [
        "6.885",
        "at 25 the formula says 0.5, the program 0.4: it arrives after 40",
    ]


def test_v19_predicted_and_measured(result):
    rows = {row[:2]: row[2:] for row in result.table.rows}
    for name, noise in (("static 0.9", 0.22613), ("static 0.1", 0.05735)):
        predicted, measured = rows["running mean", name]
        assert predicted == pytest.approx(noise, rel=1e-3)
        assert measured == pytest.approx(noise, rel=0.02)
    assert rows["running mean", "0.9 falling to 0.1"][1] < 0.07


def test_stages_of_a_trained_layer():
    before, normalised, scaled = norms.hidden(1)
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(normalised.std(0), 1, rtol=1e-3)
    assert np.ptp(before.mean(0)) > 1 and np.ptp(scaled.std(0)) > 0.5
    assert (np.diff(scaled.std(0)) > -1e-3).all(), "from small to large gamma"
