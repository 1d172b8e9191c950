"""Which file it is: device, inode, and when the file was born, where its file system keeps that; else its size.

An inode's number is given to another file as soon as the first one is gone, on ext4 at once; a time of birth is not,
and no copy, rename, chmod or write changes it. NFS, FUSE and old tmpfs have none: then it is 0, which is compared with
nothing. Python 3.11 has no ``statx``, so the C library is asked.
"""

import ctypes
import functools
import os
import stat
import sys
from collections.abc import Callable
from typing import Final, Protocol

from msgspec import Struct

_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_STATX_BTIME: Final = 0x800
_SIZE: Final = 256
_SECOND: Final = 1_000_000_000


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


class FileId(Struct, frozen=True):
    """Device, inode, time of birth and size in bytes of a file that is there."""

    device: int
    inode: int
    birth: int = 0
    size: int | None = None


def same_file(recorded: Identified, found: Identified, *, size: int | None = None) -> bool:
    """Whether that is the recorded file, as far as it can be told: a birth that only one side knows tells nothing.

    ``size``: bytes that the recorded file has, where nobody may have written to it: asked where no birth decides.
    """
    if (recorded.device, recorded.inode) != (found.device, found.inode):
        return False
    if recorded.birth and found.birth:
        return recorded.birth == found.birth
    return size is None or not isinstance(found, FileId) or found.size in (None, size)


def of(descriptor: int) -> FileId:
    """Identity of an open file.

    Raises:
        OSError: the descriptor is none.
    """
    status = os.fstat(descriptor)
    return FileId(status.st_dev, status.st_ino, born(descriptor), status.st_size)


def at(name: str | os.PathLike[str], *, folder: int | None = None) -> FileId | None:
    """Identity of the file of that name, links not followed, which are files of their own; None where there is none.

    Args:
        name: a path, or with ``folder`` a name in it.
        folder: descriptor of the folder.

    Raises:
        OSError: nobody can tell.
    """
    try:
        # Held open, so that birth and inode are of one file, and the inode's number is nobody else's meanwhile.
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return of(descriptor)
    finally:
        os.close(descriptor)


def born(descriptor: int) -> int:
    """When an open file was born, in nanoseconds since the epoch; 0 where its file system does not say.

    Not of a device: its node is born anew with every boot.
    """
    if stat.S_IFMT(os.fstat(descriptor).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        return 0
    statx = _statx()
    if statx is None:
        return 0
    found = ctypes.create_string_buffer(_SIZE)
    flags = _AT_EMPTY_PATH | _AT_SYMLINK_NOFOLLOW
    if statx(descriptor, b"", flags, _STATX_BTIME, found) != 0:
        return 0
    # struct statx: stx_mask at 0, stx_btime (seconds as s64, nanoseconds as u32) at 80.
    if not int.from_bytes(found.raw[0:4], sys.byteorder) & _STATX_BTIME:
        return 0
    seconds = int.from_bytes(found.raw[80:88], sys.byteorder, signed=True)
    return seconds * _SECOND + int.from_bytes(found.raw[88:92], sys.byteorder) or 1  # 1970 is a time, too


@functools.cache
def _statx() -> Callable[..., int] | None:
    try:
        found = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    found.restype = ctypes.c_int
    return found
