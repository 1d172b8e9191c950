"""How the images of machines are, asked aside: storage that hangs costs whoever lists machines a moment, once.

Without asyncio, as ``list`` asks here.
"""

import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from msgspec import Struct

from qmpsnap import identity
from qmpsnap.block import users
from qmpsnap.block.users import User
from qmpsnap.model.chain import Layer
from qmpsnap.model.names import LayerId

DEADLINE: Final = 0.2
"""Seconds for all images of all machines together."""

NOT_ASKED: Final = "not asked"

Stamp = tuple[int, int]
"""Of a frozen image's file: ``st_mtime_ns`` and ``st_size``, which a write to it changes; no clock is asked."""


class Asked(Struct, frozen=True):
    """Which images of a machine are looked at.

    Attributes:
        paths: of each layer that nobody but the machine's QEMU may write to.
        active: those that a guest writes to; empty where its QEMU is known and runs.
        frozen: the frozen ones of which it is recorded what they were then.
        stamps: what that is.
        ours: its processes.
    """

    paths: Mapping[LayerId, str]
    active: frozenset[LayerId]
    frozen: Collection[Layer]
    stamps: Mapping[LayerId, Stamp]
    ours: Collection[int] = ()


class Seen(Struct, frozen=True):
    """What was seen of a machine's images.

    Attributes:
        users: who else writes to them.
        changed: the frozen ones that something has written to since.
        unsaid: nobody could be asked about one.
        asked: the answer came in time.
    """

    users: Mapping[LayerId, User] = {}
    changed: tuple[LayerId, ...] = ()
    unsaid: bool = False
    asked: bool = True
    active: frozenset[LayerId] = frozenset()

    @property
    def word(self) -> str:
        """``ok``, ``in use``, ``overwritten``, ``unknown`` or ``not asked``: the worst that holds."""
        if not self.asked:
            return NOT_ASKED
        if self.users:
            return "in use"
        return "overwritten" if self.changed else "unknown" if self.unsaid else "ok"

    @property
    def unseen(self) -> bool:
        """Whether a process that cannot be seen from here has an active image open: it may be the machine's QEMU."""
        return any(layer in self.active and not user.by for layer, user in self.users.items())


def look(at: Asked) -> Seen:
    """Ask the files; may hang where their storage does."""
    found: dict[LayerId, User] = {}
    unsaid = False
    for layer, path in at.paths.items():
        try:
            if user := users.user(path, ours=at.ours):
                found[layer] = user
        except OSError:
            unsaid = True
    return Seen(found, changed(at.frozen, at.stamps), unsaid, active=at.active)


def changed(layers: Iterable[Layer], stamps: Mapping[LayerId, Stamp]) -> tuple[LayerId, ...]:
    """Those of the layers whose own files are there and have another time or size than these."""
    return tuple(
        layer.id for layer in layers if layer.id in stamps and (now := stamp(layer)) and now != stamps[layer.id]
    )


def stamp(layer: Layer) -> Stamp | None:
    """A layer's; None where another file or none has its name, or a block device, whose node does not tell."""
    try:
        descriptor = os.open(layer.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not identity.same_file(layer, identity.of(descriptor)):
            return None
        return status.st_mtime_ns, status.st_size
    finally:
        os.close(descriptor)


def glance(wanted: Mapping[str, Asked]) -> dict[str, Seen]:
    """Look at the images of many machines, each in a thread of its own, and wait :data:`DEADLINE` at most for all."""
    found: dict[str, Seen] = {}

    def work(name: str, at: Asked) -> Callable[[], None]:
        return lambda: found.__setitem__(name, look(at))

    threads = [threading.Thread(target=work(name, at), daemon=True) for name, at in wanted.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + DEADLINE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    seen = dict(found)
    return {name: seen.get(name, Seen(asked=False)) for name in wanted}
