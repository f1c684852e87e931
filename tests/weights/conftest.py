"""Errors relative to a public implementation are compared with their bounds, and printed in a table at the end."""

import pytest

PARITY = "parity: "
"""Prefix of the names of measured errors among a test's recorded properties, which xdist workers can send."""


@pytest.fixture
def within(record_property):
    """Returns a function that asserts a bound on an error and records it: ``within("prior", error, 1e-5)``."""

    def assert_within(what, error, bound):
        record_property(f"{PARITY}{what}", (float(error), float(bound)))
        assert error <= bound

    return assert_within


def pytest_terminal_summary(terminalreporter):
    """Prints the measured errors, one line each."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    lines = [
        f"{name.removeprefix(PARITY):<66}{measured[0]:10.1e}{measured[1]:10.0e}"
        for report in reports
        for name, measured in report.user_properties
        if name.startswith(PARITY) and report.when == "call"
    ]
    if lines:
        terminalreporter.section("parity")
        for line in (f"{'':<66}{'measured':>10}{'at most':>10}", *lines):
            terminalreporter.write_line(line)
