"""What root's QEMU may do: as a user of its own, or as root with no more capabilities than it has a use for.

Capabilities belong to a thread: a separate one drops them, starts QEMU and ends. So there is no program between us and
QEMU, none of our code runs between fork and exec, and this process keeps its capabilities.
"""

import ctypes
import os
import pwd
import stat
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from msgspec import Struct

from qmpsnap.errors import HostCannot, UsageError
from qmpsnap.host import acl, files, write_errors
from qmpsnap.model.machines.spec import MachineSpec

T = TypeVar("T")

VARIABLE: Final = "QMPSNAP_RUN_AS"

_ALL: Final = frozenset(range(41))
"""Up to ``CAP_CHECKPOINT_RESTORE``; a kernel that knows fewer refuses to drop the rest."""
_SETGID, _SETUID, _SETPCAP = 6, 7, 8
_NET_BIND_SERVICE, _NET_ADMIN, _NET_RAW = 10, 12, 13
_PLAIN: Final = frozenset({1, 2, 14, 19, 24})
"""``DAC_OVERRIDE``, ``DAC_READ_SEARCH`` (images and devices of other users), ``IPC_LOCK`` (memory), ``SYS_PTRACE``
(userfaultfd, for background snapshots), ``SYS_RESOURCE`` (blocks that the file system reserves for root)."""
_USELESS: Final = frozenset({9, 11, 16, 20, 22, 25, 26, 29, 30, 32, 33, 34, 35, 36, 37, 40})
"""What no device of QEMU has a use for: ``LINUX_IMMUTABLE``, ``NET_BROADCAST``, ``SYS_MODULE``, ``SYS_PACCT``,
``SYS_BOOT``, ``SYS_TIME``, ``SYS_TTY_CONFIG``, ``AUDIT_*``, ``MAC_*``, ``SYSLOG``, ``WAKE_ALARM``, ``BLOCK_SUSPEND``,
``CHECKPOINT_RESTORE``."""

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_CAP_AMBIENT: Final = 47
_CLEAR_ALL: Final = 4
_VERSION_3: Final = 0x20080522
_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159}


class RunAs(Struct, frozen=True):
    """The user whom root's QEMU runs as, with its own groups and none of root's."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """By ``QMPSNAP_RUN_AS``, a name or a number; None where QEMU runs as this user."""
        wanted = environment.get(VARIABLE)
        return cls.named(wanted) if wanted else None

    @classmethod
    def named(cls, wanted: str) -> Self | None:
        """That user; None where it is this one."""
        try:
            entry = pwd.getpwuid(int(wanted)) if wanted.isascii() and wanted.isdigit() else pwd.getpwnam(wanted)
        except (KeyError, OverflowError, ValueError):
            raise UsageError(
                f"{VARIABLE} names user {wanted[:80]!r}, who does not exist on this host",
                hint="create the user: adduser --system --group --no-create-home NAME",
            ) from None
        if entry.pw_uid == os.geteuid() != 0:
            return None
        if os.geteuid() != 0:
            raise UsageError(f"only root can run QEMU as another user ({VARIABLE})", hint=f"unset {VARIABLE}")
        if entry.pw_uid == 0:
            raise UsageError(f"{VARIABLE} names root, which gives QEMU no user of its own", hint=f"unset {VARIABLE}")
        groups = {group for group in os.getgrouplist(entry.pw_name, entry.pw_gid) if group != 0}
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(sorted(groups)))


def kept(spec: MachineSpec, user: RunAs | None = None) -> frozenset[int]:
    """The capabilities that the QEMU of a machine may have, or a program with root's rights that it starts."""
    kinds = {nic.kind for nic in spec.nics}
    found = frozenset({_NET_ADMIN, _SETUID, _SETGID, _SETPCAP}) if "bridge" in kinds else frozenset()  # for its helper
    if user:
        return found
    if spec.extra:  # which may name any device
        return _ALL - _USELESS
    if "tap" in kinds:
        found |= {_NET_ADMIN}
    if "user" in kinds:
        found |= {_NET_BIND_SERVICE, _NET_RAW}  # ports below 1024, and ping
    return _PLAIN | found


class Privileges(Struct, frozen=True):
    """What a QEMU that is started may do: its user, None for this one, and the capabilities it may have as root."""

    user: RunAs | None = None
    keep: frozenset[int] = _PLAIN

    @classmethod
    def of(cls, spec: MachineSpec, user: RunAs | None) -> Self:
        """Those of a machine's QEMU."""
        return cls(user, kept(spec, user))

    @classmethod
    def bare(cls, user: RunAs | None) -> Self:
        """Those of a QEMU without a guest."""
        return cls(user, frozenset() if user else _PLAIN)

    @property
    def popen(self) -> dict[str, Any]:
        """What ``subprocess.Popen`` is told of them."""
        user = self.user
        return {"user": user.uid, "group": user.gid, "extra_groups": list(user.groups)} if user else {}

    def start(self, call: Callable[[], T], binary: str) -> T:
        """Start a program by ``call``, with these capabilities at most.

        A wrapper, which is no machine code, keeps root's: nobody knows what it does before it becomes QEMU.
        """
        if os.geteuid() != 0 or (self.user is None and not _is_machine_code(binary)):
            return call()
        return _apart(lambda: _drop(_ALL - self.keep), call)


PLAIN: Final = Privileges()
"""Those of a QEMU of this user without a guest."""


def obstacle(user: RunAs, path: str, *, write: bool) -> str:
    """Why a user cannot open a file, as a command that changes it; empty when it can."""
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
    if _can_open(user, path, flags):
        return ""
    for folder in reversed(Path(path).absolute().parents):
        if not _can_open(user, f"{folder}/.", os.O_PATH | os.O_CLOEXEC):
            return f"setfacl -m u:{user.name}:x {folder}"
    return f"setfacl -m u:{user.name}:{'rw' if write else 'r'} {path}"


def require_access(user: RunAs, path: str, *, machine: str, write: bool = False) -> None:
    """Make sure that a user can open a file."""
    if remedy := obstacle(user, path, write=write):
        raise HostCannot(
            f"QEMU's user {user.name} ({VARIABLE}) has no permission to {'write' if write else 'read'} {path},"
            f" which machine {machine} needs",
            hint=remedy,
            machine=machine,
        )


def admit(path: str | os.PathLike[str], user: int, wanted: int) -> None:
    """Give a user that access to a file or folder of qmpsnap's."""
    try:
        with files.opened(path) as descriptor:
            acl.grant(descriptor, user, wanted)
    except OSError as error:
        raise HostCannot(
            f"QEMU's user {user} ({VARIABLE}) cannot be given access to {path}: {error.strerror}",
            hint="keep the home and its images on a file system with POSIX access control lists (ext4, XFS, btrfs)",
        ) from error


def _can_open(user: RunAs, path: str, flags: int) -> bool:
    def look() -> bool:
        try:
            os.close(os.open(path, flags))
        except PermissionError:
            return False
        except OSError:
            return True  # another problem, reported when it is opened
        return True

    libc = ctypes.CDLL(None)
    before = libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    try:
        return _apart(lambda: _become(user), look)
    finally:
        # The kernel has taken it for a change of user, after which nobody may look into this process.
        libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(before), 0, 0, 0)


def _become(user: RunAs) -> None:
    """Let this thread reach for files as that user does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if number := _SETGROUPS.get(os.uname().machine):
        groups = (ctypes.c_uint32 * len(user.groups))(*user.groups)
        libc.syscall(ctypes.c_long(number), ctypes.c_size_t(len(user.groups)), groups)  # glibc's sets every thread's
    libc.setfsgid(user.gid)
    libc.setfsuid(user.uid)  # and with it the capabilities go that would let it at any file


def _drop(capabilities: frozenset[int]) -> None:
    """Take capabilities from what this thread's programs can have, as far as it may."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in capabilities:
        libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    libc.prctl(_PR_CAP_AMBIENT, ctypes.c_ulong(_CLEAR_ALL), 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("<Ii", _VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    if libc.capget(header, data) == 0:
        words = list(struct.unpack("<6I", data.raw[:24]))  # effective, permitted, inheritable of each half
        words[2] = words[5] = 0
        libc.capset(header, struct.pack("<6I", *words))


def _apart(first: Callable[[], object], call: Callable[[], T]) -> T:
    """Run a call in a thread that ends with it, after something that changes the thread's rights."""
    answer: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            first()
            answer.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever asked
            failed.append(error)

    thread = threading.Thread(target=work, name="qmpsnap-rights")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return answer[0]


def _is_machine_code(binary: str) -> bool:
    import shutil

    try:
        with Path(shutil.which(binary) or binary).open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def user_of(pid: int) -> int | None:
    """The user whom a process runs as; None when it has ended."""
    try:
        with Path(f"/proc/{pid}/status").open() as lines:
            return next(int(line.split()[2]) for line in lines if line.startswith("Uid:"))
    except (OSError, StopIteration, ValueError):
        return None


def name_of(user: int) -> str:
    """A user's name, or its number where it has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def make_private(path: Path, what: str) -> None:
    """Make a folder that is private to this user, or make sure that it is."""
    try:
        files.make_folder(path)
        status = path.lstat()
        rights = acl.rights(str(path), status.st_mode)
    except OSError as error:
        why, remedy = write_errors.reason(path, error)
        raise HostCannot(f"the {what} {path} cannot be created: {why}", hint=remedy) from error
    # A user who is named there is one that a machine's QEMU runs as, or has run.
    others = rights.beyond(frozenset(rights.users))
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or others:
        raise HostCannot(f"the {what} {path} is not private to this user", hint=f"chmod 0700 {path}, or remove it")


def prepare_folder(folder: Path, user: RunAs | None, made: Sequence[str], *, log: str) -> None:
    """Prepare a run folder for a QEMU of that user or of this one; files left by another are no obstacle."""
    if os.geteuid() != 0:
        return
    try:
        with files.opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
            acl.revoke(descriptor)
            os.fchmod(descriptor, 0o1700 if user else 0o700)  # what is ours there, QEMU may not put another in place of
        if user is None:
            return
        for name in made:  # nobody but us gets at them now
            _clear(folder / name, user, keep=name == log)
        os.close(
            os.open(folder / log, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        )  # ours: we cut it
        admit(folder / log, user.uid, acl.READ | acl.WRITE)
    except OSError as error:
        raise HostCannot(f"the run folder {folder} cannot be prepared: {error.strerror}") from error
    admit(folder, user.uid, acl.READ | acl.WRITE | acl.ENTER)


def _clear(path: Path, user: RunAs, *, keep: bool) -> None:
    """Remove what a QEMU of that user could not write over, and what may be another file's second name."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if not (plain and keep) and (status.st_uid != user.uid or not plain):
        path.unlink()
