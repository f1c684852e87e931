"""What is measured against a public implementation is held to its bound, and printed in a table at the end."""

import pytest

PARITY = "parity: "
"""Before the name of what was measured, among a test's properties: plain numbers, that workers can send."""


@pytest.fixture
def within(record_property):
    """Holds an error to its bound, and has it printed: ``within("prior", error, 1e-5)``."""

    def hold(what, error, bound):
        record_property(f"{PARITY}{what}", (float(error), float(bound)))
        assert error <= bound

    return hold


def pytest_terminal_summary(terminalreporter):
    """Prints what was measured, a line each."""
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
