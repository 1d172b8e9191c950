"""Layers and chains: one disk's images from its base up to where the guest writes."""

from typing import TYPE_CHECKING, Final, Literal, Protocol, Self

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import NotFoundError
from qmpsnap.hint import call
from qmpsnap.model.machines.rbd import shown
from qmpsnap.model.machines.spec import Format, Storage
from qmpsnap.model.names import LayerId

LayerState = Literal["ok", "hidden", "consumed", "shield"]
"""``ok``: in use or kept for a snapshot. ``hidden``: kept only because another layer reads it.
``consumed``: its content was overwritten by a commit. ``shield``: a guest writes to it only until the storage has made
a snapshot of the layer below; then it is committed into that one."""


MAX_LAYERS: Final = 256
"""Layers a chain may have, made or found: headers are followed no deeper, so none is made that could not be read again.
"""


if TYPE_CHECKING:
    from qmpsnap.host.files import Identified

    class Image(Identified, Protocol):
        """What is recorded of a layer's file."""

        @property
        def id(self) -> LayerId:
            """Of the layer."""

        @property
        def path(self) -> str:
            """Absolute."""

        @property
        def format(self) -> Format:
            """Of the image."""

        @property
        def storage(self) -> Storage:
            """What the image lies in."""


class Layer(Struct, frozen=True, kw_only=True):
    """One image: a file, a block device, or an image of a Ceph cluster.

    Attributes:
        id: unique in the store; also the node name in QEMU.
        path: the very string that QEMU and the overlay's header are given: an absolute path, or for ``rbd`` QEMU's
            ``json:`` name.
        backing: the layer below, or None at the base.
        virtual_size: bytes the guest sees.
        device: ``st_dev`` of the file when it was recorded; with ``inode`` its identity.
        inode: ``st_ino`` of the file.
        birth: when the file was born, by its file system, in nanoseconds since the epoch; 0 where that does not say.
        owned: qmpsnap created the file; only owned files are ever removed.
        storage: QEMU's protocol driver for it. What is no file is the machine's to write to, though not ours.
        identity: of what is no file, and empty for files: ``lvm:UUID``, ``rbd:FSID/POOL/IMAGE``, ``wwn:...``; it holds
            from boot to boot, so that device and inode are 0.
    """

    id: LayerId
    path: str
    format: Format
    backing: LayerId | None
    virtual_size: int
    device: int = 0
    inode: int = 0
    birth: int = 0
    owned: bool = True
    state: LayerState = "ok"
    storage: Storage = "file"
    identity: str = ""

    @property
    def writable(self) -> bool:
        """Whether a job may write to it."""
        return self.owned or self.storage != "file"

    @property
    def shown(self) -> str:
        """Its name for people."""
        return shown(self.path)


class Chain(Struct, frozen=True):
    """The layers of one disk, base first; the last one is active."""

    disk: str
    layers: tuple[Layer, ...]

    @property
    def active(self) -> Layer:
        """The layer the guest writes to."""
        return self.layers[-1]

    @property
    def shielded(self) -> Layer | None:
        """The layer below a shield that the guest writes to; None where there is no shield."""
        return self.layers[-2] if self.active.state == "shield" and len(self.layers) > 1 else None

    @property
    def base(self) -> Layer:
        """The lowest layer."""
        return self.layers[0]

    @property
    def ids(self) -> tuple[LayerId, ...]:
        """The layers' ids, base first: what two chains are compared by."""
        return tuple(layer.id for layer in self.layers)

    def layer(self, layer_id: str) -> Layer:
        """The layer of that id."""
        for layer in self.layers:
            if layer.id == layer_id:
                return layer
        raise NotFoundError(
            f"disk {self.disk} has no layer {layer_id} in its chain", hint=call("chains", "VM") + " lists the layers"
        )

    def with_overlay(self, overlay: Layer) -> Self:
        """The chain after ``overlay`` became active on top of today's active layer."""
        if overlay.backing != self.active.id:
            raise ValueError(f"{overlay.id} backs onto {overlay.backing}, not onto {self.active.id}")
        return replace(self, layers=(*self.layers, overlay))
