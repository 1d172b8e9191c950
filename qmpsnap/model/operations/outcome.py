"""What an operation has come to: a pure comparison of what the store recorded of its machine before it and after it."""

from collections.abc import Iterator, Mapping

from msgspec import Struct

from qmpsnap.effect import Effect


class Recorded(Struct, frozen=True):
    """What the store has of a machine that an operation can change.

    Of each snapshot its state, by name; of each disk id and size in bytes of its layers, base first. ``name``: its own;
    None where an earlier release has not recorded it.
    """

    current: str | None = None
    snapshots: Mapping[str, str] = {}
    disks: Mapping[str, tuple[tuple[str, int], ...]] = {}
    name: str | None = None


def effect(before: Recorded, after: Recorded, *, settled: bool) -> Effect:
    """What an operation that has ended has done; one that was undone may have left something all the same."""
    return "applied" if settled or before != after else "none"


def left(before: Recorded, after: Recorded) -> str:
    """What is otherwise, in words; empty where nothing is."""
    return ", ".join(_differences(before, after))


def _differences(before: Recorded, after: Recorded) -> Iterator[str]:
    if before.name and before.name != after.name:
        yield f"the machine is {after.name}"
    yield from _of_snapshots(before, after)
    yield from _of_disks(before, after)
    if after.current != before.current and before.current in after.snapshots:
        yield f"the current snapshot is {after.current or 'none'}"


def _of_snapshots(before: Recorded, after: Recorded) -> Iterator[str]:
    for name, state in before.snapshots.items():
        if name not in after.snapshots:
            yield f"snapshot {name} is gone"
        elif after.snapshots[name] != state:
            yield f"snapshot {name} is {after.snapshots[name]}"
    for name in after.snapshots:
        if name not in before.snapshots:
            yield f"snapshot {name} is there"


def _of_disks(before: Recorded, after: Recorded) -> Iterator[str]:
    for disk in before.disks:
        if disk not in after.disks:
            yield f"disk {disk} is detached"
    for disk, layers in after.disks.items():
        old = before.disks.get(disk, ())
        if not layers or not old or layers[-1][0] != old[-1][0]:
            yield f"disk {disk} writes to layer {layers[-1][0] if layers else 'none'}"
        elif [layer for layer, _ in layers] != [layer for layer, _ in old]:
            yield f"the layers of disk {disk} changed"
        elif layers != old:
            yield f"a layer of disk {disk} has grown"
