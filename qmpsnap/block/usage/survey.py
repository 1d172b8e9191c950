"""The state of machines' images, examined in another process: storage that hangs delays ``list`` once and briefly.

Without asyncio, as ``list`` asks here.
"""

import os
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Final

import msgspec
from msgspec import Struct

from qmpsnap.block.usage import stamps, users
from qmpsnap.block.usage.stamps import Trouble
from qmpsnap.block.usage.users import User
from qmpsnap.host import aside
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.stamp import History
from qmpsnap.model.names import LayerId

DEADLINE = 0.2
"""Seconds for all images of all machines together."""

NOT_ASKED: Final = "not asked"


class Asked(Struct, frozen=True):
    """Which images of a machine are looked at.

    ``paths`` are of each layer that nobody but the machine's QEMU, ``ours``, may write to; ``active`` those that a
    guest writes to, empty where its QEMU is known and runs; ``frozen`` those of which ``stamps`` records what they were
    then; ``layers`` those whose files have to be the recorded ones.
    """

    paths: Mapping[LayerId, str]
    active: frozenset[LayerId]
    frozen: Collection[Layer]
    stamps: Mapping[LayerId, History]
    ours: Collection[int] = ()
    layers: Collection[Layer] = ()


class Seen(Struct, frozen=True):
    """What was seen of a machine's images; ``asked``: the answer came in time.

    ``users`` write to them as well; ``changed`` are the frozen ones that something has written to since they were
    recorded, and when that was; ``gone`` those that are not there, or are other files. ``unsaid``: nobody could be
    asked about one.
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
    gone: dict[LayerId, Trouble] = {}
    unsaid = False
    for recorded in at.layers:
        try:
            if trouble := stamps.trouble(recorded):
                gone[recorded.id] = trouble
        except OSError:
            unsaid = True
    asked = users.look(at.paths.values(), ours=at.ours)
    found = {layer: asked.users[path] for layer, path in at.paths.items() if path in asked.users}
    return Seen(found, stamps.changed(at.frozen, at.stamps), unsaid or asked.unsaid, active=at.active, gone=gone)


def glance(wanted: Mapping[str, Asked]) -> dict[str, Seen]:
    """Look at the images of many machines at once, and wait :data:`DEADLINE` at most for all.

    A process of its own looks, with a thread for each machine: one that hangs could not end, and nobody waits for it.
    """
    found: dict[str, Seen] = {}
    said = aside.asked(lambda tell: _tell(wanted, tell), seconds=DEADLINE) if wanted else b""
    for line in said.splitlines(keepends=True):
        if line.endswith(b"\n"):
            found.update(_DECODER.decode(line))
    return {name: found.get(name, Seen(asked=False)) for name in wanted}


_DECODER: Final = msgspec.json.Decoder(dict[str, Seen])


def _tell(wanted: Mapping[str, Asked], tell: int) -> None:
    """The helper's part: a line for each machine as soon as it is known."""

    def work(name: str, at: Asked) -> Callable[[], None]:
        # At most one line at a time, each with one write that no other can come into.
        return lambda: _write(tell, lock, msgspec.json.encode({name: look(at)}) + b"\n")

    lock = threading.Lock()
    threads = [threading.Thread(target=work(name, at), daemon=True) for name, at in wanted.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _write(descriptor: int, lock: threading.Lock, data: bytes) -> None:
    with lock:
        while data:
            data = data[os.write(descriptor, data) :]
