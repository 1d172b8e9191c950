"""Why one of our files could not be written, and what to do about it: asked once it has failed."""

import os
import resource
from pathlib import Path
from typing import NamedTuple

LEAST = 64 << 10
"""Bytes that must be free for small files: SQLite wants 32 KiB before it reads a store that others may write to."""


SPARE = 4
"""Descriptors that a command should have left."""


class Reason(NamedTuple):
    """The end of a sentence, and what to do."""

    what: str
    remedy: str


def reason(place: Path, error: Exception) -> Reason:
    """What keeps us from writing in a folder, or in the nearest above it that there is."""
    if _no_descriptor():
        return Reason("this process has reached its limit of open files", "raise its limit (ulimit -n)")
    return found(place) or Reason(_said(error), f"check the permissions of {_nearest(place)} and its contents")


def found(place: Path) -> Reason | None:
    """The same where it can be seen; None where nothing speaks against it."""
    folder = _nearest(place)
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return Reason(_said(error), f"check {folder} and its file system")
    if status.f_flag & os.ST_RDONLY:
        return Reason(
            "its file system is mounted read-only", f"look for the reason in dmesg, then mount {folder} writable"
        )
    if status.f_bavail * status.f_frsize < LEAST:
        return Reason("the disk is full", f"free some space in {folder}")
    if status.f_files and not status.f_favail:
        return Reason("the file system has no free inode", f"remove unneeded files from the file system of {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Reason("this user has no write permission", f"let this user write to {folder} and its files")
    return None


def _no_descriptor() -> bool:
    """Whether SQLite, which wants some at once, has found none left; what it had is free again."""
    try:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd")) < SPARE  # noqa: PTH208
    except OSError:
        return True


def _nearest(place: Path) -> Path:
    return next((part for part in (place, *place.parents) if part.is_dir()), Path("/"))


def _said(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
