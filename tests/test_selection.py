"""The choice of tests for a newer QEMU and their order: nothing is run twice, and all parts have everything."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import selection, timings

TESTS = [f"tests/live/test_{name}.py::test_it[{number}]" for name in ("one", "two", "three") for number in range(40)]

REPORT = """<testsuites><testsuite>
<testcase classname="tests.live.test_full" name="test_slow[a-b]" time="3.6"/>
<testcase classname="tests.model.test_merge.TestHistories" name="runTest" time="0.1"/>
<testcase classname="tests.live.test_full" name="test_bad" time="1.2"><failure/></testcase>
<testcase classname="tests.live.test_full" name="test_left" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("parts", [selection.FREE, selection.BOUND])
@pytest.mark.parametrize("first", range(selection.FREE))
def test_every_test_is_in_one_part(parts: int, first: int) -> None:
    found = [{test for test in TESTS if selection.in_part(test, first + part, parts)} for part in range(parts)]
    assert sorted(test for part in found for test in part) == sorted(TESTS)
    assert all(found)


def test_the_longest_begin_first_with_every_worker() -> None:
    took = {TESTS[7]: 9.0, TESTS[50]: 30.0, TESTS[99]: 20.0}
    order = selection.longest_first(TESTS, took)
    assert [TESTS[place] for place in order[:3]] == [TESTS[50], TESTS[99], TESTS[7]]
    assert order[3:] == [place for place in range(len(TESTS)) if TESTS[place] not in took]
    dealt = selection.dealt(order, 3)
    assert sorted(dealt) == list(range(len(TESTS)))
    assert [dealt[place] for place in (0, 40, 80)] == order[:3]  # where xdist cuts the list in three


@pytest.mark.parametrize(("took", "turns"), selection.TURNS.items())
def test_what_takes_long_is_in_one_of_some_runs(took: float, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "seconds", lambda: dict.fromkeys(TESTS[:80], took) | {TESTS[90]: 1.0})
    items: Any = [SimpleNamespace(nodeid=test, path=Path(test), get_closest_marker=lambda _: None) for test in TESTS]
    runs = [set(TESTS) - selection.left_out(items, "", str(100 + run)) for run in range(turns)]
    assert all(set(TESTS[80:]) < run for run in runs)
    assert sorted(test for run in runs for test in run & set(TESTS[:80])) == sorted(TESTS[:80])
    assert selection.left_out(items, "", "") == set()


def test_a_report_is_read_and_the_slow_are_kept(tmp_path: Path) -> None:
    report = tmp_path / "10.0.xml"
    report.write_text(REPORT)
    found = list(timings.cases([report]))
    assert [(case.kind, case.outcome) for case in found] == [
        ("live", "passed"),
        ("model", "passed"),
        ("live", "failed"),
        ("live", "skipped"),
    ]
    assert found[1].test == "tests/model/test_merge.py::TestHistories::runTest"
    assert timings.table(found) == [
        "passed/failed/skipped  10.0",
        "live                   1/1/1",
        "model                  1/0/0",
        "all                    2/1/1",
    ]
    assert timings.slowest(found)[0].split() == ["3.6", "s", "10.0", "tests/live/test_full.py::test_slow[a-b]"]
    timings.keep(found, tmp_path / "slow")
    assert (tmp_path / "slow").read_text() == (
        "1 tests/live/test_full.py::test_bad\n4 tests/live/test_full.py::test_slow[a-b]\n"
    )
    assert timings.main([str(report)]) == 1
