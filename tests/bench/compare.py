"""``scripts/bench compare``: every row of :mod:`tests.bench.rows`, beside libvirt and beside the bare monitor."""

import argparse
import json
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio

import qmpsnap
from tests.bench import creating, guests, many, memory, merging, page, reading, report, starting
from tests.bench.libvirt import libvirt
from tests.bench.measure import Results
from tests.bench.program import ProgramFailed, say
from tests.bench.rows import ROWS
from tests.bench.setting import Setting

GROUPS: tuple[tuple[Sequence[str], Callable[[Setting], Awaitable[None]]], ...] = (
    (reading.MEASURES, reading.measure),
    (creating.MEASURES, creating.measure),
    (starting.MEASURES, starting.measure),
    (many.MEASURES, many.measure),
    (memory.MEASURES, memory.measure),
    (merging.MEASURES, merging.measure),
)
MEASURES = tuple(dict.fromkeys(row.measure for row in ROWS))


def arguments(parser: argparse.ArgumentParser) -> None:
    """What ``compare`` takes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with every sample there as well")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="times each is run (10); long ones fewer")
    parser.add_argument("--only", type=_measures, default=MEASURES, metavar="ROW,...", help=", ".join(MEASURES))
    parser.add_argument("--write", action="store_true", help="write the table of docs/performance.md anew")


def run(folder: Path, given: argparse.Namespace) -> int:
    """Measure and print; returns the exit code, 1 where a row misses its limit or was not measured."""
    if given.write and set(given.only) != set(MEASURES):
        raise ProgramFailed("the page has all rows: --write cannot go with --only")
    since = time.monotonic()
    wanted = {*given.only}
    if wanted & {*reading.VERBS}:
        wanted.add("floor")
    results = Results(given.rounds, wanted)
    (folder / "libvirt").mkdir()
    with libvirt(folder / "libvirt") as virt:
        accel = anyio.run(_accelerator)
        at = Setting(folder=folder, results=results, virt=virt, accel=accel)
        for measures, measure in GROUPS:
            if results.wants(*measures):
                try:
                    anyio.run(measure, at)
                except Exception:  # noqa: BLE001 - the other groups are measured all the same; these rows say so
                    say(traceback.format_exc())
        about = report.about(virt.versions(), accel, given.rounds)
    found = report.lines(results, given.only)
    print(report.table(found))
    say(f"{time.monotonic() - since:.0f} s")
    whole = report.as_json(found, about)
    if given.json:
        given.json.write_text(json.dumps(whole, indent=1) + "\n")
    if given.write:
        page.write(found, about)
    return int(any(line.met is False or line.ours is None for line in found))


async def _accelerator() -> str:
    """What qmpsnap runs the guests with on this host."""
    async with qmpsnap.open() as q:
        async with guests.started(q, guests.still("accelerator")) as vm:
            process = (await vm.record()).process
            assert process
        await vm.undefine(disks="remove")
    return process.accel


def _measures(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if unknown := [name for name in found if name not in MEASURES]:
        raise argparse.ArgumentTypeError(f"no row is called {unknown[0]}: {', '.join(MEASURES)}")
    return found
