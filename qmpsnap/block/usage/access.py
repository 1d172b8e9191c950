"""Whether an image can be opened as QEMU will open it: asked before anything is recorded."""

import contextlib
import errno
import os
from typing import Final

from qmpsnap.block.image import header
from qmpsnap.block.image.header import printable
from qmpsnap.block.usage import image_locks, users
from qmpsnap.errors import HostCannot, ImageInUse, ImageRefused, QmpsnapError, StateError
from qmpsnap.host.files import opened
from qmpsnap.model.layers.chain import Layer

_WHY: Final = {
    errno.EROFS: ("its file system is mounted read-only", "mount it writable"),
    errno.EPERM: ("it is immutable or append-only", "remove the flag that lsattr shows: chattr -i or chattr -a"),
    errno.ETXTBSY: ("it is in use as swap or as a running program", "end that use"),
    errno.EAGAIN: ("another process holds a lease on it", "end that process"),
}


def require_writable(layer: Layer, *, size: int = 0, ours: bool = True, shared: bool = False) -> None:
    """Make sure that an image can be written to, and lengthened to ``size`` bytes.

    ``ours``: a process of ours will write to it; else a QEMU that may have more rights than we have. ``shared``: a QEMU
    that has it open already, so that its locks tell of that one.
    """
    if layer.storage == "rbd":  # QEMU can grow these
        header.read(layer.path)
        if not shared:
            _require_unheld(layer)
        return
    try:
        with opened(layer.path, os.O_RDWR | os.O_NONBLOCK) as descriptor:
            found = header.inspect(descriptor, path=layer.path, format=layer.format)
            is_device = os.fstat(descriptor).st_rdev != 0
    except OSError as error:
        if error.errno == errno.EACCES and not ours:
            return  # that QEMU says so itself
        raise _cannot(layer, error) from error
    if found.corrupt:
        raise StateError(
            f"{printable(layer.shown)} is marked corrupt, and QEMU refuses to write to it",
            hint=f"qemu-img check {printable(layer.shown)} shows the damage; copy the image before any repair",
        )
    if found.virtual_size < size and (is_device or (found.version < 3 and found.internal_snapshots)):  # noqa: PLR2004
        kind = "a device" if is_device else "qcow2 of version 2 with snapshots inside"
        raise HostCannot(
            f"{printable(layer.shown)} has {found.virtual_size} bytes and needs {size}, but QEMU cannot grow {kind}"
        )
    if not shared and _is_refused(layer, writing=True):
        raise _held(layer)


def require_readable(layer: Layer) -> None:
    """Make sure that a machine's QEMU can read an image that nobody may write to meanwhile."""
    if layer.storage == "rbd":
        header.read(layer.path)
        return
    try:
        with opened(layer.path):
            pass
    except OSError as error:
        raise _cannot(layer, error, what="read") from error
    if _is_refused(layer, writing=False):
        raise _held(layer)


def may_go(path: str) -> bool:
    """Whether the file's own attributes let its name be removed; its mode has no say in that."""
    try:
        with opened(path, os.O_WRONLY | os.O_NONBLOCK):
            pass
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def _is_refused(layer: Layer, *, writing: bool) -> bool:
    with contextlib.suppress(HostCannot):  # where no locks can be asked, QEMU is the one to say so
        return image_locks.is_refused(layer.path, writing=writing)
    return False


def _cannot(layer: Layer, error: OSError, *, what: str = "written to") -> QmpsnapError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return ImageRefused(f"there is no image {printable(layer.shown)} ({error.strerror})")
    why, hint = _WHY.get(error.errno or 0, (str(error.strerror), f"look at the rights of {printable(layer.shown)}"))
    return HostCannot(f"{printable(layer.shown)} cannot be {what}: {why}", hint=hint)


def _require_unheld(layer: Layer) -> None:
    """There are no locks on images in a cluster: whoever has one open is in the way."""
    if users.look([layer.path], readers=True).users:
        raise _held(layer)


def _held(layer: Layer) -> StateError:
    for found in users.look([layer.path], readers=True).users.values():
        return ImageInUse(f"{printable(layer.shown)} {found.does} {found.who}", hint="end that process, then try again")
    return StateError(
        f"another process has {printable(layer.shown)} open",
        hint=f"end that process: fuser -v {printable(layer.shown)} names it",
    )
