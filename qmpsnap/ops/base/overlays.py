"""New layers: made, told by their files, and removed again while nobody has used them."""

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import anyio
from msgspec.structs import replace

from qmpsnap.block.image import header
from qmpsnap.block.image import staged as place
from qmpsnap.block.image.create import remove
from qmpsnap.block.image.empty import is_beginning
from qmpsnap.block.image.header import printable
from qmpsnap.block.image.qcow2 import MAGIC, Header
from qmpsnap.errors import HostCannot, ImageRefused, StateError, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.files import Identified, Inode, extents, inode_of, opened
from qmpsnap.host.threads import first_of, to_end
from qmpsnap.model.layers.chain import MAX_LAYERS, Chain, Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId, layer_id
from qmpsnap.model.operations.operation import Change, Overlay
from qmpsnap.ops.base import admission, luks
from qmpsnap.ops.base.context import Context

_PIECE = 1 << 20

EMPTY_LIMIT = 8 << 20
"""Bytes an image may occupy and still pass for one that no guest has written to: tables of an empty 64 TiB image."""


def overlay_on(chain: Chain, serial: OperationId, folder: str) -> Layer:
    """A new empty layer on top of a chain."""
    require_room(chain.disk, len(chain.layers))
    identity = layer_id(chain.disk, serial)
    return Layer(
        id=identity,
        path=f"{folder}/{identity}.qcow2",
        format="qcow2",
        backing=chain.active.id,
        virtual_size=chain.active.virtual_size,
    )


def require_room(disk: str, layers: int) -> None:
    """Make sure that one more layer fits on a chain, so that every chain that is made can be read again."""
    if layers >= MAX_LAYERS:
        raise StateError(
            f"disk {disk} has {layers} layers, the maximum of a chain ({MAX_LAYERS})",
            hint="shorten the chain: delete snapshots with "
            + call("delete_snapshots", "VM", "NAME")
            + ", or merge all layers with "
            + call("stream", "VM", disk),
        )


async def make_overlays(context: Context, machine: Machine, overlays: Sequence[Overlay]) -> dict[LayerId, Header]:
    """Create every overlay, side by side, encrypted as its disk is; each removes its own file when it fails."""
    headers: dict[LayerId, Header] = {}

    async def make(overlay: Overlay) -> None:
        path, size = overlay.part or overlay.layer.path, overlay.layer.virtual_size
        async with luks.for_images(context, machine.name, machine.require_layers_of(overlay.disk)) as key:
            headers[overlay.layer.id] = await context.image.create_overlay(
                path, backing=overlay.backing, virtual_size=size, key=key
            )
        await admission.new_files(context, machine, [path])
        if overlay.part:
            await place.claim(overlay.part, overlay.layer.path)

    try:
        async with anyio.create_task_group() as group:
            for overlay in overlays:
                group.start_soon(make, overlay)
    except BaseExceptionGroup as errors:  # Python 3.11.2 groups again what an except* raises
        raise first_of(errors) from errors
    return headers


def identified(change: Change, headers: Mapping[LayerId, Identified]) -> Change:
    """The change with the identities of the files that were made."""
    layers = tuple(_at(layer, headers[layer.id]) if layer.id in headers else layer for layer in change.layers)
    return replace(change, layers=layers)


def _at(layer: Layer, found: Identified) -> Layer:
    identity = found.identity
    if identity:  # holds where device and inode do not
        return replace(layer, device=0, inode=0, birth=0, identity=identity)
    return replace(layer, device=found.device, inode=found.inode, birth=found.birth)


def headers_of(layers: Iterable[Layer]) -> dict[LayerId, Header]:
    """The headers of new layers whose files somebody has made before, for :func:`identified`."""
    return {
        layer.id: header.read(layer.path, format=layer.format, block_device=layer.storage != "file") for layer in layers
    }


def require_planned(overlays: Iterable[Overlay]) -> None:
    """Make sure that what lies at the places of new layers nobody has used yet is still what was made there."""
    for overlay in overlays:
        whole = _identity_of_new(overlay.layer, overlay.backing.path) is not None
        if not whole or header.read(overlay.layer.path, format="qcow2").backing != overlay.backing.path:
            raise StoreMismatch(f"{overlay.layer.path} is not the layer that was created there")


def require_free(paths: Iterable[str]) -> None:
    """Make sure that nothing is where new files are planned; called before the journal has the plan.

    Undoing an operation removes what it may have made: what was there before must never become part of one. With a
    store put back from an older copy the next serial number is in use already, by a layer of the guest's.
    """
    for path in paths:
        try:
            Path(path).lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise HostCannot(f"{printable(path)} cannot be used: {error.strerror}") from error
        raise StateError(
            f"{printable(path)} exists already",
            hint="the store may be older than the disks: put the newer store back, or move an unneeded file away",
        )


async def remove_new(made: Iterable[Layer | Overlay]) -> None:
    """Remove images that an operation made and nobody has used; whatever looks used is left and said.

    Of an :class:`Overlay` the name of its backing is compared, too; a layer alone does not tell it.
    """
    for one in made:
        layer, below = (one, None) if isinstance(one, Layer) else (one.layer, one.backing.path)
        if (identity := await to_end(_identity_of_new, layer, below)) is not None:
            await remove(layer.path, device=identity[0], inode=identity[1])


def _identity_of_new(layer: Layer, below: str | None) -> Inode | None:
    try:
        status = Path(layer.path).lstat()
    except FileNotFoundError:
        return None
    new = stat.S_ISREG(status.st_mode) and status.st_blocks * 512 <= EMPTY_LIMIT
    try:
        new = new and _is_new(layer, below, file_size=status.st_size)
    except OSError as error:
        raise HostCannot(f"{layer.path} cannot be read: {error.strerror}; it was not touched") from error
    if not new:
        raise StoreMismatch(f"{layer.path} is not a new, empty image; it was not touched")
    return inode_of(status)


def _is_new(layer: Layer, below: str | None, *, file_size: int) -> bool:
    """Whether a small file is the planned image, empty, or the beginning of it, which holds nothing either."""
    if file_size == 0:
        return True
    if layer.format == "raw":
        return file_size == layer.virtual_size and _all_zero(layer.path, file_size)
    with Path(layer.path).open("rb") as file:
        head = file.read(32)
        if not head.strip(b"\0") and file_size <= EMPTY_LIMIT:
            return is_beginning(head + file.read(), layer.virtual_size)
    if head.startswith(MAGIC) and not head[24:].strip(b"\0"):
        return True  # a disk of no bytes: qemu-img died before it gave the image its size
    try:
        found = header.read(layer.path, format="qcow2")
        empty = header.is_empty(layer)
    except ImageRefused:
        return False
    # Without a backing it is all zeros, as an overlay is until qemu-img has written its backing, as the last thing.
    ours = found.backing is None or (layer.backing is not None and below in (None, found.backing))
    return ours and empty and found.virtual_size == layer.virtual_size


def _all_zero(path: str, size: int) -> bool:
    """Whether a file of few allocated bytes holds none but zeros; holes are not read."""
    with opened(path) as file:
        places = (at for start, end in extents(file, size) for at in range(start, end, _PIECE))
        return not any(os.pread(file, _PIECE, at).strip(b"\0") for at in places)
