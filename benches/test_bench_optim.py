"""Optimizer steps."""

import pytest

from kilter.bench import optim


@pytest.mark.parametrize("spec", optim.SPECS, ids=str)
def test_step(measured, spec):
    measured(optim.case(spec))
