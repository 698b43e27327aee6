"""Batch norm, forward and backward."""

import pytest

from kilter.bench import norms


@pytest.mark.parametrize("what", norms.WHATS)
@pytest.mark.parametrize("spec", norms.SPECS, ids=str)
def test_batch_norm(measured, spec, what):
    measured(norms.case(spec, what))
