"""Whether a program that locks images as QEMU does has one open; only asked, no lock is taken."""

import errno
import fcntl
import os
import struct
from typing import Final

from qmpsnap.block.header import printable
from qmpsnap.errors import HostCannot

_BYTES: Final = (100, 200)
"""Start and number of the bytes that QEMU locks: one for each thing that it does with an image, or lets nobody do."""

_FLOCK: Final = "hhqqi4x"  # struct flock of 64 bits: type, whence, start, length, pid


def is_locked(path: str) -> bool:
    """Whether a QEMU or qemu-img has that image open, for reading or for writing; False where there is no file.

    One that was told ``locking=off`` cannot be seen.

    Raises:
        HostCannot: no right to read the file, or its file system knows no locks.
    """
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *_BYTES, 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise HostCannot(
            f"whether {printable(path)} is open in another process cannot be told: {error.strerror}"
        ) from error
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
