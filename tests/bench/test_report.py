"""The comparison's table without any measurement: its rows, limits and the page that has them."""

import pytest

from qmpsnap.pytest_plugin.told import Told, lines
from tests.bench import loading, page, parts, report, suite
from tests.bench.compare import GROUPS, MEASURES
from tests.bench.measure import Results
from tests.bench.report import Line, Spread, figure
from tests.bench.rows import ROWS, UNITS, Row


def spread(median: float) -> Spread:
    return Spread(median, median, median, (median,))


def all_of(value: float) -> dict[str, float]:
    return dict.fromkeys(UNITS, value)


def test_every_row_is_measured_by_a_group_and_the_other_way_round() -> None:
    measured = [measure for measures, _ in GROUPS for measure in measures]
    assert sorted(measured) == sorted({*MEASURES, "floor"})


def test_a_row_has_one_limit_at_most() -> None:
    assert [row for row in ROWS if row.ratio is not None and row.most is not None] == []
    assert {row.quantity for row in ROWS} == set(UNITS)


RATIO = Row("list", "`list`", against=("virsh", "virsh"), ratio=2.5)
MOST = Row("list", "`list`", against=("floor/python", "python"), most=55, quantity="cpu")


@pytest.mark.parametrize(
    ("row", "ours", "other", "met"),
    [
        (RATIO, 25, 10, True),
        (RATIO, 26, 10, False),
        (RATIO, None, 10, None),
        (MOST, 55, 10, True),
        (MOST, 56, 100, False),
        (MOST, None, 10, None),
    ],
)
def test_a_limit_is_kept_or_missed(row: Row, ours: float | None, other: float, met: bool | None) -> None:  # noqa: FBT001
    line = Line(row, None if ours is None else spread(ours), spread(other))
    assert line.met is met
    assert ("MISSED" in report.table([line])) is (met is False)


def test_a_row_that_was_not_measured_says_so() -> None:
    assert "not measured" in report.table(report.lines(Results(3, {"list"}), ["list"]))


def test_the_spread_is_that_of_the_quartiles() -> None:
    results = Results(5, {"list"})
    results.samples["list", "qmpsnap"] = [all_of(value) for value in (50, 10, 30, 40, 20)]
    results.samples["list", "virsh"] = [all_of(10), all_of(10)]
    line = next(found for found in report.lines(results, ["list"]) if found.row == ROWS[0])
    assert str(line.ours) == "30 (20-40)"
    assert line.ratio == 3


def test_figures_have_three_digits_at_most() -> None:
    assert [figure(value) for value in (1234.5, 97.44, 9.76, 0.618, 0.0)] == ["1234", "97", "9.8", "0.62", "0.00"]


def test_the_page_has_every_row_with_its_limit() -> None:
    """The page is from the rows as they are now: ``scripts/bench compare --write``."""
    text = page.PAGE.read_text()
    table = text.partition(page.BEGIN.format(kind="compare"))[2].partition(page.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    found = [(row[0], row[1], row[3], row[6]) for row in rows[1:]]
    wanted = [report.cells(Line(row, None, None)) for row in ROWS]
    assert found == [(row[0], row[1], row[3], row[6]) for row in wanted]


def test_what_is_in_no_part_is_the_rest() -> None:
    took = {"in all": 10.0, **dict.fromkeys(parts.PARTS, 1.0)}
    row = parts.table({"start": took}).splitlines()[-1]
    assert row == "| start | 10.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | 4.0 |"


@pytest.mark.parametrize(
    ("module", "whose"),
    [
        ("qmpsnap.cli.main", "qmpsnap"),
        ("_ssl", "asyncio and OpenSSL"),
        ("qemu.qmp", "qemu.qmp"),
        ("re", loading.OTHERS),
    ],
)
def test_modules_are_counted_by_their_package(module: str, whose: str) -> None:
    assert loading.group(module) == whose


@pytest.mark.parametrize("way", suite.WAYS)
def test_what_the_plugin_says_of_its_machines_is_understood(way: str) -> None:
    (line,) = lines([Told("guest", way, "", [0.25, 0.5, 0.75])])
    found = suite.READY.search(f"...\n{line}\n3 passed")
    assert found
    assert found.groups() == ("3", "0.50", "0.75")
