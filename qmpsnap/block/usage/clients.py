"""Who else has an image of a Ceph cluster open, by what the cluster says.

Whoever has an image open watches it, QEMU also where it only reads; who has written holds its exclusive lock. Neither
tells the process. So QEMUs of this host are known by their arguments, and every watcher beyond them is another host's,
or was killed: the cluster forgets such a one only after half a minute.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

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
            if any(old.search(word) or all(name.search(word) for name in names) for word in words):
                yield Process((folder / "comm").read_text().strip(), int(folder.name), writes=False)
        except OSError:  # it has ended
            continue
