"""The oracle: what every machine may hold after what was done to it, and the verdict on what it does hold."""

import time
from dataclasses import dataclass, field
from typing import Any

from tests.outsider import contents, looks
from tests.outsider.contents import Anything, Counted, Found, Moment, OneOf, Written
from tests.outsider.looks import Look
from tests.outsider.typed import Answer

DISKS = ("vda", "vdb")
BEATS = 40
"""More than the guest's timer ticks in a second."""


class Violation(Exception):
    """Something that may never be."""


@dataclass(frozen=True)
class Counting:
    """A guest counts since then, and was at ``low`` at least; it cannot outrun its clock."""

    low: int
    since: float

    def problem(self, found: Found) -> str:
        """As for every moment."""
        high = self.low + 60 + int(BEATS * (time.monotonic() - self.since))
        return Counted(self.low, high).problem(found)


@dataclass
class Snap:
    """What one snapshot may hold, of which disks, and in which way."""

    moment: Moment
    disks: tuple[str, ...] = DISKS
    kind: str = "disk"
    pushed: bool = False
    head: int = 0
    consumed: bool = False


@dataclass
class Known:
    """One machine as the tester knows it."""

    name: str
    guest: str
    active: Moment
    snapshots: dict[str, Snap] = field(default_factory=dict)
    running: bool = False
    paused: bool = False
    head: int = 0
    spoiled: bool = False
    seen: Look | None = None

    def usable(self, *, kinds: tuple[str, ...] = ("disk", "full", "internal")) -> list[str]:
        """Names of the snapshots that can be gone back to."""
        return [name for name, snap in self.snapshots.items() if not snap.consumed and snap.kind in kinds]

    def reads(self) -> set[str]:
        """Every file that its disks and snapshots read, by the headers."""
        found: set[str] = set()
        if self.seen is None:
            return found
        tops = [(layers[-1]["path"], layers[-1]["format"]) for layers in self.seen.chains.values()]
        points = [point for snap in self.seen.snapshots.values() for point in snap["disks"].values()]
        tops += [looks.file_of(point) for point in points if point["path"]]  # of consumed ones there may be none
        for path, image_format in tops:
            if path not in found:
                found.update(looks.chain_by_headers(path, image_format))
        return found


@dataclass
class Expect:
    """What a command may do to a machine.

    Attributes:
        done: what its active disks hold once it has succeeded; ``None`` leaves them as they are.
        appear: snapshots that it makes.
        vanish: snapshots that it removes.
        consume: snapshots that it may overwrite.
        agreed: it may overwrite whatever stands in its way, be it taken by another command in between.
        rename: from and to.
        keeps: what was active has to be kept in a snapshot, if nothing else holds it.
        auto: snapshots that it names itself may come.
        running: whether the machine runs once it has succeeded; ``None``: as before.
        current: the snapshot that it stands on once it has succeeded; empty where that is not known.
    """

    done: Moment | None = None
    appear: dict[str, Snap] = field(default_factory=dict)
    vanish: set[str] = field(default_factory=set)
    consume: set[str] = field(default_factory=set)
    agreed: bool = False
    rename: tuple[str, str] | None = None
    keeps: bool = False
    auto: bool = False
    running: bool | None = None
    current: str = ""


def outcome(answer: Answer) -> str:
    """``done``, ``none`` or ``open``: what the command says has come of it."""
    if answer.code == 0:
        return "done"
    if answer.error.get("effect") == "none":
        return "none"
    return "open"


class Judge:
    """Holds one machine against what is known of it, and learns from what it finds."""

    def __init__(self, known: Known, seen: Look, expect: Expect, came: str) -> None:
        """``came``: as :func:`outcome`."""
        self.known, self.seen, self.expect, self.came = known, seen, expect, came
        self.read: dict[str, Found] = {}

    def judge(self) -> None:
        """Raise a violation, or take over what was found."""
        self._names()
        self._states()
        self._tree()
        if not self.known.spoiled:  # what somebody else has overwritten need not even be an image any more
            self._contents()
            self._active()
            if differ := looks.chains_differ(self.seen):
                raise Violation(differ)
        self.known.running = self.seen.running
        self.known.paused = self.seen.stands
        self.known.seen = self.seen

    def _names(self) -> None:
        known, expect, there = self.known.snapshots, self.expect, set(self.seen.snapshots)
        if expect.rename:
            self._renamed(*expect.rename)
        came = {name for name in there if name not in known}
        for name in came:
            if name in expect.appear and self.came != "none":
                known[name] = expect.appear[name]
            elif name.startswith("auto-") and expect.auto and self.came != "none":
                before = OneOf((self.known.active, *([expect.done] if expect.done else [])))
                told = self.seen.snapshots[name]  # where QEMU goes back in place, it is kept inside the images
                known[name] = Snap(before, tuple(told["disks"]), told["kind"], head=self.known.head)
            else:
                raise Violation(f"snapshot {name} came from nowhere ({self.came})")
        for name in set(known) - there:
            if name not in expect.vanish or self.came == "none":
                raise Violation(f"snapshot {name} is gone ({self.came})")
            del known[name]
        if self.came == "done":
            if lacks := set(expect.appear) - there:
                raise Violation(f"snapshot {sorted(lacks)} was taken and is not listed")
            if left := expect.vanish & there:
                raise Violation(f"snapshot {sorted(left)} was deleted and is listed")

    def _tree(self) -> None:
        """A snapshot grew from where the machine stood, and the machine stands on it then."""
        before = self.known.seen
        if self.came != "done" or not self.expect.current or before is None:
            return
        if self.seen.current != self.expect.current:
            raise Violation(f"the machine stands on {self.seen.current}, not on {self.expect.current}")
        for name in self.expect.appear:
            if (parent := self.seen.snapshots[name]["parent"]) != before.current:
                raise Violation(f"snapshot {name} grew from {parent}, and the machine stood on {before.current}")

    def _renamed(self, old: str, new: str) -> None:
        known, there = self.known.snapshots, set(self.seen.snapshots)
        if {old, new} & self.expect.vanish and not {old, new} & there:
            return
        if (new in there) == (old in there) or (self.came == "done" and old in there):
            raise Violation(f"renamed {old} to {new} ({self.came}): the list has {sorted(there)}")
        if new in there:
            if self.came == "none":
                raise Violation(f"{old} was not renamed, and is called {new}")
            items = [(new if name == old else name, snap) for name, snap in known.items()]
            known.clear()
            known.update(items)

    def _states(self) -> None:
        for name, told in self.seen.snapshots.items():
            snap = self.known.snapshots[name]
            if told["state"] == "consumed" and not snap.consumed:
                if name not in self.expect.consume or self.came == "none":
                    raise Violation(f"snapshot {name} is consumed ({self.came})")
                snap.consumed = True
            elif told["state"] == "ok" and snap.consumed:
                raise Violation(f"snapshot {name} was consumed and is ok")
            elif told["state"] == "overwritten" and not isinstance(snap.moment, Anything):
                raise Violation(f"snapshot {name} is said to be overwritten by others")
            if set(told["disks"]) != set(snap.disks):
                raise Violation(f"snapshot {name} has disks {sorted(told['disks'])}, taken was {snap.disks}")
            if told["kind"] != snap.kind:
                raise Violation(f"snapshot {name} is {told['kind']}, taken was {snap.kind}")

    def _contents(self) -> None:
        for name, told in self.seen.snapshots.items():
            snap = self.known.snapshots[name]
            if snap.consumed or isinstance(snap.moment, Anything):
                continue
            found = looks.snapshot_disks(told)
            if problem := snap.moment.problem(found):
                raise Violation(f"snapshot {name} ({snap.kind}): {problem}")
            self.read[name] = found
            snap.moment = contents.exactly(found)
            if "vda" in found:
                snap.head = found["vda"].head

    def _active(self) -> None:
        known, expect, before = self.known, self.expect, self.known.active
        if isinstance(before, Anything) and expect.done is None:
            return
        may: list[Moment] = [] if self.came == "done" and expect.done else [before]
        if expect.done and self.came != "none":
            may.append(expect.done)
        if known.guest == "writer" and self.seen.running and not self.seen.stands:
            if expect.done and self.came == "done":
                known.active = expect.done
            elif expect.done and self.came != "none":
                known.active = OneOf((before, expect.done))
            elif isinstance(before, Written):  # it stood, and counts on
                known.active = Counting(known.head, time.monotonic())
            return
        found = looks.active_disks(self.seen.chains)
        problems = [moment.problem(found) for moment in may]
        if "" not in problems:
            raise Violation(f"the active disks ({self.came}): {' | '.join(problems)}")
        if expect.keeps and before.problem(found) and not self._kept(before):
            raise Violation(f"what was active before is in no snapshot ({self.came})")
        known.active = contents.exactly(found)
        known.head = found["vda"].head

    def _kept(self, before: Moment) -> bool:
        disks = set(DISKS)
        if isinstance(before, Written):
            disks = set(before.disks)
        for found in self.read.values():
            if not before.problem(found) and (set(found) == disks or isinstance(before, Written)):
                return True
        return False


def counting(snap: Snap) -> Counting:
    """A guest that goes on from a snapshot."""
    return Counting(snap.head, time.monotonic())


def consumable(known: Known, disk: str, seen: dict[str, list[dict[str, Any]]]) -> set[str]:
    """Snapshots whose content lies in the chain of that disk."""
    inside = {name for layer in seen[disk] for name in layer["snapshots"]}
    return inside & set(known.snapshots)


def both(known: Known, first: Expect, second: Expect) -> Expect:
    """What two commands may do that come one after the other, in either order, done or not."""
    actives = tuple(moment for moment in (known.active, first.done, second.done) if moment)
    done = [moment for moment in (first.done, second.done) if moment]
    appear = {**first.appear, **second.appear}
    for snap in appear.values():
        snap.moment = OneOf(actives)
    return Expect(
        done=OneOf(tuple(done)) if done else None,
        appear=appear,
        vanish=first.vanish | second.vanish,
        consume={*known.snapshots, *appear} if first.agreed or second.agreed else set(),
        rename=first.rename or second.rename,
        keeps=bool(done) and (first.keeps or not first.done) and (second.keeps or not second.done),
        auto=first.auto or second.auto,
    )
