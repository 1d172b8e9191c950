"""Which tests of a newer QEMU run, and in which order: the longest first, so that nobody waits for one at the end."""

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

QUARTER = os.environ.get("QMPSNAP_QUARTER", "")
"""``0`` to ``3`` chooses a quarter of the tests that do not depend on QEMU's version; empty runs all of them."""
GRID = 6
"""With a quarter every how-manieth test of a grid is run."""
SLOW = Path(__file__).with_name("slow")
"""What took a second or more when it was last measured: seconds, a space and the test, one a line."""


def seconds() -> dict[str, float]:
    """How long the slow tests take; see ``python -m tests.timings``."""
    lines = SLOW.read_text().splitlines() if SLOW.exists() else []
    return {test: float(took) for took, _, test in (line.partition(" ") for line in lines)}


def in_quarter(test: str, quarter: int) -> bool:
    """Whether this quarter has the test: four quarters have all of them, each in one."""
    return zlib.crc32(test.encode()) % 4 == quarter


def longest_first(tests: Sequence[str], took: Mapping[str, float]) -> list[int]:
    """The places of the tests in the order in which they should begin."""
    return sorted(range(len(tests)), key=lambda place: -took.get(tests[place], 0.0))


def dealt(items: Sequence[T], hands: int) -> list[T]:
    """Work stealing begins with one unbroken part of the list for each worker: each gets its share of the long ones."""
    return [item for hand in range(hands) for item in items[hand::hands]]


def left_out(items: Sequence[pytest.Item], quarter: str) -> set[str]:
    """The tests that a run of this quarter leaves out: those marked ``version`` and the faults always run."""
    if not quarter:
        return set()
    free = [item for item in items if "/faults/" not in str(item.path)]
    grid = [item.nodeid for item in free if item.get_closest_marker("grid")]
    rest = [item.nodeid for item in free if not item.get_closest_marker("version")]
    return {test for place, test in enumerate(grid, start=1) if place % GRID} | {
        test for test in rest if not in_quarter(test, int(quarter))
    }


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this run need not have, and put the rest in order."""
    out = left_out(items, QUARTER)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
    kept = [item for item in items if item.nodeid not in out]
    ordered = [kept[place] for place in longest_first([item.nodeid for item in kept], seconds())]
    hands = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = dealt(ordered, hands)
