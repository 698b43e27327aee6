"""Norms, forward and backward."""

import pytest

from kilter.bench import groups, norms, rows


@pytest.mark.parametrize("what", norms.WHATS)
@pytest.mark.parametrize("spec", norms.SPECS, ids=str)
def test_batch_norm(measured, spec, what):
    measured(norms.case(spec, what))


@pytest.mark.parametrize("what", rows.WHATS)
@pytest.mark.parametrize("spec", rows.SPECS, ids=str)
def test_row_norm(measured, spec, what):
    measured(rows.case(spec, what))


@pytest.mark.parametrize("what", groups.WHATS)
@pytest.mark.parametrize("spec", groups.SPECS, ids=str)
def test_group_norm(measured, spec, what):
    measured(groups.case(spec, what))
