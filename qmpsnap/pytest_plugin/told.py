"""How tests have got their machines: collected by each process, told once at the end."""

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

_HOW = {
    "fork": "forked for each test",
    "load": "loaded into its running QEMU for each test",
    "revert": "reverted for each test",
    "boot": "booted for each test",
}


class Told(NamedTuple):
    """Of one machine in one process: ``why`` no quicker way was possible, and the seconds until each test had it."""

    machine: str
    way: str
    why: str
    seconds: list[float]


TOLD = pytest.StashKey[dict[str, Told]]()


def lines(found: Sequence[Told]) -> Iterator[str]:
    """A line for each machine and way."""
    groups: dict[tuple[str, str], list[Told]] = {}
    for told in found:
        groups.setdefault((told.machine, told.way), []).append(told)
    for (machine, way), of_it in sorted(groups.items()):
        took = sorted(second for told in of_it for second in told.seconds)
        text = f"{machine}: {_HOW[way]}"
        if took:
            late = took[min(len(took) - 1, len(took) * 99 // 100)]
            text += f", {len(took)} times; ready after {statistics.median(took):.2f} s (p99 {late:.2f} s)"
        yield text
        yield from sorted({f"    {told.why}" for told in of_it if told.why})
