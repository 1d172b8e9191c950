"""Another process at the machine's files: real programs that read, lock, write, replace, resize, copy, unmount, fill.

A kind comes, stays for a while, and leaves: then it ends its programs and puts back what it had taken away. What it
brought must be there then, with its own bytes.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from msgspec import Struct

from tests.faults.site import KIB, SIZE, qemu_io
from tests.live.machine import MIB

MAGIC = b"QFI\xfb"
HOLDS = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"
WRITES_LATE = HOLDS + "; file.seek(-512, 2); file.write(b'late' * 128)"


class Absent(Exception):
    """It could not come: there is no such file, or QEMU's locks kept it out."""


class Kind(Struct, frozen=True, kw_only=True):
    """What one does to a file.

    Attributes:
        comes: in the block it is there.
        harmless: it changes nothing: the verb is done, or refused before it begins.
        spoils: what the file held is not what it was, nor the file perhaps; else all is as before once it has left.
        holds: it may write for as long as it stays, which `check` says of a machine that is stopped.
        traces: what it has done to a frozen layer shows in the file's size or identity, and `check` says so.
        root: only root can do that.
    """

    comes: Callable[[Path, Path], AbstractContextManager[None]]
    harmless: bool = False
    spoils: bool = False
    holds: bool = False
    traces: bool = False
    root: bool = False


# --- programs -------------------------------------------------------------------------------------------------------


@contextmanager
def _holding(*argv: str | Path) -> Iterator[None]:
    """A program that says one line once it has the file, and goes when its input ends."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if argv[0] == qemu_io():
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(b"length\n")
                    process.stdin.flush()
            if not process.stdout.readline():
                raise Absent
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(20)


def _run(*argv: str | Path) -> None:
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        raise Absent


def _python(program: str, *arguments: str | Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-I", "-S", "-c", program, *arguments)


def _format(file: Path) -> str:
    with file.open("rb") as image:
        return "qcow2" if image.read(4) == MAGIC else "raw"


# --- who reads and locks --------------------------------------------------------------------------------------------


def _reads(file: Path, _: Path) -> AbstractContextManager[None]:
    return _holding(*_python(HOLDS, file, "rb"))


def _reads_locked(file: Path, _: Path) -> AbstractContextManager[None]:
    return _holding(qemu_io(), "-r", "-f", _format(file), file)


@contextmanager
def _serves(file: Path, room: Path) -> Iterator[None]:
    """qemu-nbd forks once it has the image, and is ended by the process id that it leaves."""
    pid = room / "pid"
    format_ = _format(file)
    _run("qemu-nbd", "-r", "-f", format_, "--fork", "-t", "-k", room / "socket", f"--pid-file={pid}", file)
    process = os.pidfd_open(int(pid.read_text()))
    try:
        yield
    finally:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        assert select.select([process], [], [], 20)[0], "qemu-nbd does not end"
        os.close(process)


def _flocks(file: Path, _: Path) -> AbstractContextManager[None]:
    return _holding("flock", "-x", file, "sh", "-c", "echo; read -r line")


# --- who writes -----------------------------------------------------------------------------------------------------


def _holds(file: Path, _: Path) -> AbstractContextManager[None]:
    return _holding(*_python(HOLDS, file, "r+b"))


def _holds_locked(file: Path, _: Path) -> AbstractContextManager[None]:
    return _holding(qemu_io(), "-f", _format(file), file)


@contextmanager
def _writes(file: Path, _: Path) -> Iterator[None]:
    """Into the last sector: of an image with content that is a cluster of it."""
    sector = max(0, file.stat().st_size // 512 - 1)
    _run("dd", "if=/dev/urandom", f"of={file}", "bs=512", "count=1", f"seek={sector}", "conv=notrunc,fsync")
    yield


@contextmanager
def _writes_locked(file: Path, _: Path) -> Iterator[None]:
    _run(qemu_io(), "-f", _format(file), "-t", "writeback", "-c", f"write -P 77 {64 * KIB} 512", file)
    yield


def _writes_late(file: Path, _: Path) -> AbstractContextManager[None]:
    return _holding(*_python(WRITES_LATE, file, "r+b"))


@contextmanager
def _resizes(file: Path, _: Path) -> Iterator[None]:
    if _format(file) == "raw":
        _run("truncate", "-s", "+64K", file)
    else:
        _run("qemu-img", "resize", "-q", "-f", "qcow2", file, str(SIZE + MIB))
    yield


# --- who replaces ---------------------------------------------------------------------------------------------------


class Theirs:
    """An image of somebody else's, which QEMU would gladly open; as large as the machine's disks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
        _run(qemu_io(), "-f", "qcow2", "-c", "write -q -P 7 0 64k", path)
        self._bytes, self._found = path.read_bytes(), self._status(path)

    @staticmethod
    def _status(path: Path) -> tuple[int, ...]:
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid

    def is_untouched(self, at: Path) -> None:
        """Raise when it is not there as it was."""
        assert at.exists(), f"{at.name}, which was the outsider's, is gone"
        assert self._status(at)[0] == self._found[0], f"{at.name}, which was the outsider's, was replaced"
        assert at.read_bytes() == self._bytes, f"{at.name}, which was the outsider's, was written to"
        assert self._status(at) == self._found, f"{at.name}, which was the outsider's, was touched"


@contextmanager
def _moves_away(file: Path, room: Path) -> Iterator[None]:
    _run("mv", file, room / "away")
    yield
    assert not os.path.lexists(file), f"{file.name} was made anew"
    _bring_back(room / "away", file)


@contextmanager
def _replaces(file: Path, room: Path) -> Iterator[None]:
    theirs = Theirs(room / "theirs")
    _run("mv", file, room / "away")
    _run("mv", theirs.path, file)
    yield
    theirs.is_untouched(file)
    _run("mv", file, theirs.path)
    _bring_back(room / "away", file)


@contextmanager
def _links(file: Path, room: Path) -> Iterator[None]:
    theirs = Theirs(room / "theirs")
    _run("mv", file, room / "away")
    _run("ln", "-s", theirs.path, file)
    yield
    theirs.is_untouched(theirs.path)
    assert file.is_symlink(), f"{file.name}, a link of the outsider's, is gone"
    file.unlink()
    _bring_back(room / "away", file)


def _bring_back(away: Path, file: Path) -> None:
    """To where it was, if there still is such a folder."""
    if file.parent.exists():
        _run("mv", away, file)


@contextmanager
def _puts_copy(file: Path, room: Path) -> Iterator[None]:
    """The same bytes in another file, as from a backup: what was there is gone for good."""
    _run("cp", "-p", file, room / "copy")
    before = (room / "copy").stat()
    _run("mv", "-f", room / "copy", file)
    yield
    assert file.exists(), f"{file.name}, a copy of the outsider's, is gone"
    found = file.stat()
    assert (found.st_ino, found.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "a copy of theirs was written to"


@contextmanager
def _takes_name(file: Path, room: Path) -> Iterator[None]:
    if file.exists():
        raise Absent
    theirs = Theirs(room / "theirs")
    _run("mv", theirs.path, file)
    yield
    theirs.is_untouched(file)
    _run("mv", file, theirs.path)


# --- who copies, unmounts and fills ---------------------------------------------------------------------------------


@contextmanager
def _copies(file: Path, room: Path) -> Iterator[None]:
    beside = file.with_name(f"{file.name}.bak")
    copied = {}
    for copy in (room / "copy", beside):  # QEMU may write to the file meanwhile
        _run("cp", "-p", file, copy)
        copied[copy] = copy.read_bytes()
    yield
    for copy, content in copied.items():
        assert copy.read_bytes() == content, f"a copy, {copy.name}, was written to"
    beside.unlink()


@contextmanager
def mounted(folder: Path, room: Path, *, size: int) -> Iterator[None]:
    """The folder on a file system of its own of so many MiB, mounted elsewhere, too, from where it can come back."""
    for place in (folder, room):
        place.mkdir(mode=0o700, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size}m,mode=0700", "qmpsnap-faults", folder)
    _run("mount", "--bind", folder, room)
    try:
        yield
    finally:
        for place in (folder, room):
            while os.path.ismount(place) and not subprocess.run(["umount", "-l", place], check=False).returncode:
                pass


@contextmanager
def _unmounts(file: Path, _: Path) -> Iterator[None]:
    folder = _mount_of(file)
    _run("umount", "-l", folder)
    yield
    left = [str(path) for path in folder.rglob("*") if path.is_file()]
    shutil.rmtree(folder / file.parent.name, ignore_errors=True)
    _run("mount", "--bind", folder.with_name("mounted"), folder)
    assert not left, f"made where the file system is not: {left}"


@contextmanager
def _fills(file: Path, _: Path) -> Iterator[None]:
    folder = _mount_of(file)
    ballast, found = folder.with_name("mounted") / "ballast", os.statvfs(folder)
    with ballast.open("wb") as ours:
        os.posix_fallocate(ours.fileno(), 0, max(1, found.f_bavail * found.f_frsize))
    yield
    ballast.unlink()


def _mount_of(file: Path) -> Path:
    if not os.path.ismount(file.parents[1]):
        raise Absent
    return file.parents[1]


KINDS: dict[str, Kind] = {
    "reads": Kind(comes=_reads, harmless=True),
    "reads, locked": Kind(comes=_reads_locked),
    "serves, locked": Kind(comes=_serves),
    "locks by flock": Kind(comes=_flocks, harmless=True),
    "copies": Kind(comes=_copies, harmless=True),
    "holds for writing": Kind(comes=_holds, holds=True),
    "holds for writing, locked": Kind(comes=_holds_locked, holds=True),
    "writes": Kind(comes=_writes, spoils=True),
    "writes, locked": Kind(comes=_writes_locked, spoils=True),
    "writes late": Kind(comes=_writes_late, spoils=True, holds=True),
    "resizes": Kind(comes=_resizes, spoils=True, traces=True),
    "moves away": Kind(comes=_moves_away),
    "replaces": Kind(comes=_replaces),
    "replaces by a link": Kind(comes=_links),
    "puts a copy there": Kind(comes=_puts_copy, spoils=True, traces=True),
    "takes the name": Kind(comes=_takes_name),
    "unmounts": Kind(comes=_unmounts, root=True),
    "fills": Kind(comes=_fills, root=True),
}
"""By what the table of faults calls them."""
