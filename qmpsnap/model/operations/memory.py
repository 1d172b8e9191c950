"""How a guest's memory is saved beside its disks."""

from msgspec import Struct

from qmpsnap.model.layers.vmstate import Compression, Hardware, Layout, SaveMode


class Means(Struct, frozen=True, kw_only=True):
    """How a machine's memory can be saved.

    ``why`` the guest stands still until all is written; empty for the mode ``background``. ``resume``: the guest ran
    before, and runs on afterwards. ``cancellable``: QEMU survives a save that is cancelled. ``reserve``: bytes the file
    is given before.
    """

    mode: SaveMode
    layout: Layout
    why: str = ""
    hardware: Hardware
    resume: bool
    cancellable: bool = True
    reserve: int = 0


class Memory(Means, frozen=True, kw_only=True):
    """How a guest's RAM and devices go into a state file at the instant of the transaction.

    Attributes:
        path: the finished file; while it is written it has the name ``part``.
        quit: QEMU ends once all is recorded (``save``).
        degrade: if only the memory fails, the disks' part of the snapshot is kept.
        max_pause_ms: the guest is paused no longer than this; None for no limit.
    """

    path: str
    part: str
    compression: Compression
    quit: bool = False
    degrade: bool = False
    max_pause_ms: float | None = None
