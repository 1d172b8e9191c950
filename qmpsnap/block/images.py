"""How the images of machines are, asked aside: storage that hangs costs whoever lists machines a moment, once.

Without asyncio, as ``list`` asks here.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from msgspec import Struct

from qmpsnap.block import stamps, users
from qmpsnap.block.stamps import Trouble
from qmpsnap.block.users import User
from qmpsnap.model.chain import Layer
from qmpsnap.model.names import LayerId
from qmpsnap.model.stamp import History

DEADLINE: Final = 0.2
"""Seconds for all images of all machines together."""

NOT_ASKED: Final = "not asked"


class Asked(Struct, frozen=True):
    """Which images of a machine are looked at.

    Attributes:
        paths: of each layer that nobody but the machine's QEMU may write to.
        active: those that a guest writes to; empty where its QEMU is known and runs.
        frozen: the frozen ones of which it is recorded what they were then.
        stamps: what that is.
        ours: its processes.
        layers: those whose files have to be the recorded ones.
    """

    paths: Mapping[LayerId, str]
    active: frozenset[LayerId]
    frozen: Collection[Layer]
    stamps: Mapping[LayerId, History]
    ours: Collection[int] = ()
    layers: Collection[Layer] = ()


class Seen(Struct, frozen=True):
    """What was seen of a machine's images.

    Attributes:
        users: who else writes to them.
        changed: the frozen ones that something has written to since they were recorded, and when that was.
        unsaid: nobody could be asked about one.
        asked: the answer came in time.
        gone: those that are not there, or are other files.
    """

    users: Mapping[LayerId, User] = {}
    changed: Mapping[LayerId, frozenset[int]] = {}
    unsaid: bool = False
    asked: bool = True
    active: frozenset[LayerId] = frozenset()
    gone: Mapping[LayerId, Trouble] = {}

    @property
    def word(self) -> str:
        """The worst that holds: ``missing``, ``replaced``, ``in use``, ``overwritten``, ``unknown``; ``not asked``."""
        if not self.asked:
            return NOT_ASKED
        if self.gone:
            return min(self.gone.values())
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
    gone: dict[LayerId, Trouble] = {}
    unsaid = False
    for recorded in at.layers:
        try:
            if trouble := stamps.trouble(recorded):
                gone[recorded.id] = trouble
        except OSError:
            unsaid = True
    for layer, path in at.paths.items():
        try:
            if user := users.user(path, ours=at.ours):
                found[layer] = user
        except OSError:
            unsaid = True
    return Seen(found, stamps.changed(at.frozen, at.stamps), unsaid, active=at.active, gone=gone)


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
