"""Whether a program that locks images as QEMU does has one open; only asked, no lock is taken."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import sys

from qmpsnap.errors import HostCannot
from qmpsnap.host.files import opened

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

ANY: Final = (100, 200)
"""Start and number of the bytes that QEMU locks: one for each thing that it does with an image, or lets nobody do."""

WRITES: Final = (101, 3)
"""Those of them that say: writes, writes what reads the same, resizes."""


def is_locked(path: str) -> bool:
    """Whether a QEMU or qemu-img has that image open, for reading or for writing; False where there is no file.

    One that was told ``locking=off`` cannot be seen. ``HostCannot``: no right to read it, or no locks on its file
    system.
    """
    return _asked(path, [ANY])


_READ, _WRITE, _RESIZE = 0, 1, 3  # QEMU's BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE and BLK_PERM_RESIZE
_USED, _UNSHARED = 100, 200  # the byte that says: somebody does this, and: nobody else may


def is_refused(path: str, *, writing: bool) -> bool:
    """Whether QEMU would be refused an image for the locks of others, as a reader or as its only writer.

    Not by a reader that shares everything (``-U``), nor, for a reader, by other readers. Raises as :func:`is_locked`.
    """
    kept_from = (_READ, _WRITE, _RESIZE) if writing else (_READ,)
    return _asked(path, [(_USED + _WRITE, 1), (_USED + _RESIZE, 1), *((_UNSHARED + bit, 1) for bit in kept_from)])


def _asked(path: str, places: Iterable[tuple[int, int]]) -> bool:
    """Whether anybody else has a lock in one of these places, given as start and length."""
    try:
        with opened(path) as descriptor:
            return any(held(descriptor, place) for place in places)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        from qmpsnap.block.image.header import printable

        raise HostCannot(f"the image locks of {printable(path)} cannot be read: {error.strerror}") from error


def held(descriptor: int, which: tuple[int, int]) -> bool:
    """Whether another process has locked any of these bytes of an open file."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _question(*which))
    return int.from_bytes(answer[:2], sys.byteorder) != fcntl.F_UNLCK


@functools.cache
def _question(start: int, length: int) -> bytes:
    # struct flock of 64 bits: type and whence, of 16 bits each and filled up, start, length, pid.
    fields = zip((fcntl.F_WRLCK, os.SEEK_SET, start, length, 0), (2, 6, 8, 8, 8), strict=True)
    return b"".join(value.to_bytes(size, sys.byteorder) for value, size in fields)
