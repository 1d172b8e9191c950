"""Who else has an image of a Ceph cluster open, by what the cluster says.

Whoever has an image open watches it, QEMU also where it only reads; who has written holds its exclusive lock. Neither
tells the process. So QEMUs of this host are known by their arguments, and every watcher beyond them is another host's,
or was killed: the cluster forgets such a one only after half a minute. Another cluster can have an image of the same
pool and name, so the configurations are compared, too.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, Literal

from qmpsnap.block.usage.users import Process
from qmpsnap.host import ceph
from qmpsnap.model.machines.rbd import RbdImage


def look(
    path: str, *, readers: bool, ours: Collection[int]
) -> tuple[Literal["writes", "reads"], tuple[Process, ...]] | None:
    """Who writes to an image, or with ``readers`` has it open at all, besides the processes ``ours``; None for nobody.

    Without ``readers`` a QEMU of this host is taken for one that reads a shared base.
    """
    image = RbdImage.parse(path)
    if image is None:
        return None
    watchers = ceph.watchers(image)
    if not watchers:
        return None
    here = [*_here(image)]
    strange = max(0, len(watchers) - len({process.pid for process in here} | {*ours}))
    others = [process for process in here if process.pid not in ours] if readers else []
    if strange and (writers := ceph.writers(image)):
        return "writes", (*others, *_named(writers))
    if readers and (others or strange):
        return "reads", (*others, *_named(watchers if strange else ()))
    return None


def _named(addresses: Collection[str]) -> Iterator[Process]:
    return (Process(f"Ceph client {address}", 0, writes=True) for address in addresses)


def _here(image: RbdImage) -> Iterator[Process]:
    """The QEMUs of this host that were started with the image."""
    named = {key: value for key, value in image.options.items() if key in ("pool", "image", "namespace")}
    names = [
        re.compile(rf'"{key}": ?"{re.escape(value)}"|\b{key}={re.escape(value)}(?=,|\Z)')
        for key, value in named.items()
    ]
    old = re.compile(rf"rbd:{re.escape(str(image))}(?=[:,@]|\Z)")
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            matching = [word for word in words if old.search(word) or all(name.search(word) for name in names)]
            if any(_may_be_of(image, word) for word in matching):
                yield Process((folder / "comm").read_text().strip(), int(folder.name), writes=False)
        except OSError:  # it has ended
            continue


def _may_be_of(image: RbdImage, argument: str) -> bool:
    """Whether an argument of QEMU that names such an image can mean this one's cluster: unless the two clusters differ.

    A configuration that cannot be read, or does not tell its cluster, can be of any.
    """
    found = _CONF.search(argument)
    theirs = next(filter(None, found.groups()), _DEFAULT) if found else _DEFAULT
    ours = image.conf or _DEFAULT
    if theirs == ours:
        return True
    one, other = _fsid(theirs), _fsid(ours)
    return one is None or other is None or one == other


_DEFAULT: Final = "/etc/ceph/ceph.conf"
_CONF: Final = re.compile(r'"conf": ?"([^"]+)"|[:,.]conf=([^:,]+)|\Aconf=([^:,]+)')
_FSID: Final = re.compile(r"^\s*fsid\s*=\s*(\S+)", re.MULTILINE)


def _fsid(conf: str) -> str | None:
    try:
        found = _FSID.search(Path(conf).read_text(errors="replace"))
    except (OSError, ValueError):
        return None
    return found[1].lower() if found else None
