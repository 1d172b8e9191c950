"""The results as a table and as JSON."""

import math
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qmpsnap
from tests.bench.measure import Results
from tests.bench.program import QEMU, printed
from tests.bench.rows import ROWS, UNITS, Row


@dataclass(frozen=True)
class Spread:
    """Samples of one way: their median, and the quartiles around it."""

    median: float
    lower: float
    upper: float
    samples: tuple[float, ...]

    def __str__(self) -> str:
        return f"{figure(self.median)} ({figure(self.lower)}-{figure(self.upper)})"


@dataclass(frozen=True)
class Line:
    """A row with what was measured; a missing spread is one that was not."""

    row: Row
    ours: Spread | None
    other: Spread | None

    @property
    def ratio(self) -> float | None:
        """How many times the other's median ours is."""
        return self.ours.median / self.other.median if self.ours and self.other and self.other.median else None

    @property
    def met(self) -> bool | None:
        """Whether the row keeps its limit; None where it has none, or was not measured."""
        if self.row.ratio is not None:
            return None if self.ratio is None else self.ratio <= self.row.ratio
        if self.row.most is not None:
            return None if self.ours is None else self.ours.median <= self.row.most
        return None

    @property
    def limit(self) -> str:
        """The limit in words."""
        if self.row.ratio is not None:
            return f"{self.row.ratio:g}x"
        return f"{self.row.most:g} {UNITS[self.row.quantity]}" if self.row.most is not None else ""


def lines(results: Results, wanted: Sequence[str]) -> list[Line]:
    """Every row of the measures that were asked for."""
    return [
        Line(row, spread(results, (row.measure, row.way), row), spread(results, row.other, row))
        for row in ROWS
        if row.measure in wanted
    ]


def spread(results: Results, of: tuple[str, str] | None, row: Row) -> Spread | None:
    """What the samples of a way come to."""
    found = [sample[row.quantity] for sample in results.samples.get(of, [])] if of else []
    if len(found) < 2:
        return None
    lower, middle, upper = statistics.quantiles(found, n=4, method="inclusive")
    return Spread(middle, lower, upper, tuple(found))


def figure(value: float) -> str:
    """Three digits are more than a host can repeat."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{max(0, 1 - math.floor(math.log10(max(value, 0.1))))}f}"


CELLS = ("measured", "unit", "qmpsnap", "against", "takes", "ratio", "limit", "")


def cells(line: Line) -> tuple[str, ...]:
    """A row of the table."""
    return (
        line.row.what,
        UNITS[line.row.quantity],
        str(line.ours or "not measured"),
        line.row.against[1] if line.row.against else "",
        str(line.other or "not measured") if line.row.against else "",
        "" if line.ratio is None else f"{line.ratio:.2f}x",
        line.limit,
        {True: "", False: "MISSED", None: ""}[line.met],
    )


def table(found: Sequence[Line]) -> str:
    """All rows for a terminal: medians, quartiles in parentheses."""
    rows = [CELLS, *map(cells, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(CELLS))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_json(found: Sequence[Line], about: Mapping[str, Any]) -> dict[str, Any]:
    """All rows with their samples, and where they were measured."""
    rows = [
        {
            **asdict(line.row),
            "unit": UNITS[line.row.quantity],
            "qmpsnap": asdict(line.ours) if line.ours else None,
            "other": asdict(line.other) if line.other else None,
            "times": line.ratio,
            "met": line.met,
        }
        for line in found
    ]
    return {"about": dict(about), "rows": rows}


def about(libvirt: str, accel: str, rounds: int) -> dict[str, Any]:
    """When, where and with what it was measured; nothing that names the host."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[2], 1),
        "kernel": platform.release().partition("-")[0],
        "accelerator": accel,
        "qemu": printed(QEMU, "--version").split()[3],
        "libvirt": libvirt,
        "python": platform.python_version(),
        "qmpsnap": qmpsnap.__version__,
        "rounds": rounds,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
