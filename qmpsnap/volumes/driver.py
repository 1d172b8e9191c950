"""What a storage driver has to do: six verbs, which take and return values, and a rule for names.

Common to all verbs, and what every driver is tested for:

- No shell. A program is given an argument list, in which no name of ours can be taken for an option; it is run by
  :func:`qmpsnap.host.programs.running`, prints JSON where it can, and ends by a deadline of the driver's. File work
  runs by :func:`qmpsnap.host.threads.to_end`, which gives hanging storage up.
- A verb that raises has left nothing that counts: at most a volume that :meth:`Driver.list` shows as ``part``, or a
  whole one under the very name it was asked for, where the outcome was not heard. The caller asks ``list`` which.
- Nothing of another's is changed or removed: the name tells whose a volume is, its identity which one it is.

Errors, all :class:`qmpsnap.errors.QmpsnapError` with effect ``none`` where it is certain that nothing changed, else
``unknown``: ``HostCannot`` (no program, no right, no space, a pool that is full), ``StoreMismatch`` (another volume
under that name, the origin is not the recorded one), ``StateError`` (clones depend on it), ``ImageInUse``,
``NotFoundError`` (the origin or snapshot is gone), ``DeadlinePassed`` or ``StorageHangs`` (no answer in time).
"""

from typing import Literal, Protocol

from msgspec import Struct

from qmpsnap.model.machines.spec import Format
from qmpsnap.volumes.names import VolumeName

DriverName = Literal["reflink", "lvm", "rbd"]
VolumeState = Literal["ok", "part", "invalid"]
"""``ok``: whole and durable. ``part``: its making was interrupted; it is to be removed. ``invalid``: the storage has
given its content up, as a thick LVM snapshot that has run full."""


class Volume(Struct, frozen=True, kw_only=True):
    """A volume as a driver works on it: the image of a layer, a snapshot, or a clone.

    Attributes:
        path: as the layer has it: the absolute path of a file, ``/dev/VG/LV``, or the RBD image's own notation. A
            driver's snapshot of an RBD image has the notation with ``@SNAP``.
        format: of the image inside; raw on block and RBD.
        device: ``st_dev`` of a file, with ``inode`` and ``birth`` its identity; 0 for what is no file.
        inode: ``st_ino`` of a file.
        birth: in nanoseconds; 0 where nobody knows.
        identity: what tells it from another with that path, where it is no file: an LV's uuid; the cluster's fsid,
            pool, image id and snapshot id. Empty for files.
        bytes: its size as the guest or QEMU sees it; of a file that of the file.
        name: what its name says; None for an origin that qmpsnap did not make.
        state: see :data:`VolumeState`.
    """

    path: str
    format: Format = "raw"
    device: int = 0
    inode: int = 0
    birth: int = 0
    identity: str = ""
    bytes: int = 0
    name: VolumeName | None = None
    state: VolumeState = "ok"


class Ability(Struct, frozen=True, kw_only=True):
    """Whether a driver can snapshot a volume, and what that costs; told before anything is touched.

    Attributes:
        why: one clause why it cannot; empty where it can.
        remedy: what would help, a :class:`~qmpsnap.hint.Hint` where that is a verb.
        reserve: bytes that a snapshot takes at once: of a thick LVM snapshot its whole size.
        clone_moves: bytes that a clone copies, at most; 0 where it shares them.
        note: a sentence for the dry run, as what the reserve was computed from; empty if there is nothing to say.
    """

    why: str = ""
    remedy: str = ""
    reserve: int = 0
    clone_moves: int = 0
    note: str = ""

    @property
    def able(self) -> bool:
        """Whether it can."""
        return not self.why


class Size(Struct, frozen=True, kw_only=True):
    """Bytes that a volume occupies: ``own`` are freed if it is removed, where the storage tells; else an upper bound.

    ``full``: how much of its reserve a thick snapshot has used, from 0 to 1; it is invalid at 1. None for the others.
    """

    own: int
    full: float | None = None


class Driver(Protocol):
    """One kind of storage.

    The implementation is a frozen value that is made per request, with the settings of that request (the size of a
    thick snapshot ...); it holds no connection.
    """

    @property
    def name(self) -> DriverName:
        """As messages and documents have it."""

    def where(self, near: Volume, name: VolumeName) -> str:
        """The path that a snapshot or clone of ``near`` will have; pure, so that a plan can tell it."""

    async def probe(self, origin: Volume | None) -> Ability:
        """Whether the origin can be snapshotted; without one, whether this host has what the driver needs.

        Changes nothing that lasts; a reflink is found out by trying it on a file of its own, and remembered by device.
        Raises only what keeps it from being found out.
        """

    async def snapshot(self, origin: Volume, name: VolumeName) -> Volume:
        """Keep what the origin holds now; nobody writes to it meanwhile, and all of it is flushed.

        The snapshot is durable and complete when this returns: also its name is on the disk. Refused if the name is
        taken.
        """

    async def clone(self, snapshot: Volume, name: VolumeName) -> Volume:
        """A writable volume with the snapshot's content, durable when this returns. Refused if the name is taken."""

    async def remove(self, volume: Volume) -> None:
        """Remove a snapshot or clone of ours, or a part of one; fine if it is gone already.

        ``StoreMismatch`` if another volume has its name; ``StateError`` with the names of the clones that depend on it.
        """

    async def list(self, near: Volume, machine: str) -> tuple[Volume, ...]:
        """The machine's snapshots and clones where ``near`` lies (its folder, volume group, pool), by their names.

        ``machine`` is a uuid as in :class:`VolumeName`. Includes parts and invalid ones; ``near`` need not exist.
        """

    async def size(self, volume: Volume) -> Size:
        """What a snapshot or clone occupies now. ``NotFoundError`` if it is not there."""
