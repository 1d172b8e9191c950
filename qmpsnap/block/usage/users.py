"""Which other processes have an image open, by the kernel's answer; the cost does not grow with their number.

QEMU's image locks show QEMU's own programs. A lease shows all others: the kernel grants one for reading only where
nobody has the file open for writing, one for writing only where nobody else has it open at all. It is returned at once;
a process that opens the file in that instant waits for it and gets an unchanged file. Only if another process has the
image open, the processes of this host are searched for its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from qmpsnap.block.usage import image_locks
from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.host.files import key_of, opened, read
from qmpsnap.host.value import Value

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from typing import Final, Literal

    from qmpsnap.host.files import Inode

    How = Literal["writes", "reads"]

_SIGURG: Final = 23
"""On every Linux but Alpha and SPARC; the module with its name is slow to load."""
IN_CLUSTER: Final = "json:"
"""How the names of images begin that are in a Ceph cluster, and no files."""
_NO_NODES: Final = ("/dev/shm/", "/dev/mqueue/", "/dev/hugepages/")  # noqa: S108 - nothing is made there
UNSEEN = "a process that cannot be seen from here (another PID namespace, a container, or another user's)"


class Process(Value):
    """A process, or a loop device, that has a file open; a loop device has no ``pid``."""

    name: str
    pid: int
    writes: bool

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else self.name


class User(Value):
    """Somebody else who has an image open, a writer before a reader; ``by``: as far as they can be seen."""

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


class Found(Value):
    """Who else has images open, by path in the order that was asked; ``unsaid``: of one of them it cannot be told."""

    users: Mapping[str, User] = {}
    unsaid: bool = False


def look(paths: Iterable[str], *, readers: bool = False, ours: Collection[int] = ()) -> Found:
    """Who else has images open for writing, or with ``readers`` at all; a name without a file is open to nobody.

    It cannot be told without a right to ask, or where the file system knows no leases. The processes ``ours``, as the
    machine's QEMU, may have them open.
    """
    held: dict[str, How] = {}
    clients: dict[str, User] = {}
    unsaid = False
    for path in paths:
        try:
            if path.startswith(IN_CLUSTER):
                clients |= _clients(path, readers=readers, ours=ours)
            elif how := _how(path, readers=readers):
                held[path] = how
        except (OSError, HostCannot):
            unsaid = True
    by = _processes(held) if held else {}
    found = {path: user for path, how in held.items() if (user := _named(path, how, by[path], ours))}
    return Found(found | clients, unsaid)


def _clients(path: str, *, readers: bool, ours: Collection[int]) -> dict[str, User]:
    from qmpsnap.block.usage import clients  # slow to load, and seldom needed

    try:
        found = clients.look(path, readers=readers, ours=ours)
    except ImageRefused:  # there is no such image: told by who compares it with its record
        return {}
    return {path: User(path, *found)} if found else {}


def _how(path: str, *, readers: bool) -> How | None:
    try:
        with opened(path) as descriptor:
            return _asked(descriptor, readers=readers)
    except BlockingIOError:  # a lease is held on it: by another program, or for an instant by another of us
        return "writes"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # told by who compares files with their record
            return None
        raise


def _asked(descriptor: int, *, readers: bool) -> How | None:
    if image_locks.held(descriptor, image_locks.WRITES):
        return "writes"
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return _asked_of_device(descriptor, status.st_rdev, readers=readers)
    leased = stat.S_ISREG(status.st_mode)
    if leased:
        # Should somebody open the file before a lease is given back, we are sent a signal: this one is ignored, SIGIO
        # would end us.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, _SIGURG)
    if leased and not _is_free(descriptor, fcntl.F_RDLCK):
        return "writes"
    if readers and (
        image_locks.held(descriptor, image_locks.ANY) or (leased and not _is_free(descriptor, fcntl.F_WRLCK))
    ):
        return "reads"
    return None


def _asked_of_device(descriptor: int, number: int, *, readers: bool) -> How | None:
    """There are no leases on block devices, so each time the processes of this host are searched."""
    from qmpsnap.host import block_devices  # seldom needed

    path = f"/proc/self/fd/{descriptor}"
    if block_devices.is_claimed(path) or block_devices.holders(number):
        return "writes"
    others = _processes([path])[path]
    if any(process.writes for process in others):
        return "writes"
    return "reads" if readers and others else None


def _is_free(descriptor: int, kind: int) -> bool:
    """Whether the kernel grants such a lease, which is given back at once."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, kind)
    except BlockingIOError:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _named(path: str, how: How, by: Iterable[Process], ours: Collection[int]) -> User | None:
    found = [process for process in by if how == "reads" or process.writes]
    others = tuple(process for process in found if process.pid not in ours)
    return None if found and not others else User(path, how, others)


def _processes(paths: Iterable[str]) -> dict[str, list[Process]]:
    """All processes but this one that have each file open, as far as we may see them, and loop devices on it.

    The host's processes are looked through once for all files.
    """
    files: dict[str, Inode | None] = dict.fromkeys(paths)
    for path in files:
        with contextlib.suppress(OSError):
            files[path] = key_of(os.stat(path, follow_symlinks=_is_device(path)))  # noqa: PTH116
    wanted = {file for file in files.values() if file}
    holders: dict[Inode, list[Process]] = {file: [] for file in wanted}
    for pid in _pids():
        for file, process in _held_by(pid, wanted):
            holders[file].append(process)
    return {path: [*holders[file], *_loops(path), *_kernel(file)] if file else [] for path, file in files.items()}


def _is_device(path: str) -> bool:
    """Whether a name leads to a block device, which a link is the only name of."""
    if not os.path.islink(path):  # noqa: PTH114
        return False
    from qmpsnap.host import block_devices  # seldom needed

    return block_devices.number_of(path) is not None


def _kernel(file: Inode) -> Iterator[Process]:
    number, inode = file
    if not inode:
        from qmpsnap.host import block_devices  # seldom needed

        yield from (Process(name, 0, writes=True) for name in block_devices.holders(number))


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid())  # noqa: PTH208


def _held_by(pid: int, wanted: Collection[Inode]) -> Iterator[tuple[Inode, Process]]:
    """Which of the files a process has open."""
    writes: dict[Inode, bool] = {}
    for file, writing in _descriptors(pid, wanted):
        writes[file] = writes.get(file, False) or writing
    mapped = [file for file in wanted if file not in writes]
    for file, writing in _mappings(pid, mapped) if mapped else ():
        writes[file] = writes.get(file, False) or writing
    if not writes:
        return
    try:
        name = read(f"/proc/{pid}/comm").strip()
    except OSError:  # it has just ended
        return
    shown = "".join(c if c.isprintable() else "?" for c in name)
    yield from ((file, Process(shown, pid, writing)) for file, writing in writes.items())


def _descriptors(pid: int, wanted: Collection[Inode]) -> Iterator[tuple[Inode, bool]]:
    """For each descriptor of one of the files: whether it is open for writing."""
    inodes = {inode for _, inode in wanted}
    for number in _names(f"/proc/{pid}/fdinfo"):
        with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
            lines = read(f"/proc/{pid}/fdinfo/{number}").splitlines()
            said = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            # By its number first: to look at a file itself may hang where a file server does.
            if "ino" in said and int(said["ino"]) not in inodes and not (0 in inodes and _is_node(pid, number)):
                continue
            if (file := key_of(os.stat(f"/proc/{pid}/fd/{number}"))) in wanted:  # noqa: PTH116
                yield file, int(said["flags"], 8) & os.O_ACCMODE != os.O_RDONLY


def _is_node(pid: int, number: str) -> bool:
    """Whether it may be a device's node, by its name: below the others there may be a file server's files."""
    name = os.readlink(f"/proc/{pid}/fd/{number}")  # noqa: PTH115
    return name.startswith("/dev/") and not name.startswith(_NO_NODES)


def _mappings(pid: int, wanted: Collection[Inode]) -> Iterator[tuple[Inode, bool]]:
    """For each mapping that writes through to one of the files, and outlives its descriptor."""
    with contextlib.suppress(OSError, ValueError):
        for line in read(f"/proc/{pid}/maps").splitlines():
            _, rights, _, device, inode, *_ = line.split(maxsplit=5)
            if inode == "0" or rights[3] != "s":
                continue
            major, minor = (int(part, 16) for part in device.split(":"))
            if (file := (os.makedev(major, minor), int(inode))) in wanted:
                yield file, "w" in rights


def _loops(path: str) -> Iterator[Process]:
    for device in filter(lambda name: name.startswith("loop"), _names("/sys/block")):
        with contextlib.suppress(OSError):
            if read(f"/sys/block/{device}/loop/backing_file").rstrip("\n") == path:
                yield Process(f"/dev/{device}", 0, writes=read(f"/sys/block/{device}/ro").strip() != "1")


def _names(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)  # noqa: PTH208
    return []
