"""Snapshots by the file system: a file that shares all blocks with the image, as xfs and btrfs make it (``FICLONE``).

The snapshot is a file beside the image. It is made under a temporary name and gets its own one, by a link that replaces
nothing, once it is written out: so a file of that name is complete. The time that the kernel takes grows with the
image's extents, up to seconds, and before Linux 6.7 nobody can read or write the source meanwhile.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from qmpsnap.errors import HostCannot, NotFoundError, StateError, StoreMismatch
from qmpsnap.host import files
from qmpsnap.host.files import FileId, is_recorded, opened, same_file, sync_folder, unlink_own
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.machines.spec import Format
from qmpsnap.model.text import printable
from qmpsnap.volumes.driver import Ability, DriverName, Size, Volume
from qmpsnap.volumes.names import VolumeName

FICLONE: Final = 0x40049409
PART: Final = ".part"

_ENDINGS: Final[dict[str, Format]] = {".qcow2": "qcow2", ".raw": "raw"}
_BLOCK: Final = 64 << 10
"""Bytes of the file that is cloned to try it: a whole number of blocks of every file system."""
_CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS})
_REMEDY: Final = "keep the image on xfs (reflink=1) or btrfs"

_able: dict[int, str] = {}
"""By the device of a file system: why it cannot clone a file, or an empty text."""


class Reflink(Struct, frozen=True):
    """The driver for image files."""

    @property
    def name(self) -> DriverName:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        return "reflink"

    def where(self, near: Volume, name: VolumeName) -> str:
        """Beside the image."""
        return str(Path(near.path).parent / f"{name.text}.{near.format}")

    async def probe(self, origin: Volume | None) -> Ability:
        """Tried on two files without a name in the image's folder."""
        if origin is None:
            return Ability() if await to_read(_mounted) else Ability(why="no xfs or btrfs is mounted", remedy=_REMEDY)
        why = await to_read(_why_not, origin)
        return Ability(why=why, remedy=_REMEDY if why else "")

    async def snapshot(self, origin: Volume, name: VolumeName) -> Volume:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        return await to_end(_clone, origin, self.where(origin, name), name)

    async def clone(self, snapshot: Volume, name: VolumeName) -> Volume:
        """The same: a file system does not tell a snapshot from a clone."""
        return await to_end(_clone, snapshot, self.where(snapshot, name), name)

    async def remove(self, volume: Volume) -> None:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        await to_end(_remove, volume)

    async def list(self, near: Volume, machine: str) -> tuple[Volume, ...]:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        return await to_read(_list, Path(near.path).parent, machine)

    async def size(self, volume: Volume) -> Size:
        """An upper bound: what it shares with other files stays when it goes."""
        try:
            return Size(own=(await to_read(os.lstat, volume.path)).st_blocks * 512)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {printable(volume.path)}") from error


def share(source: int, target: int) -> None:
    """Let an empty file have all blocks of another."""
    fcntl.ioctl(target, FICLONE, source)


def _mounted() -> bool:
    lines = files.read("/proc/self/mounts").splitlines()
    return any(line.split()[2] in ("xfs", "btrfs", "ocfs2", "bcachefs", "zfs") for line in lines)


def _why_not(origin: Volume) -> str:
    folder = Path(origin.path).parent
    try:
        device = folder.stat().st_dev
        if os.path.lexists(origin.path) and Path(origin.path).stat().st_dev != device:
            return f"{printable(origin.path)} is a link to another file system"
        if device not in _able:
            _able[device] = _tried(folder)
    except OSError as error:
        return f"{printable(str(folder))} cannot be written to: {error.strerror}"
    return _able[device] and f"the file system of {printable(str(folder))} {_able[device]}"


def _tried(folder: Path) -> str:
    with _unnamed(folder) as source, _unnamed(folder) as target:
        os.write(source, b"q" * _BLOCK)
        try:
            share(source, target)
        except OSError as error:
            if error.errno in _CANNOT:
                return f"cannot clone files ({error.strerror})"
            raise
    return ""


@contextlib.contextmanager
def _unnamed(folder: Path) -> Iterator[int]:
    """A file that goes with its descriptor."""
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _clone(origin: Volume, path: str, name: VolumeName) -> Volume:
    part = path + PART
    try:
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(_origin(origin))
            if os.path.lexists(path):
                raise StateError(f"{printable(path)} exists already", hint="move that file away")
            target = files.create_exclusive(part, os.O_RDWR)
            stack.callback(os.close, target)
            try:
                share(source, target)
                os.fsync(target)
                os.link(part, path, follow_symlinks=False)
                sync_folder(Path(path).parent)
            except BaseException:
                unlink_own(path, target)
                raise
            finally:
                unlink_own(part, target)
            sync_folder(Path(path).parent)
            found = FileId.of(target)
    except FileExistsError as error:
        raise StateError(f"{printable(path)} exists already", hint="move that file away") from error
    except OSError as error:
        raise HostCannot(f"{printable(origin.path)} cannot be cloned to {printable(path)}: {error.strerror}") from error
    return _volume(path, found, name)


@contextlib.contextmanager
def _origin(origin: Volume) -> Iterator[int]:
    """The image, for reading; a link is followed, as QEMU does, and the file it leads to must be the recorded one."""
    try:
        descriptor = os.open(origin.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {printable(origin.path)}") from error
    try:
        if origin.inode and not is_recorded(origin, descriptor):
            raise StoreMismatch(f"{printable(origin.path)} is not the recorded file")
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(volume: Volume) -> None:
    try:
        with opened(volume.path, os.O_PATH) as descriptor:
            if volume.inode and not same_file(volume, FileId.of(descriptor)):
                raise StoreMismatch(f"{printable(volume.path)} is another file; it was not touched")
            unlink_own(volume.path, descriptor)
        sync_folder(Path(volume.path).parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostCannot(f"{printable(volume.path)} cannot be removed: {error.strerror}") from error


def _list(folder: Path, machine: str) -> tuple[Volume, ...]:
    found = []
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise HostCannot(f"{printable(str(folder))} cannot be read: {error.strerror}") from error
    for text in names:
        whole = text.removesuffix(PART)
        stem, dot, ending = whole.rpartition(".")
        name = VolumeName.parse(stem)
        if name and name.machine == machine.replace("-", "") and dot + ending in _ENDINGS:
            path = str(folder / text)
            if (identity := FileId.at(path)) is not None:
                found.append(_volume(path, identity, name, part=whole != text))
    return tuple(found)


def _volume(path: str, found: FileId, name: VolumeName, *, part: bool = False) -> Volume:
    return Volume(
        path=path,
        format=_ENDINGS[Path(path.removesuffix(PART)).suffix],
        device=found.device,
        inode=found.inode,
        birth=found.birth,
        bytes=found.size or 0,
        name=name,
        state="part" if part else "ok",
    )
