"""What the runs of ``scripts/test`` came to: cases by kind and QEMU, and the slowest, from pytest's junit files.

Usage: python -m tests.timings [--keep] REPORT.xml...
       --keep   writes the slow ones down in tests/slow, by which the next runs are ordered
"""

import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from tests.selection import SLOW

SLOWEST = 20
WORTH_KEEPING = 1.0
"""Seconds from which on a test has a line in ``tests/slow``."""


class Case(Struct, frozen=True):
    """One test on one QEMU; ``outcome`` is ``passed``, ``failed`` or ``skipped``."""

    version: str
    test: str
    seconds: float
    outcome: str

    @property
    def kind(self) -> str:
        """The folder of tests that it is in."""
        return self.test.partition("::")[0].split("/")[1]


def cases(reports: Iterable[Path]) -> Iterator[Case]:
    """What the reports tell; each is called by the version of QEMU."""
    for report in reports:
        found = ET.parse(report).iter("testcase")  # noqa: S314 - pytest has just written it
        for case in (case for case in found if case.get("name")):  # those of an interrupted run may have none
            below = {child.tag for child in case}
            outcome = "failed" if below & {"failure", "error"} else "skipped" if "skipped" in below else "passed"
            test = _node_id(case.get("classname", ""), case.get("name", ""))
            yield Case(report.stem, test, float(case.get("time", 0)), outcome)


def _node_id(classname: str, name: str) -> str:
    parts = classname.split(".")
    module = next((place for place, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
    return "::".join(["/".join(parts[: module + 1]) + ".py", *parts[module + 1 :], name])


def table(found: Sequence[Case]) -> list[str]:
    """Passed, failed and skipped, by kind and version."""
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for case in found:
        for kind in (case.kind, "all"):
            counts[kind, case.version][case.outcome] += 1
    versions = list(dict.fromkeys(case.version for case in found))
    kinds = [*sorted({case.kind for case in found}), "all"]
    rows = [["passed/failed/skipped", *versions]]
    for kind in kinds:
        row = (counts[kind, version] for version in versions)
        rows.append([kind, *(f"{count['passed']}/{count['failed']}/{count['skipped']}" for count in row)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def slowest(found: Iterable[Case]) -> list[str]:
    """The slowest cases, a line each."""
    first = sorted(found, key=lambda case: -case.seconds)[:SLOWEST]
    return [f"{case.seconds:6.1f} s  {case.version:5} {case.test}" for case in first]


def keep(found: Iterable[Case], file: Path = SLOW) -> None:
    """Write down what took long, whichever QEMU it was on."""
    took: dict[str, float] = {}
    for case in found:
        took[case.test] = max(case.seconds, took.get(case.test, 0.0))
    lines = [f"{seconds:.0f} {test}\n" for test, seconds in sorted(took.items()) if seconds >= WORTH_KEEPING]
    file.write_text("".join(lines))


def main(words: Sequence[str]) -> int:
    """Print both; 1 when a test failed or a report has none that passed."""
    reports = [Path(word) for word in words if word != "--keep"]
    found = list(cases(reports))
    if "--keep" in words:
        keep(found)
    print(f"\nthe {SLOWEST} slowest:", *slowest(found), "", *table(found), sep="\n")  # noqa: T201
    passed = {case.version for case in found if case.outcome == "passed"}
    return int(any(case.outcome == "failed" for case in found) or len(passed) < len(reports))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
