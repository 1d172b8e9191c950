"""Whether a QEMU has opened the recorded files: it is given names, and a name can lead elsewhere.

Between our look at a file and QEMU's opening of its name, somebody may have put another file, or a link, in its place.
The kernel says which files a process has open, whatever the name leads to by now.
"""

import os
from collections.abc import Iterable

from qmpsnap.errors import HostCannot, ImageRefused, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.files import FileId, Inode, is_recorded, opened, same_file
from qmpsnap.machine.adopted import open_files
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.record import Process


def require_recorded(layers: Iterable[Layer], *, machine: str) -> None:
    """Make sure, before any program is given their names, that these lead to the recorded files."""
    for layer in layers:
        try:
            same = _is_recorded(layer)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _mismatch(layer, "does not exist", machine) from error
        except OSError as error:
            raise _mismatch(layer, f"cannot be read: {error.strerror}", machine) from error
        if not same:
            raise _mismatch(layer, "is not the recorded file", machine)


def require_opened(process: Process | None, layers: Iterable[Layer], *, machine: str) -> None:
    """Make sure that a QEMU has these very files open; nothing was asked of it yet.

    Of another user's QEMU, whose files cannot be seen, only the names are looked at again.
    """
    layers = tuple(layers)
    missing = {_key(layer): layer for layer in layers if layer.storage != "rbd"}
    if process is not None:
        try:
            for file in open_files(process.pid) if missing else ():
                missing.pop(file, None)
                if not missing:
                    break
        except HostCannot:
            pass
        else:
            require_recorded([layer for layer in layers if layer.storage != "file"], machine=machine)
            if missing:
                text = "was replaced by another file before QEMU opened it"
                raise _mismatch(next(iter(missing.values())), text, machine)
            return
    require_recorded(layers, machine=machine)


def _is_recorded(layer: Layer) -> bool:
    """Whether its name leads to what was recorded; ``FileNotFoundError`` where it leads nowhere."""
    if layer.storage == "file":
        with opened(layer.path, os.O_PATH) as descriptor:
            return is_recorded(layer, descriptor)
    found = _device_or_image(layer)
    if found is None:
        raise FileNotFoundError
    return same_file(layer, found)


def _device_or_image(layer: Layer) -> FileId | None:
    image = RbdImage.parse(layer.path)
    if image is None:
        return FileId.at(layer.path)
    from qmpsnap.host import ceph  # seldom needed

    try:
        return FileId(0, 0, identity=ceph.info(image).identity)
    except ImageRefused:
        return None


def _key(layer: Layer) -> Inode:
    """What the kernel knows a file by that is open."""
    if layer.storage == "file":
        return layer.device, layer.inode
    from qmpsnap.host import block_devices  # seldom needed

    return block_devices.number_of(layer.path) or 0, 0


def _mismatch(layer: Layer, what: str, machine: str) -> StoreMismatch:
    path = "".join(c if c.isprintable() else "?" for c in layer.shown)
    return StoreMismatch(
        f"layer {layer.id} of machine {machine}: {path} {what}",
        hint="put the recorded file back; if this is a copy of it, accept it with " + call("relocate"),
        machine=machine,
    )
