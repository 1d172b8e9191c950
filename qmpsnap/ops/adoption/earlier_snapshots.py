"""Which snapshots of its former manager a machine begins with: those that its files still have; pure."""

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from qmpsnap.block.image.header import printable
from qmpsnap.block.image.snapshot_table import Entry
from qmpsnap.errors import NameRefused
from qmpsnap.host.files import Inode
from qmpsnap.imports.found import Frozen, Moment, oldest_first, plain_name
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import MAX_DESCRIPTION, LayerId, OperationId
from qmpsnap.ops.base import requests


class Below(Struct, frozen=True):
    """One layer of a disk as it was found: its id here, and its file."""

    id: LayerId
    file: Inode


class Disk(Struct, frozen=True):
    """What lies under a disk, base first, and the tags inside the image that its guest writes to."""

    layers: tuple[Below, ...]
    tags: tuple[Entry, ...] = ()


class Taken(Struct, frozen=True):
    """The snapshots that a machine begins with, the current one, and why it has not the others, a sentence each."""

    snapshots: tuple[Snapshot, ...] = ()
    current: str | None = None
    left_out: tuple[str, ...] = ()


def choose(
    machine: Machine,
    moments: Sequence[Moment],
    disks: Mapping[str, Disk],
    files: Mapping[str, Inode | None],
    *,
    operation: OperationId,
) -> Taken:
    """Compare what a manager tells of snapshots with the files.

    Args:
        machine: that is defined.
        moments: as its manager tells of them; tags that no moment is about are taken as snapshots, too.
        disks: what lies under its disks.
        files: of each path in the moments the file that is there now.
        operation: that defines it.
    """
    tags, strays = _unnamed(machine, moments, disks)
    every = oldest_first([*moments, *tags])
    parents = {moment.original: moment.parent for moment in every}
    kept: dict[str, Snapshot] = {}
    left_out: list[str] = [*strays]
    for moment in every:
        found = _points(machine, moment, disks, files)
        if isinstance(found, str):
            left_out.append(f"snapshot {printable(moment.original)}: {found}")
            continue
        parent = moment.parent
        for _ in parents:
            parent = parent if parent is None or parent in kept else parents.get(parent)
        kept[moment.original] = Snapshot(
            name=moment.name,
            kind="internal" if found[0].tag else "disk",
            state="ok",
            parent=kept[parent].name if parent in kept else None,
            created=moment.created,
            description=moment.description.encode()[:MAX_DESCRIPTION].decode(errors="ignore"),
            mode=moment.mode,
            points=found,
            operation=operation,
        )
    snapshots = tuple(kept.values())
    said = [kept[moment.original].name for moment in every if moment.current and moment.original in kept]
    below = {disk.layers[-2].id for disk in disks.values() if len(disk.layers) > 1}
    on_top = [one.name for one in snapshots if one.kind == "disk" and {point.layer for point in one.points} <= below]
    return Taken(snapshots, next(reversed(said or on_top), None), tuple(left_out))


def _unnamed(
    machine: Machine, moments: Sequence[Moment], disks: Mapping[str, Disk]
) -> tuple[list[Moment], Iterator[str]]:
    """Tags that no moment is about: a moment each where all disks have it, else a sentence."""
    told = {moment.original for moment in moments}
    whole = [disk.name for disk in machine.spec.disks if disk.snapshot and not disk.read_only]
    having: dict[str, list[str]] = {}
    times: dict[str, float] = {}
    for name, disk in disks.items():
        for tag in disk.tags:
            if tag.name not in told:
                having.setdefault(tag.name, []).append(name)
                times[tag.name] = max(times.get(tag.name, 0.0), tag.created)
    names = {moment.name for moment in moments}
    found: list[Moment] = []
    for tag_name in [tag_name for tag_name, on in having.items() if on == whole]:
        name = plain_name(tag_name, taken=names, fallback="snapshot")
        names.add(name)
        found.append(Moment(name=name, original=tag_name, created=times[tag_name], inside=tuple(whole)))
    strays = (
        f"internal snapshot {printable(tag_name)}: it is not exactly once inside every disk, but in {', '.join(on)}"
        for tag_name, on in having.items()
        if on != whole
    )
    return found, strays


def _points(
    machine: Machine, moment: Moment, disks: Mapping[str, Disk], files: Mapping[str, Inode | None]
) -> tuple[Point, ...] | str:
    """Where each disk's content lies, or why the files do not have it."""
    if moment.why_not:
        return moment.why_not
    try:
        requests.require_snapshot_name(machine, (), moment.name)
    except NameRefused as error:
        return error.message
    outside = {name: one for name, one in moment.frozen.items() if name not in moment.inside or files.get(one.path)}
    inside = [name for name in moment.inside if name not in outside]
    found = [_tagged(moment.original, name, disks[name]) for name in inside]
    found += [_frozen(frozen, name, disks[name].layers, files) for name, frozen in outside.items()]
    points = [point for point in found if isinstance(point, Point)]
    if len(points) < len(found):
        return next(why for why in found if isinstance(why, str))
    if inside and outside:
        return "some of its disks lie inside their images and some outside"
    return tuple(points)


def _tagged(tag: str, name: str, disk: Disk) -> Point | str:
    if [entry.name for entry in disk.tags].count(tag) != 1:
        return f"disk {name} has no such tag inside"
    if any(entry.id == tag and entry.name != tag for entry in disk.tags):
        return f"inside disk {name} its name is another tag's number"
    return Point(disk=name, layer=disk.layers[-1].id, tag=tag)


def _frozen(frozen: Frozen, name: str, layers: Sequence[Below], files: Mapping[str, Inode | None]) -> Point | str:
    path = printable(frozen.path)
    found = [number for number, layer in enumerate(layers) if layer.file == files.get(frozen.path)]
    if not found:
        return f"{path} is not among the images of disk {name}"
    if found[0] == len(layers) - 1:
        return f"the guest writes to {path}"
    if frozen.above and layers[found[0] + 1].file != files.get(frozen.above):
        return f"{printable(frozen.above)} does not lie on {path} any more"
    return Point(disk=name, layer=layers[found[0]].id)
