"""A store without disks: a file is a dict, a guest writes numbers, and what every moment held is remembered.

Plans of :mod:`qmpsnap.model.planning.merging` are executed literally on these files, as QEMU would, and judged by what
the files then read, never by the rules that made the plan.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot, SnapshotState
from qmpsnap.model.names import LayerId, OperationId, layer_id
from qmpsnap.model.operations.operation import Change, Merge, Removal
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest, Reference, Writer
from qmpsnap.model.planning.state import Situation

CLUSTER = 1 << 16

Content = dict[int, int]
"""Cluster number to what was written there; 0 are zeroes, which hide what lies below."""


@dataclass
class File:
    """What lies on the disk: allocated clusters, the header's backing, and the size in clusters."""

    cells: Content
    backing: LayerId | None
    size: int


@dataclass
class Guest:
    """A machine: what its guest must read on each disk, and what each snapshot must hold."""

    name: str
    disks: dict[str, Content]
    running: bool = False
    current: str | None = None
    snapshots: tuple[Snapshot, ...] = ()
    records: dict[str, dict[str, Content]] = field(default_factory=dict)

    def states(self) -> dict[str, SnapshotState]:
        return {snapshot.name: snapshot.state for snapshot in self.snapshots}


class World:
    def __init__(self) -> None:
        self.files: dict[LayerId, File] = {}
        self.guests: dict[str, Guest] = {}
        self.forest = Forest({}, (), ())
        self._serial = 0
        self._written = 0
        self.moved: Counter[tuple[LayerId, int]] = Counter()
        self._origin: dict[tuple[LayerId, int], tuple[LayerId, int]] = {}

    # --- what users and guests do --------------------------------------------------------------------------------

    def serial(self) -> int:
        self._serial += 1
        return self._serial

    def image(self, disk: str, *, size: int, backing: LayerId | None = None, owned: bool = True) -> Layer:
        """A new file, not yet in the store."""
        identity = layer_id(disk, self.serial())
        self.files[identity] = File({}, backing, size)
        path = f"/q/{identity}.qcow2"
        return Layer(
            id=identity, path=path, format="qcow2", backing=backing, virtual_size=size * CLUSTER, owned=owned
        )  # fmt: skip

    def define(self, name: str, *tops: tuple[str, Layer], below: tuple[Layer, ...] = ()) -> Guest:
        """A machine whose disks are active on the given layers; ``below`` are layers new to the store."""
        layers = {layer.id: layer for layer in (*below, *(layer for _, layer in tops))}
        change = Change(layers=tuple(layers.values()), active={disk: layer.id for disk, layer in tops})
        self.forest = self.forest.apply(name, change)
        self.guests[name] = Guest(name, {disk: self.read(layer.id) for disk, layer in tops})
        return self.guests[name]

    def clone(self, name: str, *bases: tuple[str, LayerId], more: int = 0, owned: bool = True) -> Guest:
        """A machine with an overlay on each given layer, ``more`` clusters larger; not ``owned``: made by hand."""
        sizes = {base: self.files[base].size + more for _, base in bases}
        tops = [(disk, self.image(disk, size=sizes[base], backing=base, owned=owned)) for disk, base in bases]
        return self.define(name, *tops)

    def undefine(self, name: str) -> None:
        """Forget a machine, and every layer that only it needed, as the store does."""
        used = {LayerId(x) for x in self.forest.layers if name in self.users(x)}
        del self.guests[name]
        self.forest = Forest(
            self.forest.layers,
            tuple(w for w in self.forest.writers if w.machine != name),
            tuple(r for r in self.forest.references if r.machine != name),
        )
        while gone := [layer for layer in self.forest.layers if layer in used and not self.forest.readers(layer)]:
            self.forest = self.forest.apply(name, Change(removed_layers=tuple(gone)))

    def write(self, name: str, disk: str, *clusters: int) -> None:
        """The guest writes something new to each cluster; a negative number writes zeroes instead."""
        active = self.files[self.active(name, disk)]
        for cluster in clusters:
            self._written += 1
            place, value = (cluster, self._written) if cluster >= 0 else (-cluster - 1, 0)
            if place < active.size:
                active.cells[place] = value
                self.guests[name].disks[disk][place] = value
                if not value:
                    del self.guests[name].disks[disk][place]

    def create(self, name: str, snapshot: str | None, disks: Collection[str] | None = None) -> None:
        """Freeze active layers under new overlays; without a name the list gets no entry."""
        guest = self.guests[name]
        frozen = {disk: self.active(name, disk) for disk in guest.disks if disks is None or disk in disks}
        overlays = {disk: self._overlay(disk, layer) for disk, layer in frozen.items()}
        self._change(name, Change(layers=tuple(overlays.values()), active={d: o.id for d, o in overlays.items()}))
        if snapshot:
            self._record(guest, snapshot, frozen)

    def revert(self, name: str, snapshot: str, *, discard: bool) -> None:
        """New overlays on the snapshot's points; the state left behind is kept, or forgotten with its layers."""
        guest = self.guests[name]
        (found,) = (s for s in guest.snapshots if s.name == snapshot)
        left = {point.disk: self.active(name, point.disk) for point in found.points}
        if not discard:
            self._record(guest, f"auto-{self.serial()}", left)
        overlays = {point.disk: self._overlay(point.disk, point.layer) for point in found.points}
        self._change(name, Change(layers=tuple(overlays.values()), active={d: o.id for d, o in overlays.items()}))
        if discard:
            gone = tuple(layer for layer in left.values() if not self.forest.readers(layer))
            self._change(name, Change(removed_layers=gone))
        for point in found.points:
            guest.disks[point.disk] = dict(guest.records[snapshot][point.disk])
        guest.current = snapshot

    def _overlay(self, disk: str, backing: LayerId) -> Layer:
        return self.image(disk, size=self.files[backing].size, backing=backing)

    def _record(self, guest: Guest, name: str, points: dict[str, LayerId]) -> None:
        taken = Snapshot(
            name=name,
            kind="disk",
            state="ok",
            parent=guest.current,
            created=self._serial,
            description="",
            mode="live" if guest.running else "stopped",
            points=tuple(Point(disk=disk, layer=layer) for disk, layer in points.items()),
            operation=OperationId(self._serial),
        )
        guest.records[name] = {disk: dict(guest.disks[disk]) for disk in points}
        self._change(guest.name, Change(snapshots=(taken,)))
        guest.current = name

    # --- what a plan does ----------------------------------------------------------------------------------------

    def situation(self, name: str) -> Situation:
        guest = self.guests[name]
        return Situation(
            basis=Basis(
                name=name,
                chains=tuple(self.forest.chain(w.disk, w.layer) for w in self.forest.writers if w.machine == name),
                snapshots=guest.snapshots,
                forest=self.forest,
            ),
            running=guest.running,
            bytes={layer: CLUSTER * len(self.files[layer].cells) for layer in self.forest.layers},
        )

    def settle(self, name: str, change: Change) -> None:
        """Record a change of a plan."""
        self._change(name, change)

    def plan_begins(self) -> None:
        """From here on count how often each cluster moves."""
        self.moved.clear()
        self._origin.clear()

    def execute(self, name: str, step: Merge | Removal) -> int:
        """Do what a step says, file by file; returns the bytes it moved."""
        clusters = self._run_job(step) if isinstance(step, Merge) else 0
        self._change(name, step.change)
        for layer in step.removed:
            del self.files[layer.id]
        return clusters * CLUSTER

    def _run_job(self, step: Merge) -> int:
        ids = [layer.id for layer in step.chain]
        into, top = self.files[step.into.id], ids.index(step.top.id)
        clusters = 0
        if step.kind == "commit":
            for layer in ids[ids.index(step.into.id) + 1 : top + 1]:
                for place in self.files[layer].cells:
                    clusters += self._copy(layer, step.into.id, place)
            into.size = max(into.size, self.files[step.top.id].size)
            for layer in (*ids[top + 1 : top + 2], *(layer.id for layer in step.rebased)):
                self.files[layer].backing = step.into.id
            return clusters
        low = ids.index(step.base.id) + 1 if step.base else 0
        for layer in reversed(ids[low:top]):
            for place in self.files[layer].cells:
                if place not in into.cells:
                    clusters += self._copy(layer, step.into.id, place)
        into.backing = step.base.id if step.base else None
        return clusters

    def _copy(self, source: LayerId, target: LayerId, place: int) -> int:
        origin = self._origin.get((source, place), (source, place))
        self._origin[target, place] = origin
        self.moved[origin] += 1
        self.files[target].cells[place] = self.files[source].cells[place]
        return 1

    def _change(self, name: str, change: Change) -> None:
        after = self.situation(name).after(change)
        self.forest, self.guests[name].snapshots = after.forest, after.snapshots

    # --- what is there -------------------------------------------------------------------------------------------

    def active(self, name: str, disk: str) -> LayerId:
        (writer,) = (w for w in self.forest.writers if (w.machine, w.disk) == (name, disk))
        return writer.layer

    def chain(self, name: str, disk: str) -> Chain:
        return self.situation(name).live[disk]

    def ids(self, name: str, disk: str = "vda") -> tuple[LayerId, ...]:
        return self.chain(name, disk).ids

    def point(self, name: str, snapshot: str, disk: str = "vda") -> LayerId:
        (found,) = (s for s in self.guests[name].snapshots if s.name == snapshot)
        point = found.point(disk)
        assert point
        return point.layer

    def below(self, layer: LayerId) -> Iterator[LayerId]:
        """The layer and what it reads, by the headers."""
        seen = set()
        at: LayerId | None = layer
        while at is not None:
            assert at not in seen, f"{at} reads itself"
            seen.add(at)
            yield at
            at = self.files[at].backing

    def read(self, layer: LayerId) -> Content:
        """What a reader of that file sees."""
        found: Content = {}
        for at in reversed(list(self.below(layer))):
            file = self.files[at]
            found = {place: value for place, value in found.items() if place < file.size} | file.cells
        return {place: value for place, value in found.items() if value}

    def above(self, layer: LayerId) -> set[LayerId]:
        """The layers of the store whose header names this one."""
        return {found for found in self.forest.layers if self.files[found].backing == layer}

    def users(self, layer: LayerId) -> set[str]:
        """The machines whose disks or snapshots read the layer."""
        points = [(g.name, p.layer) for g in self.guests.values() for s in g.snapshots for p in s.points]
        tops = [*points, *((w.machine, w.layer) for w in self.forest.writers)]
        return {name for name, top in tops if layer in self.below(top)}

    def open_in(self, name: str) -> dict[str, tuple[LayerId, ...]]:
        """Per disk the files that the machine's QEMU has open, base first; none when it does not run."""
        if not self.guests[name].running:
            return {}
        mine = (writer for writer in self.forest.writers if writer.machine == name)
        return {writer.disk: tuple(reversed(list(self.below(writer.layer)))) for writer in mine}


def check_world(world: World) -> None:
    """The store, the files and every reader agree (I1, I3, I4)."""
    forest = world.forest
    for layer in forest.layers.values():
        file = world.files[layer.id]
        assert layer.backing == file.backing
        assert layer.virtual_size == file.size * CLUSTER
        assert all(below in forest.layers for below in world.below(layer.id)), "dangling"
    points = {
        Reference(guest.name, snapshot.name, point.disk, point.layer)
        for guest in world.guests.values()
        for snapshot in guest.snapshots
        for point in snapshot.points
    }
    assert points == set(forest.references)
    assert {point.layer for point in points} <= set(forest.layers), "a point dangles"
    for guest in world.guests.values():
        assert [s.created for s in guest.snapshots] == sorted(s.created for s in guest.snapshots), "not oldest first"
        names = {snapshot.name for snapshot in guest.snapshots}
        for snapshot in guest.snapshots:
            assert snapshot.parent is None or snapshot.parent in names, "the parent is gone"
            for point in snapshot.points if snapshot.state == "ok" else ():
                assert world.read(point.layer) == guest.records[snapshot.name][point.disk], f"I1: {snapshot.name}"
                assert not forest.writers_of(point.layer), f"{snapshot.name} lies where a guest writes"
        for disk, content in guest.disks.items():
            active = world.active(guest.name, disk)
            assert world.read(active) == content, f"{guest.name} {disk} reads something else"
            assert not world.above(active), "I4: a guest writes to what others read"
            assert forest.writers_of(active) == (Writer(guest.name, disk, active),)


def check_merge(world: World, name: str, step: Merge) -> None:
    """Before a job: everything it writes to is its machine's, ours, and open nowhere else; its words are true."""
    forest, ids = world.forest, [layer.id for layer in step.chain]
    assert [forest.layer(layer) for layer in ids] == list(step.chain), "stale layers"
    assert ids == list(reversed(list(world.below(step.root)))), "chain is not what lies below root"
    assert ids[-1] == step.root
    into, top = ids.index(step.into.id), ids.index(step.top.id)
    if step.kind == "commit":
        assert step.base is None
        assert into < top
        between = ids[into + 1 : top + 1]
        for layer, above in zip(ids[into:top], between, strict=True):
            assert world.above(layer) == {above}, "I4: a branch reads what changes"
            assert not forest.writers_of(layer)
            ok = [(g.name, s.name) for g, s in _ok_at(world, layer)]
            assert not ok, f"{ok} would be lost"
        headers = {*ids[top + 1 : top + 2], *(layer.id for layer in step.rebased)}
    else:
        assert into == top
        low = ids.index(step.base.id) + 1 if step.base else 0
        between, headers = ids[low:top], {step.into.id}
        assert between
    assert step.moves == CLUSTER * sum(len(world.files[layer].cells) for layer in between)
    written = {step.into.id, *headers}
    gone = {layer.id for layer in step.removed}
    for layer in written:
        assert forest.layer(layer).owned, f"I9: {layer} is not ours"
        assert world.users(layer) <= {name}, f"I4: others read {layer}"
    assert world.users(step.top.id) <= {name}
    mine = world.open_in(name)
    if step.live:
        assert tuple(ids) == mine[step.disk], "a live job runs in the live chain"
        elsewhere = {layer for disk, chain in mine.items() for layer in chain if disk != step.disk}
        elsewhere |= {layer.id for layer in step.rebased if layer.id in mine[step.disk]}
    else:
        assert step.root == step.top.id
        elsewhere = {layer for chain in mine.values() for layer in chain}
        for other in world.guests:
            tops = {chain[-1] for chain in world.open_in(other).values()}
            assert not tops & set(ids), "a helper would open what a guest writes"
    assert not (written | gone) & elsewhere, "open in QEMU elsewhere"
    for other in world.guests.keys() - {name}:
        chains = world.open_in(other).values()
        assert not any((written | gone) & set(chain) for chain in chains), "open in another machine"


def check_step_done(before: Forest, world: World, step: Merge | Removal) -> None:
    """After a step: the change tells exactly what happened, and what went had no reader."""
    after = world.forest
    gone = before.layers.keys() - after.layers.keys()
    assert gone == set(step.change.removed_layers)
    assert {layer.id for layer in step.removed} == {x for x in gone if before.layer(x).owned}
    for layer in gone:
        assert not world.above(layer)
        assert not after.writers_of(layer)
        assert not after.references_to(layer)
    if isinstance(step, Removal):
        return
    moved = {x for x in after.layers if x in before.layers and before.layer(x).backing != after.layer(x).backing}
    assert {layer.id for layer in step.rebased} == moved - {layer.id for layer in step.chain}
    if step.kind == "stream":
        assert moved == {step.into.id}
        between = [x.id for x in step.chain[: step.chain.index(step.into)]]
        between = between[between.index(step.base.id) + 1 if step.base else 0 :]
        assert all(after.readers(x) for x in between if x in after.layers), "kept for nobody"
    else:
        assert moved == {layer.id for layer in before.children(step.top.id)}


def _ok_at(world: World, layer: LayerId) -> Iterator[tuple[Guest, Snapshot]]:
    for guest in world.guests.values():
        for snapshot in guest.snapshots:
            if snapshot.state == "ok" and any(point.layer == layer for point in snapshot.points):
                yield guest, snapshot


def run_steps(world: World, name: str, steps: Collection[Merge | Removal]) -> int:
    """Execute and judge the steps of one plan; returns the bytes they moved."""
    world.plan_begins()
    total = 0
    for step in steps:
        before = world.forest
        if isinstance(step, Merge):
            check_merge(world, name, step)
        moved = world.execute(name, step)
        assert moved <= (step.moves if isinstance(step, Merge) else 0)
        total += moved
        check_step_done(before, world, step)
        check_world(world)
    assert max(world.moved.values(), default=0) <= 1, "a cluster moved twice"
    return total


def mark_hidden(world: World, name: str, layers: Collection[LayerId]) -> Change:
    """What a delete opens with: layers that lost their name are hidden."""
    forest = world.forest
    kept = [x for x in layers if x in forest.layers and not forest.references_to(x) and not forest.writers_of(x)]
    return Change(layers=tuple(replace(forest.layer(x), state="hidden") for x in kept))
