"""``base: VM@SNAPSHOT`` in a spec: a disk that begins as the same disk of another machine was at a snapshot."""

from msgspec.structs import replace

from qmpsnap.errors import NotFoundError, StateError
from qmpsnap.hint import call
from qmpsnap.model.layers.snapshot import require_snapshot
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import SNAPSHOT_OF
from qmpsnap.ops.base.context import Context


async def resolved(context: Context, spec: MachineSpec) -> MachineSpec:
    """The spec with the file of that snapshot's layer, and its format, as the base of each such disk."""
    disks = [await _resolved(context, disk) for disk in spec.disks]
    return replace(spec, disks=tuple(disks))


async def _resolved(context: Context, disk: DiskSpec) -> DiskSpec:
    named = SNAPSHOT_OF.match(disk.base or "")
    if named is None:
        return disk
    machine, name = named[1], named[2]
    await context.astore.machine(machine)
    snapshot = require_snapshot(await context.astore.snapshots(machine), name, machine=machine)
    point = snapshot.point(disk.name)
    if point is None:
        raise NotFoundError(
            f"snapshot {name} of machine {machine} has no disk {disk.name}",
            hint="its disks: " + ", ".join(found.disk for found in snapshot.points),
            machine=machine,
        )
    if point.tag or snapshot.state != "ok":
        raise StateError(
            f"disk {disk.name} cannot be based on snapshot {name} of machine {machine}: it is"
            f" {'inside an image' if point.tag else snapshot.state}",
            hint="take another one: " + call("snapshot", machine),
            machine=machine,
        )
    layer = await context.astore.layer(point.layer)
    return replace(disk, base=layer.path, format=layer.format)
