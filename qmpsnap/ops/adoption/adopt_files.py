"""The images of a QEMU that somebody else launched: where they are, whether all agree on them, how they were opened."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmpsnap.block.foreign import ForeignDisk, ForeignLayer
from qmpsnap.block.image import header
from qmpsnap.block.image.header import FoundLayer
from qmpsnap.errors import ImageRefused, StateError, StoreMismatch
from qmpsnap.host import block_devices
from qmpsnap.host.files import Inode, inode_of
from qmpsnap.machine import blockline
from qmpsnap.machine.adopted import Seen
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.spec import Opened, Storage
from qmpsnap.model.text import printable
from qmpsnap.qmp.commands import NodeInfo

_DELETED = " (deleted)"


def files(disk: str, backend: str, found: ForeignDisk, seen: Seen) -> list[FoundLayer]:
    """The files of a disk, base first, once our own reader agrees with QEMU about each: identity, size, backing."""
    files: list[FoundLayer] = []
    for layer in found.layers:
        path = _place(disk, layer, seen)
        try:
            read = header.read(path, format=layer.format, block_device=True)
            header.require_few_tags(path, read)
        except ImageRefused as error:
            if os.path.lexists(path):
                raise
            raise _not_there(disk, layer, path, seen) from error
        storage: Storage = "file"
        if read.identity:
            storage = "rbd" if RbdImage.parse(path) else "host_device"
        file = FoundLayer(path=path, format=layer.format, header=read, storage=storage)
        below = files[-1] if files else None
        if problem := _file_problem(layer, file, seen) or (layer.format == "qcow2" and _backing_problem(file, below)):
            raise StoreMismatch(
                f"disk {disk} ({backend}): {problem}",
                hint="correct the headers, or launch QEMU on matching files",
            )
        files.append(file)
    return files


def opened(backend: str, found: ForeignDisk, nodes: Sequence[NodeInfo], arguments: Sequence[str]) -> tuple[Opened, str]:
    """What new layers of a disk are opened with, and what of it could not be learned; pure."""
    active = found.layers[-1]
    by_name = {node.node_name: node for node in nodes}
    image, file = by_name[active.node], by_name[active.file]
    told = blockline.options_of(arguments, node=active.node, file=active.file, drive=backend, path=active.path)
    above: dict[str, Any] = dict(told.format) if told else {"discard": "ignore"}
    below: dict[str, Any] = dict(told.file) if told else {"discard": "unmap"}
    if image.detect_zeroes != "off":
        above["detect-zeroes"] = image.detect_zeroes
    if image.detect_zeroes == "unmap":
        above["discard"] = "unmap"  # QEMU has the one only with the other
    for options, node in ((above, image), (below, file)):
        options["cache"] = {"direct": node.cache.direct, "no-flush": node.cache.no_flush}
    untold = (
        "" if told else "QEMU's arguments do not name its image: new overlays ignore discards and use the default aio"
    )
    return Opened(format=above, file=below), untold


def _place(disk: str, layer: ForeignLayer, seen: Seen) -> str:
    """Where a layer's file is; of a relative path that leads nowhere any more, QEMU's open files tell."""
    if RbdImage.parse(layer.path):
        return layer.path
    # Joined as text: an absolute path must stay the very string that QEMU has.
    path = os.path.join(seen.folder, layer.path)  # noqa: PTH118
    if Path(path).is_symlink() and block_devices.number_of(path) is None:  # a volume has no other name that stays
        path = str(Path(path).resolve())
    if layer.path.startswith("/") or _inode(path) in seen.names:
        return path
    parts = [part for part in os.path.normpath(layer.path).split("/") if part != ".."]
    named = sorted(name for name in seen.names.values() if name.endswith("/" + "/".join(parts)))
    if len(named) > 1:
        raise StateError(
            f"disk {disk}: QEMU has the relative path {printable(layer.path)}, changed its working directory and"
            f" has several files of that name open ({printable(', '.join(named), 300)})",
            hint="launch it with absolute paths",
        )
    return named[0] if named else path


def _inode(path: str) -> Inode | None:
    try:
        return inode_of(Path(path).stat())
    except OSError:
        return None


def _not_there(disk: str, layer: ForeignLayer, path: str, seen: Seen) -> StateError:
    """Why a file that QEMU has open is not where it should be."""
    shown = printable(layer.path)
    if path + _DELETED in seen.names.values():
        if blockline.is_temporary(seen.arguments):
            return StateError(
                f"disk {disk}: QEMU was launched with -snapshot or snapshot=on, so the guest writes to a temporary file"
                " that is lost when QEMU ends",
                hint="launch it without that option, and revert to a snapshot instead",
            )
        return StateError(
            f"disk {disk}: {shown} was deleted while QEMU has it open",
            hint="copy it while QEMU runs (QMP drive-backup with sync=full), and launch QEMU on the copy",
        )
    if seen.apart:
        return StateError(
            f"disk {disk}: there is no {shown} here: that QEMU runs in another mount namespace (a chroot, a container)",
            hint="try again in that namespace: nsenter --target PID --mount --root",
        )
    if not layer.path.startswith("/"):
        return StateError(
            f"disk {disk}: QEMU has the relative path {shown} and changed its working directory (to"
            f" {printable(seen.folder)}, as with -daemonize); none of its open files has that name",
            hint="launch it with absolute paths",
        )
    return StateError(
        f"disk {disk}: {shown}, which QEMU has open, was moved or renamed",
        hint="move it back",
    )


def _file_problem(layer: ForeignLayer, found: FoundLayer, seen: Seen) -> str:
    shown, size = printable(found.path), found.header.virtual_size
    if found.storage != "rbd" and (found.header.device, found.header.inode) not in seen.files:
        return f"QEMU has another file open than {shown}"
    if size != layer.virtual_size:
        return f"{shown} has virtual size {size}, QEMU reports {layer.virtual_size}"
    return ""


def _backing_problem(found: FoundLayer, below: FoundLayer | None) -> str:
    """Where a header and QEMU's graph name different backings; they may do so by different strings."""
    named = found.header.backing
    said = f"the header of {printable(found.path)} names {printable(named or 'nothing')} as its backing file"
    if named is None or below is None:
        agree = named is None and below is None
        return "" if agree else f"{said}, QEMU reads {printable(below.path) if below else 'nothing'}"
    there = _inode(str(Path(found.path).parent / named))  # an absolute name stays as it is
    if there is None:
        return f"{said}, which does not exist"
    agree = there == (below.header.device, below.header.inode)
    return "" if agree else f"{said}, QEMU reads {printable(below.path)}"
