"""Folders and files for this user alone, whatever the umask: one that opens all to others, or shuts ourselves out."""

import os
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing; one that is there stays as it is.

    Raises:
        OSError: one cannot be made, or is no folder.
    """
    missing = [part for part in (path, *path.parents) if not part.exists()]
    for part in reversed(missing):
        try:
            part.mkdir(mode=0o700)
        except FileExistsError:
            continue  # another process was faster
        part.chmod(0o700)
    path.mkdir(exist_ok=True)  # complains if it is something else


def write(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all, over whatever has its name.

    Raises:
        OSError: no right, no space.
    """
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(data)
        fresh.replace(path)
    except OSError:
        fresh.unlink()
        raise
