"""Which images a machine reads, and what was recorded of those that are frozen; pure."""

from __future__ import annotations

from qmpsnap.host.value import Value

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qmpsnap.model.layers.stamp import History
    from qmpsnap.model.machines.spec import Format, Storage
    from qmpsnap.model.names import LayerId


class ReadImage(Value):
    """A layer's file: of :class:`qmpsnap.model.layers.chain.Layer` what tells whether it is still the recorded one."""

    id: LayerId
    path: str
    format: Format
    backing: LayerId | None
    device: int
    inode: int
    birth: int
    storage: Storage = "file"
    identity: str = ""


class Reads(Value):
    """The images that a machine's disks and snapshots read.

    Attributes:
        images: each once.
        active: the layers that its guest writes to.
        stamps: what the frozen ones were.
    """

    images: Mapping[LayerId, ReadImage]
    active: frozenset[LayerId]
    stamps: Mapping[LayerId, History]

    def below(self, tops: Iterable[LayerId]) -> set[LayerId]:
        """The layers that these read, and they themselves."""
        found: set[LayerId] = set()
        for top in tops:
            at: LayerId | None = top
            while at is not None and at in self.images and at not in found:
                found.add(at)
                at = self.images[at].backing
        return found
