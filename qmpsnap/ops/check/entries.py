"""What lies in the folders of a home, as `check` sees it."""

import os
import stat
from pathlib import Path

from msgspec import Struct

from qmpsnap.host.files import Inode
from qmpsnap.ops.base import admission
from qmpsnap.volumes.names import of_path


class Entry(Struct, frozen=True, kw_only=True):
    """Something in a folder, not what a link leads to; ``others``: what neither owner nor QEMU's user need to do."""

    path: str
    mode: int
    others: int
    device: int
    inode: int

    @property
    def identity(self) -> Inode:
        """What it is, whatever leads to it."""
        return self.device, self.inode

    @property
    def is_open(self) -> bool:
        """Whether others than its owner may touch it."""
        return not stat.S_ISLNK(self.mode) and bool(self.others)


def within(folder: Path, trusted: frozenset[int] = frozenset()) -> tuple[Entry, ...]:
    """What lies in a folder, by name; nothing where there is none. It may be open to users who are trusted."""
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 - as text
    except OSError:
        return ()
    return tuple(each for name in names if (each := entry(f"{folder}/{name}", trusted)))


def once(found: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Each file once, where its folder has been looked at by two names."""
    first: dict[tuple[Inode, str], Entry] = {}
    for each in found:
        first.setdefault((each.identity, Path(each.path).name), each)
    return tuple(first.values())


def parts_beside(paths: list[str]) -> tuple[Entry, ...]:
    """Unfinished files that an operation may have left beside files at chosen places."""
    found: dict[str, Entry] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        for each in within(Path(folder)):
            rest = each.path.removeprefix(f"{folder}/{name}.")
            if (
                rest != each.path
                and rest.endswith(".part")
                and rest.removesuffix(".part").removeprefix("qs-").isalnum()
            ):
                found[each.path] = each
    return tuple(found.values())


def entry(path: str, trusted: frozenset[int] = frozenset()) -> Entry | None:
    """One of that name; None where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    others = admission.others(path, status, trusted)
    return Entry(path=path, mode=status.st_mode, others=others, device=status.st_dev, inode=status.st_ino)


def volumes_beside(paths: list[str], machine: str) -> tuple[Entry, ...]:
    """Files beside images at chosen places whose name says that they are snapshots or clones of that machine's disks.

    ``machine`` is its uuid.
    """
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    found = [(each, of_path(each.path)) for folder in folders for each in within(Path(folder))]
    return tuple(each for each, name in found if name and name.machine == machine.replace("-", ""))
