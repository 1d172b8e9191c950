"""Files out of the way, and never gone: each in a folder of its own, with a note of where it was and why it went."""

import contextlib
import errno
import json
import time
from pathlib import Path

from msgspec import Struct

from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.host.files import inode_of, sync_folder, write_new
from qmpsnap.model.finding import Finding
from qmpsnap.model.home import Home
from qmpsnap.model.timestamps import moment
from qmpsnap.ops.check.entries import Entry

NOTE = "note.json"


class Moved(Struct, frozen=True):
    """A file's old path and its new one."""

    old: str
    new: str


def move(home: Home, finding: Finding, entry: Entry) -> Moved:
    """Move what a finding is about into the machine's quarantine folder, durably; another file in its place stays."""
    for place in home.quarantines:
        try:
            return _move(place, finding, entry)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise HostCannot(f"{entry.path} cannot be moved to {place}: {error.strerror}") from error
    raise HostCannot(
        f"{entry.path} is on another file system than {' and '.join(map(str, home.quarantines))}: move it away yourself"
    )


def _move(place: Path, finding: Finding, entry: Entry) -> Moved:
    old = Path(entry.path)
    now = time.time()
    note = {
        "path": entry.path,
        "code": finding.code,
        "found": finding.text,
        "moved": moment(now),
        "device": entry.device,
        "inode": entry.inode,
    }
    folder = _folder(place / finding.machine, now, old.name)
    try:
        write_new(folder / NOTE, json.dumps(note, indent=1).encode() + b"\n")
        _require_same(old, entry)
        old.rename(folder / "file")
    except BaseException:
        # A note of what was not moved would be untrue.
        (folder / NOTE).unlink(missing_ok=True)
        for empty in (folder, *folder.parents[:2]):
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise
    for changed in (folder, folder.parent, old.parent):
        sync_folder(changed)
    return Moved(entry.path, str(folder / "file"))


def _require_same(path: Path, entry: Entry) -> None:
    if inode_of(path.lstat()) != entry.identity:
        raise StoreMismatch(f"{path} was replaced by another file; it was not touched")


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
