"""Snapshots: a named point in time of a machine, and where its content lies."""

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from qmpsnap.errors import NotFoundError
from qmpsnap.hint import call
from qmpsnap.model.layers.vmstate import Hardware, Inside, Vmstate
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.text import nearest
from qmpsnap.model.timestamps import exceeds

SnapshotKind = Literal["disk", "full", "internal", "volume"]
SnapshotState = Literal["ok", "consumed", "overwritten"]
"""``ok``: every point reads as it did at its moment. ``consumed``: a commit overwrote a point; not revertable.
``overwritten``: another program has written to an image that a point reads, as far as times and size tell."""
Level = Literal["crash", "fs", "ram"]
"""``crash``: the disks as after a loss of power. ``fs``: the guest's file systems were frozen, so that they are whole
and have all that was written. ``ram``: the guest's memory is there, too, and it goes on where it was."""
Quiesce = Literal["require", "prefer", "skip"]
"""Whether the guest's file systems are frozen for a snapshot: always, or there is none; if they can be; never."""


class Placed(Protocol):
    """Where one disk's content of a snapshot's moment lies, whatever it was read as."""

    @property
    def disk(self) -> str:
        """Its name."""

    @property
    def layer(self) -> LayerId:
        """The frozen layer, or that with the tag."""

    @property
    def tag(self) -> str | None:
        """Inside that layer."""


class Taken(Protocol):
    """What a snapshot's state is told by, whatever it was read as."""

    @property
    def state(self) -> str:
        """As recorded."""

    @property
    def operation(self) -> OperationId:
        """That took it."""

    @property
    def points(self) -> Sequence[Placed]:
        """One for each of its disks."""


class Point(Struct, frozen=True, kw_only=True):
    """Where one disk's content of a snapshot's moment lies: a frozen layer, or a tag inside a layer."""

    disk: str
    layer: LayerId
    tag: str | None = None


class Outside(Struct, frozen=True):
    """A disk that a snapshot does not have, as QEMU and the machine do not have the same.

    ``file`` is what the device writes to; None of a disk of the machine that was unplugged.
    """

    name: str
    file: str | None = None

    @property
    def sentence(self) -> str:
        """What to say of it."""
        if self.file is None:
            return f"disk {self.name} is not attached to the guest"
        return f"the guest also writes to {self.name} ({self.file}), which is no disk of the machine"


class Snapshot(Struct, frozen=True, kw_only=True):
    """A named point in time of a machine.

    Attributes:
        parent: name of the snapshot the machine stood on when this one was taken, or None.
        created: seconds since the epoch, UTC.
        mode: how it was taken: ``live`` (running guest), ``suspended`` (one that slept), ``paused`` or ``stopped``.
        pause_ms: how long the guest's vCPUs were held, in milliseconds; where they were not, how long QEMU took for the
            disks' transaction, in which it takes no requests. None where no guest ran.
        frozen_ms: from the order to freeze the guest's file systems until its agent had thawed them, in milliseconds:
            who wrote there waited no longer than that. None where nothing was frozen, or nobody knows when it ended.
        max_pause_ms: how long the guest was to be held at most; None where that was not asked for.
        operation: the operation that took it.
        vmstate: the guest's RAM and devices at that instant, in a file; a ``full`` snapshot has it.
        inside: the same inside an image; an ``internal`` snapshot of a guest that had memory.
        level: what can be relied on of what the guest had not written out.
        unquiesced: why its file systems were not frozen, where that was preferred; empty otherwise.
        variables: path of a copy of the UEFI variable store, where the machine has one; a ``full`` snapshot has it in
            its memory, an automatic one if the revert replaced the store.
        pushed: it was taken to be popped, with what is written after it.
        tags: pairs of a key and a value, sorted, for programs to find it by.
        outside: what it has not; told by the call that takes it, not kept.
    """

    name: str
    kind: SnapshotKind
    state: SnapshotState
    parent: str | None
    created: float
    description: str
    mode: str
    points: tuple[Point, ...]
    operation: OperationId
    pause_ms: float | None = None
    vmstate: Vmstate | None = None
    inside: Inside | None = None
    variables: str | None = None
    level: Level = "crash"
    unquiesced: str = ""
    pushed: bool = False
    outside: tuple[Outside, ...] = ()
    frozen_ms: float | None = None
    max_pause_ms: float | None = None
    tags: dict[str, str] = {}

    @property
    def pause_exceeded(self) -> bool:
        """Whether the guest was paused for longer than ``max_pause_ms``."""
        return exceeds(self.pause_ms, self.max_pause_ms)

    @property
    def hardware(self) -> Hardware | None:
        """What its memory presumes; None when it has none."""
        found = self.vmstate or self.inside
        return found.hardware if found else None

    @property
    def confined(self) -> str:
        """A sentence where its memory can only be loaded by the QEMU version that saved it; empty where not."""
        if not self.hardware or not self.hardware.is_confined:
            return ""
        version = ".".join(self.hardware.qemu_version.split(".")[:2])
        return f"only QEMU {version} can load this memory: other versions have another CPU {self.hardware.cpu}"

    def point(self, disk: str) -> Point | None:
        """The point of that disk, or None when the snapshot does not include it."""
        return next((point for point in self.points if point.disk == disk), None)


def require_snapshot(snapshots: Iterable[Snapshot], name: str, *, machine: str) -> Snapshot:
    """The snapshot of that name."""
    known = {snapshot.name: snapshot for snapshot in snapshots}
    if name in known:
        return known[name]
    raise no_snapshot(name, known, machine=machine)


def no_snapshot(name: str, known: Iterable[str], *, machine: str) -> NotFoundError:
    """The error where a machine, which has those that are ``known``, has none of that name."""
    return NotFoundError(
        f"machine {machine} has no snapshot {name!r}{nearest(name, known)}",
        hint=call("snapshots", machine) + " lists them",
        machine=machine,
    )
