"""Random fills."""

import pytest

from kilter.bench import fills


@pytest.mark.parametrize("kind", fills.KINDS)
def test_fill(measured, kind):
    measured(fills.case(kind, fills.SIZE))
