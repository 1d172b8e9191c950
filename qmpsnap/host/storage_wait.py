"""Which file a thread waits for: read from ``/proc``, which answers even while storage hangs.

The kernel's counters distinguish a hanging thread from a slow one: a thread that reads, writes or waits for page after
page is scheduled again and again.
"""

import contextlib
import os
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

DEADLINE: Final = "QMPSNAP_STORAGE_DEADLINE"
"""The variable with the seconds after which storage that does not answer is given up."""

_DEADLINE: Final = 20.0
_NAMING: Final = 0.5
"""Seconds to find out on which storage a path lies."""
_PATH_MAX: Final = 4096
_IN_MEMORY: Final = ("devtmpfs", "devpts", "tmpfs")
_CURRENT_FOLDER: Final = -100


class _Calls(Struct, frozen=True):
    """System calls that may wait for storage, by their number and by how their first arguments name a file."""

    by_descriptor: dict[int, str]
    by_path: dict[int, str]
    below_folder: dict[int, str]


_CALLS: Final = {
    "x86_64": _Calls(
        by_descriptor={
            0: "read", 1: "write", 3: "close", 5: "fstat", 8: "lseek", 16: "ioctl", 17: "pread", 18: "pwrite",
            40: "sendfile", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 77: "ftruncate", 78: "getdents",
            81: "fchdir", 91: "fchmod", 93: "fchown", 138: "fstatfs", 162: "sync", 217: "getdents", 285: "fallocate",
            306: "syncfs", 326: "copy_file_range",
        },
        by_path={
            2: "open", 4: "stat", 6: "lstat", 21: "access", 76: "truncate", 80: "chdir", 82: "rename", 83: "mkdir",
            84: "rmdir", 86: "link", 87: "unlink", 88: "symlink", 89: "readlink", 90: "chmod", 92: "chown",
            137: "statfs",
        },
        below_folder={
            257: "open", 258: "mkdir", 262: "stat", 263: "unlink", 264: "rename", 265: "link", 267: "readlink",
            268: "chmod", 269: "access", 280: "utimens", 316: "rename", 332: "statx", 437: "open", 439: "access",
        },
    ),
    "aarch64": _Calls(
        by_descriptor={
            25: "fcntl", 29: "ioctl", 32: "flock", 44: "fstatfs", 46: "ftruncate", 47: "fallocate", 50: "fchdir",
            52: "fchmod", 55: "fchown", 57: "close", 61: "getdents", 62: "lseek", 63: "read", 64: "write", 67: "pread",
            68: "pwrite", 71: "sendfile", 80: "fstat", 81: "sync", 82: "fsync", 83: "fdatasync", 267: "syncfs",
            285: "copy_file_range",
        },
        by_path={43: "statfs", 45: "truncate", 49: "chdir"},
        below_folder={
            34: "mkdir", 35: "unlink", 37: "link", 38: "rename", 48: "access", 53: "chmod", 56: "open", 78: "readlink",
            79: "stat", 88: "utimens", 276: "rename", 291: "statx", 437: "open", 439: "access",
        },
    ),
}  # fmt: skip


class Wait(Struct, frozen=True):
    """What a thread waits for: a system call, and the file that it is about, where that can be told."""

    call: str
    path: str

    def __str__(self) -> str:
        return f"{self.call} of {self.path}" if self.path else self.call


class Watch:
    """One thread, looked at now and then: does it get on?"""

    def __init__(self, process: int, thread: int) -> None:
        self._process, self._thread = process, thread
        self._last: tuple[str, ...] = ()
        self._since = time.monotonic()

    def hangs(self, seconds: float) -> Wait | None:
        """What the thread waits for, if it has not got on for so many seconds and waits for a file."""
        now = _progress(self._process, self._thread)
        if now != self._last or not now:
            self._last, self._since = now, time.monotonic()
            return None
        return waits(self._process, self._thread) if time.monotonic() - self._since >= seconds else None


class ProcessWatch:
    """All threads of a process."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._threads: dict[int, Watch] = {}

    def hangs(self, seconds: float) -> Wait | None:
        """What the first of its threads waits for that has not got on for so many seconds and waits for a file."""
        known = self._threads
        self._threads = {one: known.get(one) or Watch(self._process, one) for one in threads(self._process)}
        waits = [watch.hangs(seconds) for watch in self._threads.values()]
        return next(filter(None, waits), None)


def threads(process: int) -> list[int]:
    """The threads of a process; none where it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{process}/task")]  # noqa: PTH208
    except OSError:
        return []


def waits_of(process: int) -> Wait | None:
    """The file that a thread of a process waits for right now."""
    return next((wait for thread in threads(process) if (wait := waits(process, thread))), None)


def keeps(process: int) -> Wait | None:
    """The file that keeps a process from ending which was killed or has ended itself; None where it lives."""
    for thread in threads(process):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/task/{thread}/status").read_text().splitlines()
            masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
            if any(mask >> (signal.SIGKILL - 1) & 1 for mask in masks) and (wait := waits(process, thread)):
                return wait
    return None


def sentence(wait: Wait, seconds: float, *, who: str = "") -> str:
    """What is wrong; the storage is named as well, where that can be told at once."""
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(storage(wait.path)), daemon=True)
    if wait.path:
        asking.start()
        asking.join(_NAMING)
    place = f", on {found[0]}" if found and found[0] else ""
    return f"storage does not answer: {wait}{who and f' by {who}'} has waited for {seconds:g} s{place}"


def deadline() -> float:
    """Seconds after which storage that does not answer is given up."""
    try:
        seconds = float(os.environ.get(DEADLINE, _DEADLINE))
    except ValueError:
        return _DEADLINE
    return seconds if 0 < seconds < float("inf") else _DEADLINE


def waits(process: int, thread: int) -> Wait | None:
    """The file that a thread waits for in the kernel; None where it runs, or waits for something else."""
    # All by the thread: of a process whose first one has ended nothing else is to be seen.
    task = Path(f"/proc/{process}/task/{thread}")
    try:
        fields = (task / "syscall").read_text().split()
        state = (task / "stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return None
    number = -1 if fields[0] == "running" else int(fields[0])
    arguments = [int(word, 16) for word in fields[1:7]]
    calls = _CALLS.get(os.uname().machine)
    if number == -1 or calls is None:
        return Wait("a file", "") if state == "D" else None  # a mapped page, or calls with other numbers
    if (call := calls.by_descriptor.get(number)) and (path := _opened(task, _signed(arguments[0]))):
        return Wait(call, path)
    if call := calls.by_path.get(number):
        return Wait(call, _inside(task, _CURRENT_FOLDER, arguments[0]))
    if call := calls.below_folder.get(number):
        return Wait(call, _inside(task, _signed(arguments[0]), arguments[1]))
    return None


def storage(path: str) -> str:
    """The mounted file system that a path leads to, in words; links are followed as far as that asks no other host."""
    mounts = _mounts()
    resolved, rest = "/", [part for part in path.split("/") if part]
    for _ in range(_PATH_MAX):
        where, kind = _mount(resolved, mounts)
        if not rest or _is_remote(kind):
            return f"{where} ({kind})" if where else ""
        step = os.path.join(resolved, rest[0])  # noqa: PTH118 - Path would drop nothing, and cost more
        try:
            target = "" if _is_remote(_mount(step, mounts)[1]) else os.readlink(step)  # noqa: PTH115
        except OSError:
            target = ""
        if target:
            rest = [*(part for part in target.split("/") if part), *rest[1:]]
            resolved = "/" if target.startswith("/") else resolved
        else:
            resolved, rest = os.path.normpath(step), rest[1:]
    return ""


def _is_remote(kind: str) -> bool:
    return kind.startswith(("fuse", "nfs", "cifs", "smb", "9p", "ceph", "virtiofs", "afs", "glusterfs"))


def _mounts() -> list[tuple[str, str]]:
    """Of every mounted file system its place and kind, in the order in which they were mounted."""
    found = []
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            place = before.split()[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
            found.append((place, after.split()[0]))
    return found


def _mount(path: str, mounts: list[tuple[str, str]]) -> tuple[str, str]:
    below = [mount for mount in mounts if path == mount[0] or path.startswith(f"{mount[0].rstrip('/')}/")]
    return max(reversed(below), key=lambda mount: len(mount[0]), default=("", ""))


def _progress(process: int, thread: int) -> tuple[str, ...]:
    """What changes when a thread gets on: its switches, its time and the call that it is in."""
    task = Path(f"/proc/{process}/task/{thread}")
    try:
        status = (task / "status").read_text().splitlines()
        times = (task / "stat").read_text().rpartition(") ")[2].split()[11:13]
        call = (task / "syscall").read_text()
    except OSError:
        return ()
    return (*(line for line in status if "ctxt_switches" in line), *times, call)


def _opened(task: Path, descriptor: int) -> str:
    """The file or block device that a descriptor of the thread is of; empty for a terminal, a pipe or a socket."""
    try:
        path = os.readlink(task / f"fd/{descriptor}")  # noqa: PTH115
        kind = _mount(path, _mounts())[1] if path.startswith("/dev/") else ""
        if kind in _IN_MEMORY and stat.S_ISCHR(os.stat(path).st_mode):  # noqa: PTH116
            return ""
    except OSError:
        return ""
    return path if path.startswith("/") else ""


def _inside(task: Path, folder: int, address: int) -> str:
    name = _text(task, address)
    if name.startswith("/"):
        return name
    try:
        link = "cwd" if folder == _CURRENT_FOLDER else f"fd/{folder}"
        beginning = os.readlink(task / link)  # noqa: PTH115
    except OSError:
        return name
    return f"{beginning}/{name}" if name else beginning


def _text(task: Path, address: int) -> str:
    try:
        memory = os.open(task / "mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.fsdecode(os.pread(memory, _PATH_MAX, address).partition(b"\0")[0])
        finally:
            os.close(memory)
    except (OSError, OverflowError):
        return ""


def _signed(word: int) -> int:
    low = word & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
