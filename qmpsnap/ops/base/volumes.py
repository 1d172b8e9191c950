"""Which driver snapshots a layer, and its verbs for the layers of a plan."""

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from qmpsnap.errors import StoreMismatch
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.copies import VolumeCopy
from qmpsnap.ops.base import admission
from qmpsnap.ops.base.context import Context
from qmpsnap.volumes.driver import Ability, Driver, Volume
from qmpsnap.volumes.names import Role, VolumeName, of_path
from qmpsnap.volumes.reflink import Reflink


def driver_of(layer: Layer) -> Driver:
    """The driver for the storage that a layer lies on."""
    del layer
    return Reflink()


def volume_of(layer: Layer) -> Volume:
    """A layer as its driver knows it."""
    return Volume(
        path=layer.path,
        format=layer.format,
        device=layer.device,
        inode=layer.inode,
        birth=layer.birth,
        bytes=layer.virtual_size,
        name=of_path(layer.path),
    )


def is_snapshot(layer: Layer) -> bool:
    """Whether the storage has made this layer as a snapshot."""
    name = of_path(layer.path)
    return name is not None and name.role == "snapshot"


class Drivable(Struct, frozen=True):
    """Which disks have a driver, and of each other one why not."""

    able: Mapping[str, Ability] = {}
    unable: Mapping[str, Ability] = {}


async def probe(actives: Mapping[str, Layer]) -> Drivable:
    """Ask the driver of each disk's active layer."""
    found = {disk: await driver_of(layer).probe(volume_of(layer)) for disk, layer in actives.items()}
    return Drivable(
        {disk: ability for disk, ability in found.items() if ability.able},
        {disk: ability for disk, ability in found.items() if not ability.able},
    )


def copied(source: Layer, layer: LayerId, name: VolumeName) -> VolumeCopy:
    """The snapshot or clone of a layer that an operation will make; pure."""
    where = driver_of(source).where(volume_of(source), name)
    copy = Layer(id=layer, path=where, format=source.format, backing=source.backing, virtual_size=source.virtual_size)
    return VolumeCopy(disk=name.disk, layer=copy, source=source)


async def make(
    context: Context, machine: Machine, operation: OperationId, copies: Sequence[VolumeCopy], role: Role
) -> dict[LayerId, Volume]:
    """Make all of them; what was made stays where one fails, for :func:`undo`."""
    made: dict[LayerId, Volume] = {}
    for copy in copies:
        driver, source = driver_of(copy.source), volume_of(copy.source)
        name = VolumeName.of(machine.uuid, operation, copy.disk, role)
        found = await (driver.snapshot(source, name) if role == "snapshot" else driver.clone(source, name))
        if found.path != copy.layer.path:
            raise StoreMismatch(f"{driver.name} has made {found.path}, not {copy.layer.path}", effect="unknown")
        made[copy.layer.id] = found
    await admission.new_files(context, machine, [copy.layer.path for copy in copies])
    return made


async def whole(machine: Machine, operation: OperationId, copies: Sequence[VolumeCopy]) -> dict[LayerId, Volume] | None:
    """All of them, if each is complete."""
    found: dict[LayerId, Volume] = {}
    for copy in copies:
        for volume in await _made(machine, operation, copy):
            if volume.state == "ok":
                found[copy.layer.id] = volume
    return found if len(found) == len(copies) else None


async def undo(machine: Machine, operation: OperationId, copies: Iterable[VolumeCopy]) -> None:
    """Remove what an operation has made of them, parts as well; nobody has used it."""
    for copy in copies:
        for volume in await _made(machine, operation, copy):
            await driver_of(copy.source).remove(volume)


async def _made(machine: Machine, operation: OperationId, copy: VolumeCopy) -> list[Volume]:
    near = volume_of(copy.source)
    found = await driver_of(copy.source).list(near, VolumeName.of(machine.uuid, operation, copy.disk).machine)
    return [
        volume
        for volume in found
        if volume.name and (volume.name.operation, volume.name.disk) == (operation, copy.disk)
    ]
