"""Machines that come and go: empty ones, linked clones of a snapshot, and those that are given up."""

from pathlib import Path

from tests.outsider import contents, looks
from tests.outsider.known import DISKS, Expect, Known, Violation
from tests.outsider.verbs import Act, Chooser
from tests.outsider.world import World

MOST = 6
FEWEST = 3


def names() -> set[str]:
    """The machines that are listed."""
    return {row["name"] for row in looks.asked("list", may=(0, 7)).json()["machines"]}


def define(chooser: Chooser) -> Act | None:
    """A new machine: empty, or a clone of a snapshot of this one."""
    world, known = chooser.world, chooser.known
    cloned, at = chooser.dice.random() < 0.8, chooser.dice.random()
    whole = [name for name in sorted(known.usable(kinds=("disk", "full"))) if known.snapshots[name].disks == DISKS]
    if len(world.machines) >= MOST or known.seen is None:
        return None
    name = f"c{chooser.number}"
    born = Known(name, known.guest, contents.empty(*DISKS))
    bases = dict.fromkeys(DISKS, f"size: {contents.SIZE}")
    if cloned and whole:
        snapshot = whole[int(at * len(whole))]
        points = known.seen.snapshots[snapshot]["disks"]
        for disk in DISKS:
            path = points[disk]["path"]
            bases[disk] = f'base: "{path}", format: {"raw" if path.endswith(".raw") else "qcow2"}'
        born.active = known.snapshots[snapshot].moment
        born.head = known.snapshots[snapshot].head
    elif known.guest == "writer":
        born.guest = "still"
    spec = world.spec(name, bases["vda"], bases["vdb"])
    return Act(["define", str(spec)], Expect(), newborn=born)


def undefine(chooser: Chooser) -> Act | None:
    """This machine goes, if it stands and there are others."""
    known, kept = chooser.known, chooser.dice.random() < 0.4
    if len(chooser.world.machines) <= FEWEST or known.running:
        return None
    return Act(["undefine", known.name, "--keep-disks" if kept else "--remove-disks"], Expect(), gone=True)


def gone(world: World, known: Known, *, kept: bool, born: bool, told: str = "") -> None:
    """What is left of a machine that is not there any more: images that were to be kept, or that others read.

    What could not be removed is named in what was ``told``.
    """
    read = {path for other in world.machines.values() for path in other.reads()}
    folder = world.home / "machines" / known.name
    left = [path for path in folder.rglob("*") if path.is_file() and str(path) not in read] if folder.exists() else []
    if kept and known.seen:
        if problem := known.active.problem(looks.active_disks(known.seen.chains)):
            raise Violation(f"{known.name} was undefined and its disks kept: {problem}")
        for path in {*left, *_elsewhere(world, known, read)}:
            path.unlink()
        return
    for path in [path for path in left if str(path) in told]:
        path.unlink()
        left.remove(path)
    if left:
        raise Violation(f"{known.name} is {'not born' if born else 'gone'}, and there are {sorted(map(str, left))}")


def _elsewhere(world: World, known: Known, read: set[str]) -> list[Path]:
    """Its images that do not lie in its folder, and that nobody reads."""
    assert known.seen
    found = {str(layer["path"]) for chain in known.seen.chains.values() for layer in chain}
    found |= {str(p["path"]) for s in known.seen.snapshots.values() for p in s["disks"].values()}
    inside = (f"{world.images}/", f"{world.home}/machines/")  # a clone's parent may have given up what it read
    return [Path(path) for path in found - read if path.startswith(inside) and not path.endswith("writer.raw")]
