"""The table of faults at the end of a run, and its failure where a step of the journal had no case.

A plugin of its own, loaded by tests/conftest.py: with workers the process that reports collects no tests, so that it
never comes by the conftest of this folder unless the folder itself is named.
"""

import os

import pytest

from tests.faults.report import Tally
from tests.selection import GRID_AT

FORM = os.environ.get("QMPSNAP_FAULTS", "")
"""``long``, ``short`` or ``sample`` in a run of scripts/faults or scripts/test; else empty."""

_tally = Tally()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed:
        _tally.add(report.user_properties, violated=report.failed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _tally.cases:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(_tally.table())
    if _whole(terminalreporter.config) and (uncovered := _tally.uncovered()):
        terminalreporter.write_line(f"steps that no case came by: {'; '.join(uncovered)}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    failed = _whole(session.config) and not GRID_AT and _tally.uncovered()
    if failed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _whole(config: pytest.Config) -> bool:
    """Whether this is a run of all modules of faults: without CI's choice of the cases it must come by every step."""
    return (
        FORM in ("long", "short")
        and not config.option.keyword
        and not config.option.markexpr
        and config.args in (["tests"], ["tests/faults"])
    )
