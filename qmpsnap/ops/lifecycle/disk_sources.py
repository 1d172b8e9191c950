"""What lies under a new machine's disks already: images that are read, and that nobody else may write to."""

import functools
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from qmpsnap.block.image import encrypted, header
from qmpsnap.block.image.header import FoundLayer
from qmpsnap.errors import ImageRefused, StateError
from qmpsnap.hint import call
from qmpsnap.host.files import Identified, Inode
from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.rbd import shown
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, Storage
from qmpsnap.model.planning import sharing
from qmpsnap.ops.base import luks
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.overlays import require_room
from qmpsnap.ops.outside import other_programs

Key = Inode | str
"""What tells a file from others: device and inode, or the identity of what is no file."""

_SECTOR, _BLOCK = 512, 4096
"""Bytes of the smallest and of the largest blocks that disks have."""


class DiskSource(Struct, frozen=True):
    """What lies under a disk already: the images of ``image`` or ``base``, base first, and the store's layer for each.

    A layer is None where the image is new to the store.
    """

    found: tuple[FoundLayer, ...] = ()
    known: tuple[Layer | None, ...] = ()


async def read(context: Context, spec: MachineSpec, allowed: Sequence[Path]) -> dict[str, DiskSource]:
    """Read what lies under each disk, with our own reader only, and make sure that nobody else writes to it."""
    writers, readers = await users(context)
    sources: dict[str, DiskSource] = {}
    for disk in spec.disks:
        path = disk.existing or disk.base
        if path is None:
            sources[disk.name] = DiskSource()
            continue
        read = functools.partial(
            header.read_chain,
            path,
            disk.format,
            allowed=allowed,
            storage=disk.storage,
            known=functools.partial(_storage, context),
        )
        found = await to_read(read)
        if disk.base:
            require_room(disk.name, len(found))
        _require_whole(disk, found[-1])
        _require_size(disk, found[-1])
        require_ownable(disk, found)
        await _require_encrypted(context, spec, disk, found)
        known = [await context.astore.layer_at(layer.path) for layer in found]
        sources[disk.name] = DiskSource(tuple(found), tuple(known))
    require_unshared(spec, sources, writers=writers, readers=readers)
    await require_unwritten(context, spec.name, sources)
    alone = [disk.existing for disk in spec.disks if disk.rbd and disk.existing and not disk.read_only]
    await other_programs.require_free(alone, machine=spec.name, readers=True)
    return sources


def _require_whole(disk: DiskSpec, top: FoundLayer) -> None:
    """Refuse what QEMU may not write to past the page cache: the end of a file that is no end of a block."""
    size, shown = top.header.file_size, header.printable(top.path, 2000)
    if disk.image and top.format == "raw" and disk.cache in ("none", "directsync") and size % _SECTOR:
        raise ImageRefused(
            f"disk {disk.name}: {header.printable(top.path)} has {size} bytes; 'cache: {disk.cache}' needs a raw"
            f" image with a multiple of {_SECTOR}",
            hint=f"qemu-img resize -f raw {shlex.quote(shown)} {-(-size // _BLOCK) * _BLOCK}, or another 'cache'",
        )


def _require_size(disk: DiskSpec, base: FoundLayer) -> None:
    if disk.size is not None and disk.size < base.header.virtual_size:
        raise ImageRefused(
            f"disk {disk.name}: its size of {disk.size} bytes is less than the {base.header.virtual_size} bytes of its"
            f" base {header.printable(base.path)}",
            hint="leave 'size' out, or make it larger: a guest's file systems do not shrink with their disk",
        )


def require_ownable(disk: DiskSpec, found: Sequence[FoundLayer]) -> None:
    """An image of ours names its backing by the very path that QEMU is given: a job and a moved home rewrite it."""
    backing = found[-1].header.backing
    if disk.own and backing is not None and backing != found[-2].path:
        below, top = found[-2], shlex.quote(found[-1].path)
        line = f"qemu-img rebase -u -F {below.format} -b {shlex.quote(os.path.normpath(below.path))} {top}"
        raise ImageRefused(
            f"disk {disk.name}: {header.printable(found[-1].path)} names its backing file as"
            f" {header.printable(backing)}, which 'own' cannot keep",
            hint=header.printable(f"name the whole path while it is not in use: {line}", 2000),
        )


async def require_unwritten(
    context: Context, name: str, sources: Mapping[str, DiskSource], *, ours: Collection[int] = ()
) -> None:
    """Refuse images that another program writes to; the store refuses those that an open operation changes."""

    def changing() -> set[object]:
        forest = context.store.forest()
        found: set[object] = set()
        for machine in context.store.machines():
            for operation in context.store.operations(machine.name, only_open=True):
                found |= sharing.uses(operation.plan, forest).changes
        return found

    changes = await blocking(changing)
    paths = [layer.path for source in sources.values() for layer in source.found]
    await other_programs.require_free([path for path in paths if path not in changes], machine=name, ours=ours)


async def _require_encrypted(context: Context, spec: MachineSpec, disk: DiskSpec, found: Sequence[FoundLayer]) -> None:
    """Make sure that all images of a disk are encrypted or none is, as its spec says, and that the key opens them."""
    for layer in found:
        if layer.header.encrypted is not (disk.encryption is not None):
            what = "is encrypted" if layer.header.encrypted else "is not encrypted"
            remedy = "add 'encryption' to the disk" if layer.header.encrypted else "remove 'encryption' from the disk"
            raise ImageRefused(
                f"disk {disk.name} of {spec.name}: {header.printable(layer.path)} {what}",
                hint=f"{remedy} in the spec, or convert the image first",
            )
    async with luks.for_images(context, spec.name, disk) as key:
        if key is not None:
            for layer in found:
                await encrypted.require_key(layer.path, key, qemu_img=context.image.binary)


def _storage(context: Context, path: str) -> Storage:
    """What a layer of some machine lies in; a file where there is no layer of that path."""
    layer = context.store.layer_at(path)
    return layer.storage if layer else "file"


def _key(file: Identified) -> Key:
    return file.identity or (file.device, file.inode)


async def users(context: Context) -> tuple[dict[Key, str], dict[Key, str]]:
    """Which machine writes to which file, and which machine reads which."""
    writers: dict[Key, str] = {}
    readers: dict[Key, str] = {}
    for machine in await context.astore.machines():
        for chain in await context.astore.chains(machine.name):
            writers[_key(chain.active)] = machine.name
            readers |= {_key(layer): machine.name for layer in chain.layers}
    return writers, readers


def require_unshared(
    spec: MachineSpec,
    sources: Mapping[str, DiskSource],
    *,
    writers: Mapping[Key, str],
    readers: Mapping[Key, str],
) -> None:
    """Make sure that no image has a writer and another reader; files are told by identity, not by name."""
    own: dict[Key, DiskSpec] = {}
    for disk in spec.disks:
        source = sources[disk.name]
        files = [_key(layer.header) for layer in source.found]
        for layer, file in zip(source.found, files, strict=True):
            if writer := writers.get(file):
                raise StateError(
                    f"disk {disk.name} of {spec.name} would read {shown(layer.path)}, which machine {writer} writes to",
                    hint="use the layer that this freezes: " + call("snapshot", writer),
                )
        if disk.existing and not disk.read_only:
            if source.known[-1] is not None or files[-1] in readers:
                raise _written(spec, disk, "other machines read")
            own[files[-1]] = disk
    for disk in spec.disks:
        for layer in sources[disk.name].found:
            if (other := own.get(_key(layer.header), disk)) is not disk:
                raise _written(spec, other, f"its disk {disk.name} reads")


def _written(spec: MachineSpec, disk: DiskSpec, who: str) -> StateError:
    return StateError(
        f"disk {disk.name} of {spec.name} would write to {shown(disk.existing or '')}, which {who}",
        hint="make a linked clone: use 'base:' for its image",
    )
