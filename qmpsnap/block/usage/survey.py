"""The state of machines' images, examined in another process: storage that hangs delays ``list`` once and briefly.

Without asyncio, as ``list`` asks here.
"""

from __future__ import annotations

import marshal
import os
from _thread import allocate_lock, start_new_thread

from qmpsnap.block.usage import stamps
from qmpsnap.host import aside, files
from qmpsnap.host.value import Value, replaced
from qmpsnap.model.layers.stamp import baseline

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Collection, Iterable, Mapping
    from typing import Any, Final

    from qmpsnap.block.usage.stamps import Trouble
    from qmpsnap.block.usage.users import User
    from qmpsnap.model.layers.chain import Image
    from qmpsnap.model.layers.reads import Reads
    from qmpsnap.model.layers.snapshot import Taken
    from qmpsnap.model.layers.stamp import History
    from qmpsnap.model.names import LayerId

DEADLINE = 0.2
"""Seconds for all images of all machines together."""

MANY = 1000
"""Images, of all machines, above which a list of the machines looks only at those that guests write to."""

NOT_ASKED: Final = "not asked"


class Asked(Value):
    """Which images of a machine are looked at.

    ``paths`` are of each layer that nobody but the machine's QEMU, ``ours``, may write to; ``active`` those that a
    guest writes to, empty where its QEMU is known and runs; ``frozen`` those of which ``stamps`` records what they were
    then; ``layers`` those whose files have to be the recorded ones.
    """

    paths: Mapping[LayerId, str]
    active: frozenset[LayerId]
    frozen: Collection[Image]
    stamps: Mapping[LayerId, History]
    ours: Collection[int] = ()
    layers: Collection[Image] = ()


class Seen(Value):
    """What was seen of a machine's images; ``asked``: the answer came in time.

    ``users`` write to them as well; ``changed`` are the frozen ones that something has written to since they were
    recorded, and when that was; ``gone`` those that are not there, or are other files. ``unsaid``: nobody could be
    asked about one; ``whole``: all images were looked at.
    """

    users: Mapping[LayerId, User] = {}
    changed: Mapping[LayerId, frozenset[int]] = {}
    unsaid: bool = False
    asked: bool = True
    active: frozenset[LayerId] = frozenset()
    gone: Mapping[LayerId, Trouble] = {}
    whole: bool = True

    @property
    def word(self) -> str:
        """The worst that holds: ``missing``, ``replaced``, ``in use``, ``overwritten``, ``unknown``; ``not asked``."""
        if not self.asked:
            return NOT_ASKED
        if self.gone:
            return min(self.gone.values())
        if self.users:
            return "in use"
        if self.changed:
            return "overwritten"
        return "unknown" if self.unsaid else "ok" if self.whole else NOT_ASKED

    @property
    def unseen(self) -> bool:
        """Whether a process that cannot be seen from here has an active image open: it may be the machine's QEMU."""
        return any(layer in self.active and not user.by for layer, user in self.users.items())


def wanted(reads: Reads, pid: int | None, *, active_too: bool = False) -> Asked:
    """What there is to ask of the images that a machine reads; ``pid`` is its QEMU's.

    Who else has an active image open that this QEMU has, too, takes a look through all processes: for ``active_too``.
    """
    images, active = reads.images, reads.active
    known = {layer: stamp for layer, stamp in reads.stamps.items() if layer not in active}
    return Asked(
        paths={
            key: image.path
            for key, image in images.items()
            if active_too or not ((pid and key in active) or image.storage == "rbd")  # a list cannot wait for a cluster
        },
        active=frozenset() if pid else active,
        frozen=[images[layer] for layer in known],
        stamps=known,
        ours=() if pid is None else (pid,),
        layers=tuple(images.values()),
    )


def frozen_in(reads: Reads, snapshots: Iterable[Taken]) -> Asked:
    """What there is to ask of the images that snapshots read, without who has them open."""
    below = reads.below(point.layer for snapshot in snapshots for point in snapshot.points)
    asked = wanted(reads, None)
    return replaced(
        asked,
        paths={},
        active=frozenset(),
        frozen=[image for image in asked.frozen if image.id in below],
        layers=[image for image in asked.layers if image.id in below],
    )


def taken_as(snapshot: Taken, reads: Reads, seen: Seen) -> str:
    """A snapshot's state by the record, or where that is ``ok`` what a look at its files has found instead."""
    if snapshot.state != "ok" or not (seen.gone or seen.changed):
        return snapshot.state
    below = reads.below(point.layer for point in snapshot.points)
    if gone := {seen.gone[layer] for layer in below if layer in seen.gone}:
        return min(gone)
    for layer in below & seen.changed.keys():
        then = baseline(reads.stamps.get(layer, ()), snapshot.operation)
        if then and then.since in seen.changed[layer]:
            return "overwritten"
    return "ok"


def look(at: Asked) -> Seen:
    """Ask the files; may hang where their storage does."""
    gone: dict[LayerId, Trouble] = {}
    unsaid = False
    untouched = set()
    for image in at.layers:
        try:
            if stamps.is_untouched(image, at.stamps.get(image.id, ())):
                untouched.add(image.id)
            elif trouble := stamps.trouble(image):
                gone[image.id] = trouble
        except OSError:
            unsaid = True
    changed = stamps.changed((image for image in at.frozen if image.id not in untouched), at.stamps)
    held: dict[LayerId, User] = {}
    if at.paths:
        from qmpsnap.block.usage import users

        asked = users.look(at.paths.values(), ours=at.ours)
        held = {layer: asked.users[path] for layer, path in at.paths.items() if path in asked.users}
        unsaid = unsaid or asked.unsaid
    return Seen(held, changed, unsaid, active=at.active, gone=gone)


def glance(wanted: Mapping[str, Asked]) -> dict[str, Seen]:
    """Look at the images of many machines at once, and wait :data:`DEADLINE` at most for all.

    A process of its own looks, with a thread for each machine: one that hangs could not end, and nobody waits for it.
    """
    found: dict[str, Seen] = {}
    _load_for(wanted.values())
    said = aside.asked(lambda tell: _tell(wanted, tell), seconds=DEADLINE) if wanted else b""
    while len(said) >= _SIZE + (length := int.from_bytes(said[:_SIZE], "big")) > _SIZE:
        name, *seen = marshal.loads(said[_SIZE : _SIZE + length])  # noqa: S302 - what a copy of this process says
        found[name], said = _seen(*seen), said[_SIZE + length :]
    return {name: found.get(name, Seen(asked=False)) for name in wanted}


def _load_for(wanted: Iterable[Asked]) -> None:
    """Load what the helper will need: in a copy of this process that takes half as long again."""
    for at in wanted:
        if at.paths:
            from qmpsnap.block.usage import users  # noqa: F401
        if any(image.birth and image.id not in at.stamps for image in at.layers):
            files.know_births()
            return


_SIZE: Final = 4
"""Bytes before each answer, which say how long that is."""


def _tell(wanted: Mapping[str, Asked], tell: int) -> None:
    """The helper's part: an answer for each machine as soon as it is known."""
    telling = allocate_lock()

    def work(name: str, at: Asked, done: LockType) -> None:
        try:
            answer = marshal.dumps((name, *_plain(look(at))))
            # At most one answer at a time, each with one write that no other can come into.
            with telling:
                _write(tell, len(answer).to_bytes(_SIZE, "big") + answer)
        finally:
            done.release()

    begun = []
    for name, at in wanted.items():
        begun.append(done := allocate_lock())
        done.acquire()
        if len(wanted) == 1:
            work(name, at, done)
        else:
            start_new_thread(work, (name, at, done))
    for done in begun:
        done.acquire()


def _plain(seen: Seen) -> tuple[Any, ...]:
    by = {layer: [(one.name, one.pid, one.writes) for one in user.by] for layer, user in seen.users.items()}
    held = {layer: (user.path, user.how, by[layer]) for layer, user in seen.users.items()}
    return held, dict(seen.changed), seen.unsaid, seen.active, dict(seen.gone)


def _seen(held: Any, changed: Any, unsaid: Any, active: Any, gone: Any) -> Seen:
    if not held:
        return Seen({}, changed, unsaid, active=active, gone=gone)
    from qmpsnap.block.usage.users import Process, User

    by = {layer: User(path, how, tuple(Process(*one) for one in by)) for layer, (path, how, by) in held.items()}
    return Seen(by, changed, unsaid=unsaid, active=active, gone=gone)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
