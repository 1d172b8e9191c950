"""Files: which one a name leads to, new ones for this user alone, and what is on the disk before anybody counts on it.

A file is its device, its inode and the time of its birth, where its file system keeps one; else its size helps. A
block device is what :mod:`qmpsnap.host.block_devices` finds. An
inode's number is given to another file as soon as the first one is gone, on ext4 at once; a time of birth is not, and
no copy, rename, chmod or write changes it. NFS, FUSE and old tmpfs have none: then it is 0, which is compared with
nothing. Python 3.11 has no ``statx``, so the C library is asked.

New files and folders are private whatever the umask: one that opens all to others, or shuts ourselves out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import sys
from contextlib import contextmanager

from qmpsnap.host.value import Value

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Final, Protocol, Self
else:
    Protocol = object

Name = str | os.PathLike[str]
"""A path, or with a folder's descriptor a name in that folder."""
Inode = tuple[int, int]
"""``st_dev`` and ``st_ino``: which file it is, as long as somebody holds it open."""

_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_STATX_BTIME: Final = 0x800
_SIZE: Final = 256
_SECOND: Final = 1_000_000_000


# --- opening ----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(name: Name, access: int = os.O_RDONLY | os.O_NONBLOCK, *, folder: int | None = None) -> Iterator[int]:
    """A file that is there, open by its own name: a link in its place is refused, and a pipe makes nobody wait.

    But for a link to a block device: that is the only name a volume has. Without ``O_NONBLOCK`` in ``access`` a lease
    that another process holds on the file is waited for.
    """
    access |= os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(name, access | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.ELOOP or folder is not None or not _leads_to_device(name):
            raise
        descriptor = _device(name, access, error)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _leads_to_device(name: Name) -> bool:
    from qmpsnap.host import block_devices  # seldom needed

    return block_devices.number_of(name) is not None


def _device(name: Name, access: int, error: OSError) -> int:
    """The block device that a link leads to, open; the error for anything else."""
    descriptor = os.open(name, access)
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise error


def read(path: Name) -> str:
    """The text of a small file of the kernel's, in ``/proc`` or ``/sys``."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123 - pathlib is slow to load
        return file.read()


@contextmanager
def opened_folder(path: Name) -> Iterator[int]:
    """A folder; links are followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each part of an open file of that size that is no hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


# --- new files and folders --------------------------------------------------------------------------------------------


def make_folder(path: Name) -> None:
    """Make a folder and those above it that are missing; one that is there stays as it is."""
    missing, part = [], os.fspath(path)
    while part and not os.path.exists(part):  # noqa: PTH110
        missing.append(part)
        part = os.path.dirname(part)  # noqa: PTH120
    for part in reversed(missing):
        try:
            os.mkdir(part, mode=0o700)  # noqa: PTH102
        except FileExistsError:
            continue  # another process was faster
        os.chmod(part, 0o700)  # noqa: PTH101
    if not os.path.isdir(path):  # noqa: PTH112
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))


def create_exclusive(name: Name, access: int = os.O_WRONLY, *, folder: int | None = None) -> int:
    """Make a file whose name must be free, a dangling link's included; returns its descriptor."""
    flags = access | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        os.fchmod(descriptor, 0o600)
    except BaseException:
        with contextlib.suppress(OSError):
            unlink_own(name, descriptor, folder=folder)
        os.close(descriptor)
        raise
    return descriptor


def write_new(path: Name, data: bytes) -> None:
    """Make a small file, whose name must be free, and write its content out; the name is for :func:`sync_folder`."""
    with os.fdopen(create_exclusive(path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Name, data: bytes, *, ending: str = "part") -> None:
    """Write a small file, whole or not at all, over whatever has its name.

    Until it is whole its name has that ``ending``: one of this process alone where several may write at once.
    """
    from pathlib import Path

    fresh = Path(f"{os.fspath(path)}.{ending}")
    fresh.unlink(missing_ok=True)  # of an earlier try
    try:
        write_new(fresh, data)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    sync_folder(fresh.parent)


def sync_folder(path: Name) -> None:
    """Write out which names a folder has; a file's own content is another matter."""
    with opened_folder(path) as folder:
        os.fsync(folder)


# --- which file it is -------------------------------------------------------------------------------------------------


class Identified(Protocol):
    """Whatever was recorded of a file, or found of it."""

    @property
    def device(self) -> int:
        """``st_dev``."""

    @property
    def inode(self) -> int:
        """``st_ino``."""

    @property
    def birth(self) -> int:
        """Nanoseconds since the epoch; 0 where nobody knows."""

    @property
    def identity(self) -> str:
        """Of what is no file; then it alone counts."""


class FileId(Value):
    """Device, inode, time of birth and size in bytes of a file that is there; of a block device its identity."""

    device: int
    inode: int
    birth: int = 0
    size: int | None = None
    identity: str = ""

    @classmethod
    def of(cls, descriptor: int) -> Self:
        """Identity of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, born(descriptor), status.st_size, identity_of(status))

    @classmethod
    def at(cls, name: Name, *, folder: int | None = None) -> Self | None:
        """Identity of the file of that name, links not followed, which are files of their own; None where is none."""
        try:
            # Held open, so that birth and inode are of one file, and the inode's number is nobody else's meanwhile.
            with opened(name, os.O_PATH, folder=folder) as descriptor:
                is_link = stat.S_ISLNK(os.fstat(descriptor).st_mode)
                if folder is not None or not is_link or not _leads_to_device(name):
                    return cls.of(descriptor)
            status = os.stat(name)  # noqa: PTH116 - pathlib is slow to load
            return cls(status.st_dev, status.st_ino, identity=identity_of(status))
        except (FileNotFoundError, NotADirectoryError):
            return None


def same_file(recorded: Identified, found: Identified, *, size: int | None = None) -> bool:
    """Whether that is the recorded file, as far as it can be told: a birth that only one side knows tells nothing.

    ``size``: bytes that the recorded file has, where nobody may have written to it: asked where no birth decides.
    """
    if recorded.identity:
        return recorded.identity == found.identity
    if (recorded.device, recorded.inode) != (found.device, found.inode):
        return False
    if recorded.birth and found.birth:
        return recorded.birth == found.birth
    return size is None or not isinstance(found, FileId) or found.size in (None, size)


def is_recorded(recorded: Identified, descriptor: int) -> bool:
    """:func:`same_file` of an open one: whose birth is asked for only where that decides."""
    status = os.fstat(descriptor)
    if recorded.identity:
        return recorded.identity == identity_of(status)
    if (recorded.device, recorded.inode) != inode_of(status):
        return False
    return not recorded.birth or _born(descriptor, status) in (0, recorded.birth)


def inode_of(status: os.stat_result) -> Inode:
    """Device and inode of a file that was looked at."""
    return status.st_dev, status.st_ino


def key_of(status: os.stat_result) -> Inode:
    """The same until the next boot, whatever node a block device was looked at by."""
    return (status.st_rdev, 0) if stat.S_ISBLK(status.st_mode) else inode_of(status)


def identity_of(status: os.stat_result) -> str:
    """What tells a block device that was looked at from all others; empty for a file."""
    if not stat.S_ISBLK(status.st_mode):
        return ""
    from qmpsnap.host import block_devices  # seldom needed

    return block_devices.identity(status.st_rdev)


def leads_to(name: Name, descriptor: int, *, folder: int | None = None) -> bool:
    """Whether a name is the open file's own; a link to it is another file."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), found)


def unlink_own(name: Name, descriptor: int, *, folder: int | None = None) -> bool:
    """Take its name away from the open file, unless it is another file's by now; say whether it was there."""
    if not leads_to(name, descriptor, folder=folder):
        return False
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    return True


def born(descriptor: int) -> int:
    """When an open file was born, in nanoseconds since the epoch; 0 where its file system does not say.

    Not of a device: its node is born anew with every boot.
    """
    return _born(descriptor, os.fstat(descriptor))


def _born(descriptor: int, status: os.stat_result) -> int:
    if stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        return 0
    statx = _statx()
    if statx is None:
        return 0
    call, room = statx
    found = room()
    if call(descriptor, b"", _AT_EMPTY_PATH | _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, found) != 0:
        return 0
    raw = bytes(found)
    # struct statx: stx_mask at 0, stx_btime (seconds as s64, nanoseconds as u32) at 80.
    if not int.from_bytes(raw[0:4], sys.byteorder) & _STATX_BTIME:
        return 0
    seconds = int.from_bytes(raw[80:88], sys.byteorder, signed=True)
    return seconds * _SECOND + int.from_bytes(raw[88:92], sys.byteorder) or 1  # 1970 is a time, too


def know_births() -> None:
    """Load what :func:`born` needs."""
    _statx()


@functools.cache
def _statx() -> tuple[Callable[..., int], Callable[[], Iterable[int]]] | None:
    """The C library's call, and what makes room for its answer; None where it has none.

    By what ctypes is made of, as all of ctypes takes longer to load than a list of machines to make.
    """
    try:
        import _ctypes

        address = _ctypes.dlsym(_ctypes.dlopen(None, 0), "statx")  # type: ignore[arg-type]
    except (ImportError, OSError):
        return None

    class Number(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001
        _type_ = "i"

    class Call(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL
        _restype_ = Number

    class Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001
        _type_ = "c"

    class Answer(_ctypes.Array):  # type: ignore[type-arg]
        _type_ = Byte
        _length_ = _SIZE

    return Call(address), Answer
