"""What a machine's QEMU and its guest say: two files in the data folder, each cut to its end by the next command.

A guest writes to its console as much as it likes, and QEMU goes on for months: both append, so that a file can be cut
from outside while they have it open.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qmpsnap.errors import HostCannot
from qmpsnap.host.files import opened
from qmpsnap.machine.starting import privileges
from qmpsnap.machine.starting.run_files import CONSOLE_LOG
from qmpsnap.model.home import Home

QEMU_LOG = "qemu.log"
NAMES = (QEMU_LOG, CONSOLE_LOG)

LIMIT = 1 << 20
"""Bytes above which a file is cut."""
KEPT = LIMIT // 2
"""Bytes of its end that stay."""
_LINE = 4096
"""How far a line's end is looked for: a guest need not send any."""


def prepare(folder: Path) -> None:
    """Make the folder, this user's alone, and remove links from the names that QEMU writes to: it would follow them."""
    privileges.make_private(folder, "folder of logs")
    unlink_aliases(folder / name for name in NAMES)


def unlink_aliases(paths: Iterator[Path]) -> None:
    """Remove the names that are links, or second names of another file; what they lead to stays."""
    for path in paths:
        try:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
                path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise HostCannot(f"{path} cannot be removed: {error.strerror}") from error


def bound(home: Home, machine: str) -> None:
    """Cut the machine's files that have grown above the limit; one that cannot be cut stays as it is."""
    for name in NAMES:
        with contextlib.suppress(OSError):
            _bound(home.log_dir(machine) / name)


def sizes(home: Home, machine: str) -> dict[str, int]:
    """How many bytes each of the machine's files has, by its path."""
    found = {}
    for name in NAMES:
        path = home.log_dir(machine) / name
        with contextlib.suppress(OSError):
            found[str(path)] = path.lstat().st_size
    return found


def _bound(path: Path) -> None:
    if path.lstat().st_size <= LIMIT:
        return
    with opened(path, os.O_RDWR | os.O_NONBLOCK) as file:
        status = os.fstat(file)
        ours = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()
        if ours and _is_free(file):
            _cut(file)


def _is_free(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another command cuts it
        return False
    return True


def _cut(file: int) -> None:
    """Move the end of the log to its beginning. This needs no space, and output written meanwhile is moved as well.

    Only output between the last read and the truncation is lost.
    """
    size = os.fstat(file).st_size
    if size <= LIMIT:  # another command has cut it by now
        return
    start = size - KEPT
    start += os.pread(file, _LINE, start).find(b"\n") + 1
    at = os.pwrite(file, f"[qmpsnap has removed the {start} bytes before this line]\n".encode(), 0)
    while piece := os.pread(file, KEPT, start):
        at += os.pwrite(file, piece, at)
        start += len(piece)
    os.ftruncate(file, at)
