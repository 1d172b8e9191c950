"""Every verb as a step: its words, and what may come of them."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.outsider.contents import Written
from tests.outsider.known import DISKS, Counting, Expect, Known, Snap, consumable, counting
from tests.outsider.world import World

T = TypeVar("T")


@dataclass
class Act:
    """A command line for one machine, and what may come of it; ``newborn``: it makes that one, ``gone``: it ends it."""

    words: list[str]
    expect: Expect
    newborn: Known | None = None
    gone: bool = False


class Chooser:
    """Makes acts of one step: the same dice, the same state, the same act."""

    def __init__(self, world: World, known: Known, dice: random.Random, number: int) -> None:
        """``number`` of the step names what it makes."""
        self.world, self.known, self.dice, self.number = world, known, dice, number

    def _one(self, of: Sequence[T]) -> T | None:
        """One of them, by a throw that is made in any case."""
        at = self.dice.random()
        return of[int(at * len(of))] if of else None

    def _often(self, chance: float) -> bool:
        return self.dice.random() < chance

    def _snap(self, kind: str = "disk", disks: tuple[str, ...] = DISKS) -> Snap:
        return Snap(self.known.active, disks, kind, head=self.known.head)

    def create(self) -> Act | None:
        """A snapshot of the disks."""
        name = f"s{self.number}"
        disks: tuple[str, ...] = DISKS
        words = ["snapshot", "create", self.known.name, name]
        if self._often(0.15) and self.known.guest != "writer":
            disks = ("vda",)
            words += ["--disks", "vda"]
        elif self._often(0.1):
            words += ["--file", f"vdb={self.world.images}/chosen-{self.number}.qcow2"]
        return Act(words, Expect(appear={name: self._snap(disks=disks)}, current=name))

    def layers(self) -> Act | None:
        """New layers without a snapshot."""
        return Act(["snapshot", "create", self.known.name, "--no-snapshot"], Expect())

    def full(self) -> Act | None:
        """A snapshot with memory."""
        name = f"f{self.number}"
        return Act(
            ["snapshot", "create", self.known.name, name, "--kind", "full"],
            Expect(appear={name: self._snap("full")}, current=name),
        )

    def internal(self) -> Act | None:
        """A snapshot inside the images."""
        name = f"i{self.number}"
        words = ["snapshot", "create", self.known.name, name, "--kind", "internal"]
        if self._often(0.4):
            words.append("--no-memory")
        return Act(words, Expect(appear={name: self._snap("internal")}, current=name))

    def push(self) -> Act | None:
        """A snapshot to come back to."""
        name = f"p{self.number}"
        snap = self._snap()
        snap.pushed = True
        return Act(["snapshot", "push", self.known.name, name], Expect(appear={name: snap}, current=name))

    def pop(self) -> Act | None:
        """Back to the current one, which goes."""
        seen = self.known.seen
        current = seen.current if seen else None
        snap = self.known.snapshots.get(current or "")
        words = ["snapshot", "pop", self.known.name]
        if snap is None or current is None:
            return Act(words, Expect())
        if agreed := self._often(0.3):
            words.append("--discard")
        if not (snap.pushed or agreed) or snap.consumed:
            return Act(words, Expect())
        return Act(words, Expect(done=self._back(snap), vanish={current}))

    def revert(self) -> Act | None:
        """Back to some snapshot."""
        name = self._one(sorted(self.known.snapshots))
        discard, state = self._often(0.25), self._one(("", "", "", "--paused", "--running"))
        if name is None:
            return None
        snap = self.known.snapshots[name]
        words = ["snapshot", "revert", self.known.name, name]
        words += ["--discard"] if discard else []
        words += [state] if state and (self.known.guest == "writer" or state == "--paused") else []
        if "--paused" not in words and self.known.guest == "still" and self.known.running:
            words.append("--paused")
        if snap.consumed:
            return Act(words, Expect())
        # What a discarding revert removes are layers that were active: snapshots stay.
        return Act(words, Expect(done=self._back(snap), keeps=not discard, auto=not discard, current=name))

    def _back(self, snap: Snap) -> Written | Counting:
        """What the active disks hold after a revert to it."""
        known = self.known
        if known.guest == "writer":
            # A machine that starts again counts on; one that stays stopped is at the snapshot, which is where it began.
            return counting(snap)
        assert isinstance(snap.moment, Written)
        return known.active.mixed(snap.moment, snap.disks) if isinstance(known.active, Written) else snap.moment

    def delete(self) -> Act | None:
        """One snapshot or several."""
        names = sorted(self.known.snapshots)
        chosen = {name for name in (self._one(names), self._one(names) if self._often(0.4) else None) if name}
        if not chosen:
            return None
        words = ["snapshot", "delete", self.known.name, *sorted(chosen)]
        if self._often(0.15):
            words.append("--metadata")
        return Act(words, Expect(vanish=chosen))

    def commit(self) -> Act | None:
        """Layers downwards."""
        disk, words, low, high = self._merge("commit")
        consume = self._often(0.8)
        words += (["--base", low] if low else []) + (["--top", high] if high else [])
        words += ["--consume"] if consume else []
        lost = consumable(self.known, disk, self.known.seen.chains) if self.known.seen and consume else set()
        return Act(words, Expect(consume=lost, agreed=consume))

    def stream(self) -> Act | None:
        """Layers upwards."""
        _, words, low, _ = self._merge("stream")
        return Act(words + (["--base", low] if low else []), Expect())

    def _merge(self, verb: str) -> tuple[str, list[str], str | None, str | None]:
        disk = self._one(DISKS) or "vda"
        ids = [layer["layer"] for layer in self.known.seen.chains[disk]] if self.known.seen else []
        low, high = self._one([None, *ids[:-1]]), self._one([None, None, *ids[1:]])
        return disk, [verb, self.known.name, disk], low, high

    def mirror(self) -> Act | None:
        """Copies a disk and goes on with the copy."""
        disk = self._one(DISKS) or "vda"
        target = self.world.images / f"copy-{self.number}.qcow2"
        words = ["mirror", self.known.name, disk, str(target), "--pivot"]
        return Act(words + (["--shallow"] if self._often(0.4) else []), Expect())

    def rename(self) -> Act | None:
        """Another name."""
        old = self._one(sorted(self.known.snapshots))
        if old is None:
            return None
        new = f"r{self.number}"
        return Act(["snapshot", "rename", self.known.name, old, new], Expect(rename=(old, new)))

    def save(self) -> Act | None:
        """Memory and disks, and off."""
        name = f"v{self.number}"
        expect = Expect(appear={name: self._snap("full")}, running=False, current=name)
        words = ["save", self.known.name, "--name", name]
        return Act(words + (["--compress", "zstd"] if self._often(0.2) else []), expect)

    def restore(self) -> Act | None:
        """On from the latest memory."""
        full = [name for name, snap in self.known.snapshots.items() if snap.kind == "full"]
        discard = self._often(0.3)
        words = ["restore", self.known.name, *(["--discard"] if discard else [])]
        if not full or self.known.seen is None:
            return None
        latest = max(full, key=lambda name: list(self.known.seen.snapshots).index(name))  # type: ignore[union-attr]
        snap = self.known.snapshots[latest]
        if snap.consumed:
            return Act(words, Expect())
        done = self._back(snap)
        return Act(words, Expect(done=done, keeps=not discard, auto=not discard, running=True, current=latest))

    def start(self) -> Act | None:
        """QEMU; the guest runs only if it is one that counts."""
        paused = self.known.guest == "still" or self._often(0.2)
        return Act(["start", self.known.name, *(["--paused"] if paused else [])], Expect(self._on(), running=True))

    def _on(self) -> Counting | None:
        """Where the guest that counts may be, once it has been let run."""
        return Counting(self.known.head, time.monotonic()) if self.known.guest == "writer" else None

    def stop(self) -> Act | None:
        """The plug."""
        return Act(["stop", self.known.name, "--force"], Expect(running=False))

    def pause(self) -> Act | None:
        """The vCPUs."""
        return Act(["pause", self.known.name], Expect())

    def resume(self) -> Act | None:
        """On, where a guest is that counts."""
        return Act(["resume", self.known.name], Expect(self._on())) if self.known.guest == "writer" else None

    def check(self) -> Act | None:
        """Looks, and repairs what is not there to be repaired."""
        options = self._one(([], ["--deep"], ["--repair"], ["--deep", "--repair"])) or []
        return Act(["check", self.known.name, *options], Expect())

    def recover(self) -> Act | None:
        """Ends what is open: nothing."""
        return Act(["recover", self.known.name], Expect())


VERBS: dict[str, tuple[int, Callable[[Chooser], Act | None]]] = {
    "create": (14, Chooser.create),
    "layers": (2, Chooser.layers),
    "full": (8, Chooser.full),
    "internal": (5, Chooser.internal),
    "push": (4, Chooser.push),
    "pop": (8, Chooser.pop),
    "revert": (12, Chooser.revert),
    "delete": (10, Chooser.delete),
    "commit": (10, Chooser.commit),
    "stream": (7, Chooser.stream),
    "mirror": (5, Chooser.mirror),
    "rename": (3, Chooser.rename),
    "save": (3, Chooser.save),
    "restore": (3, Chooser.restore),
    "start": (9, Chooser.start),
    "stop": (5, Chooser.stop),
    "pause": (2, Chooser.pause),
    "resume": (2, Chooser.resume),
    "check": (3, Chooser.check),
    "recover": (1, Chooser.recover),
}
"""How often each is chosen, and who makes it."""


def weights(known: Known) -> dict[str, float]:
    """How often each verb is chosen of this machine now: those that would only be refused are rare, and not never."""
    seen = known.seen
    deep = seen is not None and any(len(chain) > 1 for chain in seen.chains.values())
    pushed = seen is not None and seen.current in known.snapshots and known.snapshots[seen.current].pushed
    wanted = {
        "full": known.running and known.guest == "writer",
        **dict.fromkeys(("save", "stop"), known.running),
        "pause": known.running and not known.paused,
        "resume": known.paused,
        "start": not known.running,
        **dict.fromkeys(("commit", "stream"), deep),
        "pop": pushed,
    }
    return {verb: weight * (1.0 if wanted.get(verb, True) else 0.15) for verb, (weight, _) in VERBS.items()}
