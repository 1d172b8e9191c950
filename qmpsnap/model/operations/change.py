"""What an operation does to the record when it settles, and the new layers it does it with."""

from msgspec import UNSET, Struct, UnsetType

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.adoption import Adoption
from qmpsnap.model.machines.record import Consent, Machine, Origin, Vmgenid
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import LayerId


class Change(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one operation does to the record, applied in one SQL transaction; what is known by id or name is replaced.

    Attributes:
        active: for each disk named, its new active layer.
        renamed: old name to new name of snapshots, done after ``snapshots``.
        removed_snapshots: snapshots that grew from one grow from its parent then.
        removed_layers: nobody may need them any more.
        current: the machine's new current snapshot; unset leaves it.
        consent: what somebody has agreed to now; None leaves what there is.
        origin: what is known of a fork's identity now; None leaves what there is.
        spec: the machine's new spec; the one before is kept for the snapshots that were taken with it.
        vmgenid: the guest's generation ID from now on; None leaves what there is.
        adopted: how somebody else's QEMU of the machine is spoken to, None for one of our own; unset leaves it.
        removed_disks: names of disks that it has no more; their layers stay where others need them.
    """

    define: Machine | None = None
    layers: tuple[Layer, ...] = ()
    active: dict[str, LayerId] = {}
    snapshots: tuple[Snapshot, ...] = ()
    renamed: dict[str, str] = {}
    removed_snapshots: tuple[str, ...] = ()
    removed_layers: tuple[LayerId, ...] = ()
    current: str | UnsetType | None = UNSET
    consent: Consent | None = None
    origin: Origin | None = None
    spec: MachineSpec | None = None
    removed_disks: tuple[str, ...] = ()
    vmgenid: Vmgenid | None = None
    adopted: Adoption | UnsetType | None = UNSET


class Overlay(Struct, frozen=True, kw_only=True):
    """A new empty layer for one disk.

    ``part``: a name of ours that the file has, too, until the operation settles, where a user has chosen its place:
    what is there is ours only if it is the same file. None in the machine's own folder.
    """

    disk: str
    layer: Layer
    backing: Layer
    part: str | None = None
