"""Files out of the way, and never gone: each in a folder of its own, with a note of where it was and why it went."""

import json
import os
import time
from pathlib import Path

from msgspec import Struct

from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.model.finding import Finding
from qmpsnap.model.home import Home
from qmpsnap.ops.checking.facts import Entry

NOTE = "note.json"


class Moved(Struct, frozen=True):
    """A file's old path and its new one."""

    old: str
    new: str


def move(home: Home, finding: Finding, entry: Entry) -> Moved:
    """Move what a finding is about into the machine's quarantine folder, durably.

    Args:
        home: where.
        finding: why.
        entry: the file as it was looked at.

    Raises:
        StoreMismatch: another file has that name by now; it was not touched.
        HostCannot: the quarantine folder lies on another file system, or there is no right or space.
    """
    old = Path(entry.path)
    moment = time.time()
    try:
        folder = _folder(home.quarantine / finding.machine, moment, old.name)
        note = {
            "path": entry.path,
            "code": finding.code,
            "found": finding.text,
            "moved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment)),
            "device": entry.device,
            "inode": entry.inode,
        }
        descriptor = os.open(folder / NOTE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(note, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        found = old.lstat()
        if (found.st_dev, found.st_ino) != (entry.device, entry.inode):
            raise StoreMismatch(f"{old} is another file by now; it was not touched")
        new = folder / "file"
        old.rename(new)
        for place in (folder, folder.parent, old.parent):
            _sync(place)
    except OSError as error:
        raise HostCannot(f"{old} cannot be moved to {home.quarantine}: {error.strerror}") from error
    return Moved(entry.path, str(new))


def _folder(parent: Path, moment: float, name: str) -> Path:
    for place in (parent.parent, parent):
        place.mkdir(mode=0o700, exist_ok=True)
        place.chmod(0o700)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment))
    number = 0
    while True:
        folder = parent / f"{stamp}-{number}-{name[:100]}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            number += 1
        else:
            folder.chmod(0o700)
            return folder


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
