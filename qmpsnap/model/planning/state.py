"""What plans for commit, stream, delete and revert are made from."""

from collections.abc import Iterable, Mapping
from typing import Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest

CLUSTER: Final = 64 << 10
"""Bytes of the clusters of an image that we have made: what it grows by."""
TABLE_COVERS: Final = CLUSTER // 8 * CLUSTER
"""Bytes of a disk that one table of such an image speaks of."""
_COUNTS_COVER: Final = CLUSTER // 2 * CLUSTER
"""Bytes of such an image whose references one of its clusters counts."""


Zeros = Literal["none", "near data", "all"]
"""Of what is said to be zeros, what a job writes out: nothing, what it reads in one piece with data, or all of it."""
_PIECE: Final = 512 << 10
"""Bytes that a stream reads at once: all zeros it writes as such, else all of it as data."""


_OWN: Final = 4
"""Clusters that such an image writes anew besides: its header, its two upper tables, a block of reference counts."""


class Held(Struct, frozen=True, kw_only=True):
    """What a layer has of its own, as an image that takes it over stores it, at most.

    Bytes of data, in whole clusters; bytes that it says are zeros whatever lies below (holes of a raw image); and how
    many tables speak of either.
    """

    data: int = 0
    zeros: int = 0
    tables: int = 0

    def zeros_written(self, which: Zeros) -> int:
        """Bytes of zeros that are written out, at most."""
        near = self.data // CLUSTER * (_PIECE - CLUSTER)
        return {"none": 0, "near data": min(self.zeros, near), "all": self.zeros}[which]


class Situation(Struct, frozen=True):
    """What a plan is made from.

    ``bytes``: what each layer's file occupies: what its removal may free. ``held``: what each layer has of its own;
    where that was not counted, what its file occupies stands for it. ``unplugged``: disks that the running QEMU has no
    device for; none is merged or removed of them.
    """

    basis: Basis
    running: bool
    bytes: Mapping[LayerId, int]
    held: Mapping[LayerId, Held] = {}
    unplugged: frozenset[str] = frozenset()

    @property
    def machine(self) -> str:
        """The machine's name."""
        return self.basis.name

    @property
    def forest(self) -> Forest:
        """All layers of the store."""
        return self.basis.forest

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The machine's, oldest first."""
        return self.basis.snapshots

    @property
    def live(self) -> Mapping[str, Chain]:
        """The live chain of each disk."""
        return {chain.disk: chain for chain in self.basis.chains}

    def moves(self, layers: Iterable[Layer], into: Layer, *, zeros: Zeros = "none") -> int:
        """Bytes that are written when ``into`` takes these layers over, at most: their content, tables and counts."""
        layers = tuple(layers)
        found = [self.held[layer.id] for layer in layers if layer.id in self.held]
        if len(found) < len(layers):
            return sum(self.bytes.get(layer.id, 0) for layer in layers)
        size = max(layer.virtual_size for layer in (*layers, into))
        whole = -(-size // CLUSTER) * CLUSTER
        data = min(whole, sum(held.data + held.zeros_written(zeros) for held in found))
        tables = min(-(-size // TABLE_COVERS), sum(held.tables for held in found))
        if into.format == "raw" or not (data or tables):
            return data
        return data + CLUSTER * (tables + _OWN + data // _COUNTS_COVER)

    def after(self, change: Change) -> "Situation":
        """The situation once a change has settled."""
        return replace(self, basis=self.basis.after(change))
