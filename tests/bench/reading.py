"""What reads the store: ``list``, ``snapshot list`` and ``tree``, with 10 snapshots and with 10,000."""

import itertools
import subprocess
from pathlib import Path

import qmpsnap
from tests.bench import guests, stores
from tests.bench.measure import Way, clock
from tests.bench.program import PYTHON, QEMU_IMG, Sample, run
from tests.bench.setting import Setting, command

MACHINES, SNAPSHOTS, FEW = 50, 200, 10
VERBS = {"list": ("list",), "snapshot-list": ("snapshot", "list", "m0"), "tree": ("tree", "m0")}
MEASURES = (*VERBS, "floor", "create-large-store")


async def measure(at: Setting) -> None:
    """Time them."""
    large, small = at.folder / "large", at.folder / "small"
    stores.fill(large, machines=MACHINES, snapshots=SNAPSHOTS)
    stores.fill(small, machines=1, snapshots=FEW)
    if at.results.wants(*VERBS):
        _domain_with_snapshots(at)
    for measure, words in VERBS.items():
        ways = {
            "qmpsnap": command(*words, home=small),
            "virsh": _virsh(at),
            "large": command(*words, home=large),
        }
        await at.results.compare(measure, ways, share=2)
    await at.results.compare("floor", {"python": _floor}, share=2)
    empty = at.folder_for("empty")
    ways = {"large": _create(large), "empty": _create(empty)}
    await at.results.compare("create-large-store", ways)


def _domain_with_snapshots(at: Setting) -> None:
    disk = at.folder / "ten.qcow2"
    subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    at.virt.define("ten", disk, memory=64, accel=at.accel)
    for number in range(FEW):
        at.virt.virsh("snapshot-create-as", "ten", f"s{number}", "--disk-only", "--atomic")


def _virsh(at: Setting) -> Way:
    async def way() -> Sample:
        return at.virt.timed("snapshot-list", "ten")

    return way


async def _floor() -> Sample:
    return run(PYTHON, "-c", "import sqlite3, json, argparse")


def _create(home: Path) -> Way:
    """A snapshot of a stopped machine that has just been defined, one more in that store each time."""
    names = (f"fresh{number}" for number in itertools.count())

    async def way() -> Sample:
        async with qmpsnap.open(home) as q:
            vm = await q.define(guests.still(next(names)))
            with clock() as sample:
                await vm.snapshot("s")
        return sample

    return way
