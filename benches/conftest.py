"""`pytest benches`: every case beside its yardstick; the table follows that of pytest-benchmark."""

import pytest

from kilter.bench.timing import HEADING, line, measure

LINES = []


@pytest.fixture
def measured(benchmark):
    """Measures a case by turns with its yardstick, then as pytest-benchmark does, which can compare runs."""

    def run(case):
        row = measure(case, seconds=0.7)
        LINES.append(line(row))
        benchmark.extra_info.update(row.numbers())
        benchmark.pedantic(case.work, rounds=5, iterations=row.repeat)

    return run


@pytest.fixture
def printed():
    """Takes further lines for the table."""
    return LINES.append


@pytest.hookimpl(trylast=True)  # after the table of pytest-benchmark
def pytest_terminal_summary(terminalreporter):
    if LINES:
        terminalreporter.section("GB/s on path bytes, beside the yardstick of the same run")
        terminalreporter.write_line(HEADING)
        for text in LINES:
            terminalreporter.write_line(text)
