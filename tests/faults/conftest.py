"""Fixtures of the faults, the choice of the short form, and the table at the end of a run."""

import os

import pytest

from tests.faults import claims, mutants
from tests.faults.report import Fault, Tally
from tests.live.conftest import home, place, q

__all__ = ["fault", "home", "place", "q"]

FORM = os.environ.get("QMPSNAP_FAULTS", "")
"""``long``, ``short`` or ``sample`` in a run of scripts/faults; else empty."""
SAMPLE = 6
"""Every how-manieth case of the short form is in the sample."""

_tally = Tally()


mutants.apply()


@pytest.fixture
def fault(record_property: object) -> Fault:
    """What the case tells about itself."""
    assert callable(record_property)
    found = Fault(record_property)
    claims.tell(found.claim)
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if "/faults/" in str(item.path)]
    for item in ours:
        item.add_marker(pytest.mark.live)
        item.add_marker(pytest.mark.timeout(400))
    if FORM in ("short", "sample"):
        chosen = [item for item in ours if item.get_closest_marker("short")][:: SAMPLE if FORM == "sample" else 1]
        left_out = {id(item) for item in ours} - {id(item) for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
        items[:] = [item for item in items if id(item) not in left_out]


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
    if _whole(session.config) and _tally.uncovered() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _whole(config: pytest.Config) -> bool:
    """Whether this is a run of scripts/faults of which nothing was left out: it must come by every step."""
    return (
        FORM in ("long", "short")
        and not config.option.keyword
        and not config.option.markexpr
        and config.args in (["tests"], ["tests/faults"])
    )
