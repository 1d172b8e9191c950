"""Who else has an image open: asked of the kernel, at a cost that no number of processes raises.

QEMU's image locks tell of programs of QEMU's. A lease tells of all others: the kernel grants one for reading only
where nobody has the file open for writing, one for writing only where nobody else has it open at all. It is given back
at once; whoever opens the file in that instant waits for it and gets a file that nobody has touched. Only when somebody
has the image are the processes of this host looked through, for a name.
"""

import contextlib
import errno
import fcntl
import os
import signal
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from qmpsnap.block.usage import image_locks

How = Literal["writes", "reads"]
UNSEEN = "a process that cannot be seen from here (another PID namespace, a container, or another user's)"


class Process(Struct, frozen=True):
    """A process, or a loop device, that has a file open; a loop device has no ``pid``."""

    name: str
    pid: int
    writes: bool

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else self.name


class User(Struct, frozen=True):
    """Somebody else who has an image open.

    Attributes:
        path: of the image.
        how: what for; of two the one who writes counts.
        by: the processes, as far as they can be seen.
    """

    path: str
    how: How
    by: tuple[Process, ...]

    @property
    def who(self) -> str:
        """Its name, for a sentence."""
        return ", ".join(map(str, self.by)) or UNSEEN

    @property
    def does(self) -> str:
        """What it does, for a sentence after the image's name."""
        return "is open for writing in" if self.how == "writes" else "is read by"


def user(path: str, *, readers: bool = False, ours: Collection[int] = ()) -> User | None:
    """Who else has an image open for writing, or with ``readers`` at all; None where nobody has, or there is no file.

    Args:
        path: of the image.
        readers: whoever reads it counts as well: for a file that is to be changed or to go.
        ours: the processes that may have it open, as the machine's QEMU.

    Raises:
        OSError: that cannot be told: no right to ask, or a file system that knows no leases.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except BlockingIOError:  # a lease is held on it: by another program, or for an instant by another of us
        return _named(path, "writes", ours)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # told by who compares files with their record
            return None
        raise
    try:
        how = _asked(descriptor, readers=readers)
    finally:
        os.close(descriptor)
    return _named(path, how, ours) if how else None


def _asked(descriptor: int, *, readers: bool) -> How | None:
    if image_locks.held(descriptor, image_locks.WRITES):
        return "writes"
    leased = stat.S_ISREG(os.fstat(descriptor).st_mode)  # there are none on block devices
    if leased and not _is_free(descriptor, fcntl.F_RDLCK):
        return "writes"
    if readers and (
        image_locks.held(descriptor, image_locks.ANY) or (leased and not _is_free(descriptor, fcntl.F_WRLCK))
    ):
        return "reads"
    return None


def _is_free(descriptor: int, kind: int) -> bool:
    """Whether the kernel grants such a lease, which is given back at once."""
    # Should somebody open the file before that, we are sent a signal: this one is ignored, SIGIO would end us.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, kind)
    except BlockingIOError:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _named(path: str, how: How, ours: Collection[int]) -> User | None:
    found = [process for process in processes(path) if how == "reads" or process.writes]
    others = tuple(process for process in found if process.pid not in ours)
    return None if found and not others else User(path, how, others)


def processes(path: str) -> tuple[Process, ...]:
    """All processes but this one that have a file open, as far as we may see them, and loop devices on it."""
    try:
        status = os.lstat(path)
    except OSError:
        return ()
    found = [process for pid in _pids() if (process := _holder(pid, (status.st_dev, status.st_ino)))]
    return (*found, *_loops(path))


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid())  # noqa: PTH208


def _holder(pid: int, file: tuple[int, int]) -> Process | None:
    modes = [*_descriptors(pid, file)] or [*_mappings(pid, file)]
    if not modes:
        return None
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:  # it has just ended
        return None
    return Process("".join(c if c.isprintable() else "?" for c in name), pid, any(modes))


def _descriptors(pid: int, file: tuple[int, int]) -> Iterator[bool]:
    """For each descriptor of the file: whether it is open for writing."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fdinfo")  # noqa: PTH208
    except OSError:
        return
    for number in numbers:
        with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
            lines = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
            said = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            # By its number first: to look at a file itself may hang where a file server does.
            if int(said.get("ino", file[1])) == file[1] and _identity(f"/proc/{pid}/fd/{number}") == file:
                yield int(said["flags"], 8) & os.O_ACCMODE != os.O_RDONLY


def _mappings(pid: int, file: tuple[int, int]) -> Iterator[bool]:
    """For each mapping that writes through to the file, and outlives its descriptor."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            _, rights, _, device, inode, *_ = line.split(maxsplit=5)
            major, minor = (int(part, 16) for part in device.split(":"))
            if int(inode) == file[1] and os.makedev(major, minor) == file[0] and rights[3] == "s":
                yield "w" in rights


def _identity(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def _loops(path: str) -> Iterator[Process]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().rstrip("\n") == path:
                read_only = (backing.parent.parent / "ro").read_text().strip() == "1"
                yield Process(f"/dev/{backing.parent.parent.name}", 0, writes=not read_only)
