"""One controller at a time per machine: an advisory lock that ends with its holder, however that ends."""

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from qmpsnap.errors import HostCannot, LockHeld, OperationPending
from qmpsnap.hint import call
from qmpsnap.host import files, storage_wait, write_errors
from qmpsnap.host.outstanding import Cover, briefly
from qmpsnap.model.timestamps import moment

_TELLING: Final = 1.0
"""Seconds that the note in the lock may take; the lock itself may be on storage that hangs."""


@contextmanager
def machine_lock(path: Path, *, machine: str, verb: str, cover: Cover | None = None) -> Iterator[None]:
    """Hold the machine's lock for the block.

    The holder's name stands in the lock file itself, so who holds it and since when can be told without the store, and
    it can never outlive the lock by more than a glance: only who fails to get the lock reads it. ``cover`` is the file
    work of the block; the lock is held on while a thread of it hangs: then ``OperationPending`` is raised, not
    ``LockHeld``.
    """
    descriptor = _acquire(path, machine)
    owner = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.time(), "verb": verb}
    try:
        _write(descriptor, owner)
        yield
    finally:
        if cover is None:
            os.close(descriptor)
        else:
            if hangs := cover.hangs:
                briefly(lambda: _write(descriptor, {**owner, "hangs": hangs.message}), None, seconds=_TELLING)
            cover.release(lambda: os.close(descriptor))


def _write(descriptor: int, owner: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is for others to read; on a full disk, too, there are things to do
        # Over the last note, and blanks over its end: ext4 writes a file out at once that was cut and filled again.
        os.pwrite(descriptor, json.dumps(owner).encode().ljust(os.fstat(descriptor).st_size), 0)


def _acquire(path: Path, machine: str) -> int:
    while True:
        try:
            descriptor = _open(path)
        except OSError as error:
            what, remedy = write_errors.reason(path.parent, error)
            raise HostCannot(
                f"the lock {path} of machine {machine} cannot be opened: {what}",
                hint=remedy,
                machine=machine,
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            noted = _noted(descriptor)
            owner, hangs = _describe(noted), _hangs(noted)
            os.close(descriptor)
            if hangs:
                raise OperationPending(
                    f"{owner} of machine {machine} is stuck: {hangs}",
                    hint="once that storage answers, " + call("recover", machine),
                    machine=machine,
                ) from None
            raise LockHeld(
                f"machine {machine} is in use by {owner}",
                hint="try again when it has ended, or cancel it with Ctrl-C or kill -INT",
                machine=machine,
            ) from None
        # `undefine` removes the file while it holds the lock: what we locked may no longer be what others will open.
        if files.leads_to(path, descriptor):
            _require_plain(descriptor, path, machine)
            return descriptor
        os.close(descriptor)


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        files.make_folder(path.parent)
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS or not path.exists():
            raise
    return os.open(path, os.O_RDONLY | flags)  # what cannot be written can be locked


def _require_plain(descriptor: int, path: Path, machine: str) -> None:
    """We write our name into it: it must be no second name of somebody's file."""
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        if status.st_uid == os.geteuid():
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, 0o600)  # a strange umask may have taken our own rights away
        return
    os.close(descriptor)
    raise HostCannot(
        f"the lock {path} of machine {machine} is not a regular file of its own",
        hint=f"remove it: {path}",
        machine=machine,
    )


def _noted(descriptor: int) -> dict[str, Any]:
    """What the holder has written down of itself; nothing where it has not yet."""
    try:
        noted = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _describe(noted: dict[str, Any]) -> str:
    try:
        return f"'{noted['verb']}' (pid {noted['pid']} on {noted['host']}) since {moment(noted['since'])}"
    except (ValueError, KeyError, TypeError, OverflowError):
        return "another controller that has just started"


def _hangs(noted: dict[str, Any]) -> str | None:
    """What the holder has said of storage that hangs, or shows: it was ended and cannot end."""
    said = noted.get("hangs")
    with contextlib.suppress(KeyError, ValueError, TypeError, OSError):
        if said is None and noted["host"] == os.uname().nodename and (wait := storage_wait.keeps(noted["pid"])):
            said = f"it was ended, and storage does not answer: {wait}"
    return said if isinstance(said, str) else None


def holder(path: Path) -> str | None:
    """Who holds the lock of a machine now, without trying to take it: nobody is ever refused because we looked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        inode = os.fstat(descriptor).st_ino
        # Some file systems have another device number there than stat(2) tells: the holder's pid decides instead.
        with Path("/proc/locks").open() as locks:
            held = {
                int(fields[4]) for line in locks if (fields := line.split())[1:4] == ["FLOCK", "ADVISORY", "WRITE"]
                and fields[5].rpartition(":")[2] == str(inode)
            }  # fmt: skip
        noted = _noted(descriptor)
        return _describe(noted) if noted.get("pid") in held else None
    except (OSError, ValueError, TypeError, IndexError):
        return None
    finally:
        os.close(descriptor)
