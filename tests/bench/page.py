"""The table of ``docs/performance.md``."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.program import ROOT
from tests.bench.report import CELLS, Line, cells

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: scripts/bench {kind} --write -->\n", "<!-- end -->\n"

ABOUT = """\
Measured on {date}: {cpu}, {cores} cores, Linux {kernel}, load {load} (15 minutes, at the end).
QEMU {qemu} under {accelerator}, libvirt {libvirt}, Python {python}, qmpsnap {qmpsnap}; about {rounds} rounds.
"""


def write(found: Sequence[Line], about: Mapping[str, Any]) -> None:
    """Put these results in place of those that the page has."""
    put("compare", text(found, about))


def put(kind: str, text: str) -> None:
    """Put what one kind of ``scripts/bench`` has printed in place of what the page has of it."""
    begin = BEGIN.format(kind=kind)
    before, found, rest = PAGE.read_text().partition(begin)
    assert found, f"{PAGE} has no {begin}"
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{begin}{text}{END}{after}")


def text(found: Sequence[Line], about: Mapping[str, Any]) -> str:
    """The results as the page has them."""
    rows = [_row(CELLS), "|" + "---|" * len(CELLS), *(_row(cells(line)) for line in found)]
    return ABOUT.format(**about) + "\n" + "\n".join(rows) + "\n"


def _row(found: Sequence[str]) -> str:
    return f"| {' | '.join(found)} |"
