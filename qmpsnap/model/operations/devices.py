"""Plans that give a machine one more disk or network card, or take one from it."""

from msgspec import Struct

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, NicSpec
from qmpsnap.model.operations.change import Change, Overlay


class AttachPlan(Struct, frozen=True, kw_only=True, tag="disk-attach"):
    """Give a machine one more disk.

    Attributes:
        disk: as the machine's spec has it afterwards.
        images: the new image, for a disk that begins empty.
        overlays: the new overlay, for one on a base.
        layers: its chain, base first.
        live: a QEMU runs, into which it is plugged.
        change: the new spec, and the layers that are new to the store.
    """

    machine: str
    disk: DiskSpec
    images: tuple[Layer, ...]
    overlays: tuple[Overlay, ...]
    layers: tuple[Layer, ...]
    live: bool
    change: Change

    @property
    def created(self) -> tuple[Layer, ...]:
        """Every layer whose file this plan makes."""
        return (*self.images, *(overlay.layer for overlay in self.overlays))


class DetachPlan(Struct, frozen=True, kw_only=True, tag="disk-detach"):
    """Take a disk from a machine; no file is removed.

    Attributes:
        layers: its chain, base first.
        live: a QEMU runs, whose guest has to let go of it.
        change: the new spec, and the automatic snapshot that keeps an active layer of our own.
    """

    machine: str
    disk: str
    layers: tuple[Layer, ...]
    live: bool
    change: Change

    @property
    def kept(self) -> str | None:
        """Name of the automatic snapshot that keeps what the guest wrote; None for an image that is not ours."""
        return self.change.snapshots[0].name if self.change.snapshots else None


class AttachNicPlan(Struct, frozen=True, kw_only=True, tag="nic-attach"):
    """Give a machine one more network card.

    Attributes:
        number: by which QEMU knows it.
        nic: as the machine's spec has it afterwards.
        live: a QEMU runs, into which it is plugged.
        change: the new spec.
    """

    machine: str
    number: int
    nic: NicSpec
    live: bool
    change: Change


class DetachNicPlan(Struct, frozen=True, kw_only=True, tag="nic-detach"):
    """Take a network card from a machine; as :class:`AttachNicPlan`."""

    machine: str
    number: int
    nic: NicSpec
    live: bool
    change: Change
