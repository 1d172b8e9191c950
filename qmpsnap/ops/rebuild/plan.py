"""What a lost store must have said, by what lies on the disks. Pure.

A layer's number tells its age: an overlay that operation N made is ``DISK-N``, and what it was laid on is where that
disk stood then. So the overlays of one number are one moment of the machine, the names of the moments aside.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot, SnapshotKind
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId, tag_number
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base import requests

TEXT = "found on disk when the store was rebuilt"


class Image(Struct, frozen=True):
    """An image that was found.

    Attributes:
        layer: what it is recorded as.
        written: when it was last written to, seconds since the epoch.
        tags: inside it.
        of: the machine and disk it was made for; None for what is only read.
    """

    layer: Layer
    written: float
    tags: frozenset[str] = frozenset()
    of: tuple[str, str] | None = None


class Unread(Struct, frozen=True):
    """A layer that could not be read, or what it reads: of which machine and disk, and with which number.

    ``remedy`` is what to do about the file at ``path`` when it is lost for good.
    """

    machine: str
    disk: str
    number: int
    path: str
    remedy: str


class State(Struct, frozen=True):
    """A state file that was found, and what its manifest says; ``written``: when it was last written to."""

    vmstate: Vmstate
    operation: OperationId
    snapshot: str
    created: float
    points: Mapping[str, LayerId]
    written: float


class _Moment(Struct, frozen=True):
    """A time at which disks stood at these layers; ``order`` sorts by age."""

    order: tuple[int, int]
    points: tuple[Point, ...]
    kind: SnapshotKind = "disk"
    state: State | None = None


class Rebuilt(Struct, frozen=True):
    """What a machine's row, layers and snapshots are.

    Attributes:
        missing: the disks that have no image.
        unused: state files that cannot be given their snapshot.
        guessed: disk to its active layer, where others could have been that.
        unread: layers that may be the active ones, and it cannot be told.
    """

    change: Change
    missing: tuple[str, ...]
    unused: tuple[State, ...]
    guessed: dict[str, LayerId]
    unread: tuple[Unread, ...]


def plan(
    machine: Machine,
    images: Sequence[Image],
    states: Sequence[State],
    running: Mapping[str, LayerId] | None,
    *,
    unread: Sequence[Unread],
    variables: Mapping[int, str],
    taken: Mapping[int, str],
) -> Rebuilt:
    """The machine as it must have been recorded.

    Args:
        machine: as it was written down.
        images: all that were found, of all machines.
        states: the machine's.
        running: disk to active layer, as the QEMU that runs says; None when it is stopped.
        unread: the layers that are not among the images, of all machines.
        variables: operation to the copy of the UEFI variable store that it made: an internal snapshot, or a revert.
        taken: the same of snapshots by new layers.
    """
    layers = {image.layer.id: image for image in images}
    read = {image.layer.backing for image in images}
    active: dict[str, LayerId] = {}
    guessed: dict[str, LayerId] = {}
    leaves: list[tuple[str, Layer]] = []
    for disk in machine.spec.disks:
        tops = [image.layer for image in images if image.of == (machine.name, disk.name) and image.layer.id not in read]
        if disk.image and not any(_reads(top.id, layers, disk.image) for top in tops):
            tops += [image.layer for image in images if image.layer.path == disk.image and image.layer.id not in read]
        top = (running or {}).get(disk.name) or max((layer.id for layer in tops), key=_number, default=None)
        if top is None or top not in layers:
            continue
        active[disk.name] = top
        if disk.name not in (running or {}) and len(tops) > 1:
            guessed[disk.name] = top
        leaves += [(disk.name, layer) for layer in tops if layer.id != top]
    moments = _moments(machine, images, states, leaves)
    own = [image.layer.id for image in images if image.of and image.of[0] == machine.name]
    copies = _copies(moments, own, variables, taken)
    snapshots = tuple(_snapshots(moments, layers, copies, layered=requests.layered(machine, ())))
    used = {moment.state.operation for moment in moments if moment.state}
    names = {point.layer: snapshot.name for snapshot in reversed(snapshots) for point in snapshot.points}
    current = next((found for top in active.values() if (found := _below(top, layers, names))), None)
    needed: dict[LayerId, Layer] = {}
    for top in [*active.values(), *names]:
        needed |= {layer.id: layer for layer in _chain(top, layers)}
    return Rebuilt(
        Change(
            define=machine,
            layers=tuple(sorted(needed.values(), key=lambda layer: _number(layer.id))),
            active=active,
            snapshots=snapshots,
            current=current,
        ),
        tuple(disk.name for disk in machine.spec.disks if disk.name not in active),
        tuple(state for state in states if state.operation not in used),
        guessed,
        tuple(
            layer
            for layer in unread
            if layer.machine == machine.name
            and layer.disk not in (running or {})
            and layer.number > (_number(active[layer.disk]) if layer.disk in active else 0)
        ),
    )


def _moments(
    machine: Machine, images: Sequence[Image], states: Sequence[State], leaves: Sequence[tuple[str, Layer]]
) -> list[_Moment]:
    """Every moment that something of the machine's still holds, oldest first; each layer stands for one."""
    bases = {disk.base for disk in machine.spec.disks}
    layers = {image.layer.id: image.layer for image in images}
    by_number: dict[int, list[Point]] = {}
    for image in images:
        if image.of is None or image.of[0] != machine.name or image.layer.backing is None:
            continue
        if layers[image.layer.backing].path not in bases:
            point = Point(disk=image.of[1], layer=image.layer.backing)
            by_number.setdefault(_number(image.layer.id), []).append(point)
    full = [
        _Moment((state.operation, 0), points, "full", state)
        for state in states
        if (points := tuple(by_number.get(state.operation, ())) or _untouched(state, images))
    ]
    found = [_Moment((number, 0), tuple(points)) for number, points in by_number.items()]
    left: dict[int, list[Point]] = {}
    for disk, layer in leaves:
        left.setdefault(_number(layer.id), []).append(Point(disk=disk, layer=layer.id))
    found += [_Moment((number, 1), tuple(points)) for number, points in left.items()]
    found += _inside(machine, images)
    seen = {point for moment in full for point in moment.points}
    kept = list(full)
    for moment in sorted(found, key=_age):
        if not set(moment.points) <= seen:
            kept.append(moment)
        seen |= set(moment.points)
    return sorted(kept, key=_age)


def _age(moment: _Moment) -> tuple[int, int]:
    return moment.order


def _untouched(state: State, images: Sequence[Image]) -> tuple[Point, ...]:
    """The layers that the manifest names, if all are there and none was written to since.

    Memory that goes on with other disks than its own destroys them, so where that is not certain it is left out.
    """
    written = {image.layer.id: image.written for image in images if image.of}
    if all(layer in written and written[layer] <= state.written for layer in state.points.values()):
        return tuple(Point(disk=disk, layer=layer) for disk, layer in state.points.items())
    return ()


def _inside(machine: Machine, images: Sequence[Image]) -> list[_Moment]:
    tags: dict[str, list[Point]] = {}
    for image in images:
        if image.of and image.of[0] == machine.name:
            for tag in (
                image.tags if image.layer.owned else filter(tag_number, image.tags)
            ):  # what a user made there is not ours
                tags.setdefault(tag, []).append(Point(disk=image.of[1], layer=image.layer.id, tag=tag))
    found = []
    for tag, points in sorted(tags.items()):
        number = tag_number(tag) or max(_number(point.layer) for point in points)
        found.append(_Moment((number, 2), tuple(points), "internal"))
    return found


def _copies(
    moments: Sequence[_Moment], own: Sequence[LayerId], variables: Mapping[int, str], taken: Mapping[int, str]
) -> dict[tuple[int, int], str]:
    """The copy of the UEFI variable store that each moment has, by the moment's order.

    An internal one has its own number, one by new layers that of the layers above it, unless they were merged away.
    What a revert has kept has that of the revert. Else the youngest layer of all that are older than a number is one of
    those that were active until then.
    """
    at = {moment.order[0]: moment.order for moment in moments if moment.order[1] == 0}
    inside = {moment.order[0]: moment.order for moment in moments if moment.kind == "internal"}
    found = {inside[number]: path for number, path in variables.items() if number in inside}
    found |= {at[number]: path for number, path in taken.items() if number in at}
    given = set(found.values())
    left = {number: path for number, path in (*variables.items(), *taken.items()) if path not in given}
    for number in sorted(left):
        youngest = max((layer for layer in own if _number(layer) < number), key=_number, default=None)
        for moment in moments:
            layers = {point.layer for point in moment.points}
            if moment.kind == "disk" and youngest in layers and all(_number(layer) < number for layer in layers):
                found.setdefault(moment.order, left[number])
    return found


def _snapshots(
    moments: Sequence[_Moment],
    images: Mapping[LayerId, Image],
    variables: Mapping[tuple[int, int], str],
    *,
    layered: Collection[str],
) -> Iterator[Snapshot]:
    taken = {moment.state.snapshot for moment in moments if moment.state}
    names: dict[LayerId, str] = {}
    used: set[str] = set()
    for moment in moments:
        name = moment.state.snapshot if moment.state else ""
        if not name or name in used:
            name = requests.free_name("found", taken | used, layered=layered)
        used.add(name)
        parent = next((found for p in moment.points if (found := _parent(p, images, names))), None)
        yield Snapshot(
            name=name,
            kind=moment.kind,
            state="ok",
            parent=parent,
            created=moment.state.created if moment.state else max(images[p.layer].written for p in moment.points),
            description=TEXT,
            mode="unknown",
            points=moment.points,
            operation=OperationId(moment.order[0]),
            vmstate=moment.state.vmstate if moment.state else None,
            variables=variables.get(moment.order),
        )
        for point in moment.points:
            names.setdefault(point.layer, name)


def _parent(point: Point, images: Mapping[LayerId, Image], names: Mapping[LayerId, str]) -> str | None:
    below = images[point.layer].layer.backing
    return names.get(point.layer) or (_below(point.layer, images, names) if below else None)


def _below(layer: LayerId, images: Mapping[LayerId, Image], names: Mapping[LayerId, str]) -> str | None:
    """The name of the nearest moment at or under a layer."""
    return next((names[below.id] for below in _chain(layer, images) if below.id in names), None)


def _chain(top: LayerId, images: Mapping[LayerId, Image]) -> Iterator[Layer]:
    at: LayerId | None = top
    while at is not None:
        yield images[at].layer
        at = images[at].layer.backing


def _reads(top: LayerId, images: Mapping[LayerId, Image], path: str) -> bool:
    return any(layer.path == path for layer in _chain(top, images))


def _number(layer: LayerId) -> int:
    return int(layer.rpartition("-")[2])
