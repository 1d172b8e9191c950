"""Which tests of a newer QEMU run, and in which order: the longest first, so that nobody waits for one at the end."""

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

PART = os.environ.get("QMPSNAP_PART", "")
"""``0`` to ``11`` chooses a twelfth of the tests that do not depend on QEMU's version, and a sixth of those that do.

Six parts one after the other have all that depend on it. Empty runs all of them.
"""
FREE, BOUND = 12, 6
"""In how many parts the tests are that do not depend on QEMU's version, and those that do."""
GRID = 10
"""Every how-manieth test of a grid is run, with a part or a number in :data:`GRID_AT`."""
TURNS = {2: 3, 8: 5, 20: 6}
"""Seconds (in :data:`SLOW`) from which on a test is in one of so many runs on the system's QEMU with a number below."""
GRID_AT = os.environ.get("QMPSNAP_GRID_AT", "")
"""The number of a run that leaves tests out, which chooses them; empty runs everything."""
SLOW = Path(__file__).with_name("slow")
"""What took a second or more when it was last measured: seconds, a space and the test, one a line."""


def seconds() -> dict[str, float]:
    """How long the slow tests take; see ``python -m tests.timings``."""
    lines = SLOW.read_text().splitlines() if SLOW.exists() else []
    return {test: float(took) for took, _, test in (line.partition(" ") for line in lines)}


def in_part(test: str, part: int, parts: int) -> bool:
    """Whether this part has the test: so many one after the other have all of them, each in one."""
    return zlib.crc32(test.encode()) // 8 % parts == part % parts


def longest_first(tests: Sequence[str], took: Mapping[str, float]) -> list[int]:
    """The places of the tests in the order in which they should begin."""
    return sorted(range(len(tests)), key=lambda place: -took.get(tests[place], 0.0))


def dealt(items: Sequence[T], hands: int) -> list[T]:
    """Work stealing begins with one unbroken part of the list for each worker: each gets its share of the long ones."""
    return [item for hand in range(hands) for item in items[hand::hands]]


def left_out(items: Sequence[pytest.Item], part: str, grid_at: str) -> set[str]:
    """The tests that a run leaves out; the faults have a choice of their own."""
    free = [item for item in items if "/faults/" not in str(item.path)]
    grid = [item.nodeid for item in free if item.get_closest_marker("grid")]
    out: set[str] = set()
    if part or grid_at:
        out |= {test for place, test in enumerate(grid) if place % GRID != int(grid_at or part) % GRID}
    took = seconds() if grid_at and not part else {}
    for test in (item.nodeid for item in free if "/outsider/" not in item.nodeid):
        turns = max((turns for least, turns in TURNS.items() if took.get(test, 0) >= least), default=1)
        if turns > 1 and not in_part(test, int(grid_at), turns):
            out.add(test)
    for item in free if part else ():
        if not in_part(item.nodeid, int(part), BOUND if item.get_closest_marker("version") else FREE):
            out.add(item.nodeid)
    return out


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this run need not have, and put the rest in order."""
    out = left_out(items, PART, GRID_AT)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
    kept = [item for item in items if item.nodeid not in out]
    ordered = [kept[place] for place in longest_first([item.nodeid for item in kept], seconds())]
    hands = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = dealt(ordered, hands)
