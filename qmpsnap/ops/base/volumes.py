"""Which driver snapshots a layer, and its verbs for the layers of a plan."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from msgspec import Struct

from qmpsnap.block.image import create
from qmpsnap.block.image.staged import require_folder
from qmpsnap.errors import HostCannot, ImageRefused, NotFoundError, StateError, StoreMismatch
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.copies import VolumeCopy, VolumeMerge
from qmpsnap.ops.base import admission
from qmpsnap.ops.base.context import Context
from qmpsnap.volumes.driver import Ability, Driver, Volume
from qmpsnap.volumes.names import Role, VolumeName, of_path


def driver_of(layer: Layer, *, thick: str = "") -> Driver:
    """The driver for the storage that a layer lies on; ``thick``: the size of thick LVM snapshots, if not the usual."""
    if layer.storage == "rbd":
        from qmpsnap.volumes.rbd import Rbd  # seldom needed

        return Rbd()
    if layer.storage == "host_device":  # its probe refuses what is no logical volume
        from qmpsnap.volumes.lvm import THICK, Lvm  # seldom needed

        return Lvm(thick=thick or THICK)
    from qmpsnap.volumes.reflink import Reflink  # only verbs of volumes need a driver

    return Reflink()


def volume_of(layer: Layer) -> Volume:
    """A layer as its driver knows it."""
    return Volume(
        path=layer.path,
        format=layer.format,
        device=layer.device,
        inode=layer.inode,
        birth=layer.birth,
        identity=layer.identity,
        bytes=layer.virtual_size,
        name=of_path(layer.path),
    )


def is_near(volume: Volume, layer: Layer) -> bool:
    """Whether the driver of a layer is that of a volume."""
    return (RbdImage.parse(volume.path) is None) == (RbdImage.parse(layer.path) is None)


def is_snapshot(layer: Layer) -> bool:
    """Whether the storage has made this layer as a snapshot."""
    name = of_path(layer.path)
    return name is not None and name.role == "snapshot"


def is_clone_of(layer: Layer, machine: Machine) -> bool:
    """Whether the storage has made this layer as a clone for that machine."""
    name = of_path(layer.path)
    return name is not None and (name.role, name.machine) == ("clone", machine.uuid.replace("-", ""))


class Drivable(Struct, frozen=True):
    """Which disks have a driver, and of each other one why not."""

    able: Mapping[str, Ability] = {}
    unable: Mapping[str, Ability] = {}


async def probe(actives: Mapping[str, Layer], *, thick: str = "") -> Drivable:
    """Ask the driver of each disk's active layer; ``thick`` as for :func:`driver_of`."""
    found = {disk: await driver_of(layer, thick=thick).probe(volume_of(layer)) for disk, layer in actives.items()}
    return Drivable(
        {disk: ability for disk, ability in found.items() if ability.able},
        {disk: ability for disk, ability in found.items() if not ability.able},
    )


def copied(source: Layer, layer: LayerId, name: VolumeName, *, thick: str = "", reserve: int = 0) -> VolumeCopy:
    """The snapshot or clone of a layer that an operation will make; pure. The rest as :class:`VolumeCopy` has it."""
    where = driver_of(source).where(volume_of(source), name)
    copy = Layer(
        id=layer,
        path=where,
        format=source.format,
        backing=source.backing,
        virtual_size=source.virtual_size,
        storage=source.storage,
    )
    return VolumeCopy(disk=name.disk, layer=copy, source=source, thick=thick, reserve=reserve)


async def taken(machine: Machine, sources: Iterable[Layer]) -> frozenset[str]:
    """Paths of the machine's volumes that there are where copies of these layers would lie; files not among them."""
    return frozenset([volume.path for source in sources for volume in await _listed(machine, source)])


async def there(machine: Machine, layers: Iterable[Layer]) -> tuple[Volume, ...]:
    """The machine's volumes where these layers lie, files not among them; none of storage that cannot be asked."""
    found: dict[str, Volume] = {}
    for layer in layers:
        with contextlib.suppress(HostCannot, NotFoundError, ImageRefused):
            found |= {volume.path: volume for volume in await _listed(machine, layer)}
    return tuple(found.values())


async def _listed(machine: Machine, near: Layer) -> tuple[Volume, ...]:
    if near.storage != "rbd" and not is_logical(near):
        return ()
    return await driver_of(near).list(volume_of(near), machine.uuid.replace("-", ""))


def require_free(copies: Iterable[VolumeCopy], there: Collection[str]) -> None:
    """Make sure that none of the copies is ``there``: undoing an operation removes what has its names; pure."""
    for copy in copies:
        if copy.layer.path in there:
            raise StateError(
                f"{copy.layer.shown} exists already",
                hint="the store may be older than the disks: put the newer store back, or remove that volume",
            )


def latest_first(layers: Iterable[Layer]) -> list[Layer]:
    """Layers in an order in which they can be removed: what depends on a volume was made by a later operation."""

    def key(layer: Layer) -> int:
        name = of_path(layer.path)
        return -name.operation if name else 0

    return sorted(layers, key=key)


async def activate(layers: Iterable[Layer]) -> None:
    """Give snapshots on logical volumes their devices back: no boot activates the thin ones."""
    if not (paths := logical_snapshots(layers)):
        return
    from qmpsnap.volumes.lvm import Lvm  # seldom needed

    if lacking := await to_read(lambda: [path for path in paths if not os.path.exists(path)]):  # noqa: PTH110
        await Lvm().activate(lacking)


async def moves(copies: Iterable[VolumeCopy]) -> int:
    """Bytes that making clones copies: of thick LVM snapshots alone."""
    logical = [copy.source for copy in copies if is_logical(copy.source)]
    if not logical:
        return 0
    from qmpsnap.volumes import lvm  # seldom needed

    return sum([await lvm.copied(volume_of(source)) for source in logical])


def is_logical(layer: Layer) -> bool:
    """Whether a recorded layer is a logical volume: other block devices have other identities."""
    return layer.storage == "host_device" and layer.identity.startswith("lvm:")


def logical_snapshots(layers: Iterable[Layer]) -> list[str]:
    """Paths of the snapshots among layers that are logical volumes: none can be removed while a program has it open."""
    return [layer.path for layer in layers if is_logical(layer) and is_snapshot(layer)]


async def require_growable(layer: Layer, size: int) -> None:
    """Make sure that a logical volume can be enlarged; QEMU grows all others itself."""
    if is_logical(layer):
        from qmpsnap.volumes import lvm  # seldom needed

        if why := await lvm.growable(volume_of(layer), size):
            raise HostCannot(why)


async def grow(layer: Layer, size: int) -> None:
    """Enlarge a logical volume, which QEMU cannot; fine if that is done."""
    if is_logical(layer):
        from qmpsnap.volumes import lvm  # seldom needed

        await lvm.grow(volume_of(layer), size)


async def require_independent(removed: Collection[Layer], *, flattened: Collection[Layer] = ()) -> None:
    """Refuse to remove volumes that others depend on. What goes with them, or is flattened first, does not count."""
    if images := _images(removed):
        await to_read(_require_unread, images, _images(flattened))
    paths = {layer.path for layer in removed}
    for layer in removed:
        if is_logical(layer):
            from qmpsnap.volumes import lvm  # seldom needed

            if others := [other for other in await lvm.dependents(volume_of(layer)) if other not in paths]:
                raise StateError(
                    f"{layer.shown} cannot be removed: it has snapshots: {', '.join(others)}",
                    hint="remove these first",
                )


Percent = Callable[[int], None]
"""Told what share of a work is done."""


async def tie(layer: Layer) -> tuple[str, int] | None:
    """The snapshot that an image of a cluster is a clone of, and bytes of it that a flatten copies, at most."""
    from qmpsnap.volumes import rbd  # seldom needed

    found = await to_read(rbd.tie, volume_of(layer))
    return (found.parent, found.moves) if found else None


async def is_tied(layer: Layer) -> bool:
    """Whether such an image is a clone still; one that is gone is none."""
    from qmpsnap.volumes import rbd  # seldom needed

    return await to_read(rbd.is_tied, volume_of(layer))


async def flatten(layer: Layer, *, told: Percent) -> None:
    """Have the cluster copy what a clone reads of its parent; fine if it has none."""
    from qmpsnap.volumes import rbd  # seldom needed

    await rbd.flatten(volume_of(layer), told=told)


def _images(layers: Iterable[Layer]) -> list[RbdImage]:
    return [image for layer in layers if (image := RbdImage.parse(layer.path))]


async def clones_of(removed: Collection[Layer], known: Iterable[Layer]) -> list[Layer]:
    """The layers among those known that are clones of snapshots that are to be removed, and stay themselves."""
    if not (images := [image for image in _images(removed) if image.snapshot]):
        return []
    from qmpsnap.volumes import rbd  # seldom needed

    found: set[str] = set()
    for image in images:
        with contextlib.suppress(ImageRefused):  # it is gone already
            found |= {*await to_read(rbd.dependents, image)}
    paths = {layer.path for layer in removed}
    return [layer for layer in known if layer.shown in found and layer.path not in paths]


def _require_unread(images: Collection[RbdImage], free: Collection[RbdImage]) -> None:
    from qmpsnap.volumes import rbd  # seldom needed

    gone = {f"rbd:{image}" for image in (*images, *free)}
    for image in images:
        with contextlib.suppress(ImageRefused):  # it is gone already
            if others := [other for other in rbd.dependents(image) if other not in gone]:
                raise rbd.dependent(image, others)


async def remove(layer: Layer, *, size: int | None = None, durably: bool = True) -> bool:
    """Remove an image of ours, by its driver where it is no file; says whether a file was there.

    Raises:
        StoreMismatch: another file or volume has its name; it was not touched.
        HostCannot: its folder is not there, as of a file system that is not mounted; not asked where not ``durably``.
        StateError: other volumes depend on it.
    """
    if layer.storage != "file":
        await driver_of(layer).remove(volume_of(layer))
        return True
    if durably:
        await to_end(require_folder, layer.path)
    return await create.remove(
        layer.path, device=layer.device, inode=layer.inode, birth=layer.birth, size=size, durably=durably
    )


async def make(
    context: Context, machine: Machine, operation: OperationId, copies: Sequence[VolumeCopy], role: Role
) -> dict[LayerId, Volume]:
    """Make all of them; what was made stays where one fails, for :func:`undo`."""
    made: dict[LayerId, Volume] = {}
    for copy in copies:
        driver, source = driver_of(copy.source, thick=copy.thick), volume_of(copy.source)
        name = VolumeName.of(machine.uuid, operation, copy.disk, role)
        found = await (driver.snapshot(source, name) if role == "snapshot" else driver.clone(source, name))
        if found.path != copy.layer.path:
            raise StoreMismatch(f"{driver.name} has made {found.path}, not {copy.layer.path}", effect="unknown")
        made[copy.layer.id] = found
    files = [copy.layer.path for copy in copies if copy.layer.storage == "file"]
    await admission.new_files(context, machine, files)
    return made


async def mergeable(active: Layer, snapshot: Layer) -> VolumeMerge | None:
    """The merge that gives an active layer its snapshot's content at less cost than a clone; None where none does."""
    if not (is_logical(active) and is_logical(snapshot) and is_snapshot(snapshot)):
        return None
    from qmpsnap.volumes import lvm_merge  # seldom needed

    found = await lvm_merge.mergeable(volume_of(snapshot), volume_of(active))
    name = of_path(snapshot.path)
    if found is None or name is None:
        return None
    return VolumeMerge(disk=name.disk, layer=active, snapshot=snapshot, reserve=found.reserve, moves=found.moves)


async def merge(merges: Iterable[VolumeMerge]) -> dict[LayerId, Volume]:
    """Do them, or what is left of them; returns the snapshots as they were taken anew."""
    from qmpsnap.volumes import lvm_merge  # seldom needed

    return {
        one.snapshot.id: await lvm_merge.merge(volume_of(one.snapshot), volume_of(one.layer), reserve=one.reserve)
        for one in merges
    }


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
