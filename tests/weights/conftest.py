"""What is measured against a public implementation is held to its bound, and printed in a table at the end."""

from typing import NamedTuple

import pytest


class Measured(NamedTuple):
    """An error, and the most that it may be."""

    error: float
    bound: float


@pytest.fixture
def within(record_property):
    """Holds an error to its bound, and has it printed: ``within("prior", error, 1e-5)``."""

    def hold(what, error, bound):
        record_property(what, Measured(error, bound))
        assert error <= bound

    return hold


def pytest_terminal_summary(terminalreporter):
    """Prints what was measured, a line each."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    lines = [
        f"{what:<66}{measured.error:10.1e}{measured.bound:10.0e}"
        for report in reports
        for what, measured in report.user_properties
        if isinstance(measured, Measured) and report.when == "call"
    ]
    if lines:
        terminalreporter.section("parity")
        for line in (f"{'':<66}{'measured':>10}{'at most':>10}", *lines):
            terminalreporter.write_line(line)
