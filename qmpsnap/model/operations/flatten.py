"""The plan of ``flatten``: clones in a Ceph cluster get all data of their own."""

from msgspec import Struct

from qmpsnap.model.layers.chain import Layer


class Clone(Struct, frozen=True, kw_only=True):
    """An image that reads from a snapshot what was never written to it.

    Attributes:
        layer: the image.
        parent: the snapshot, as people read it.
        moves: bytes that a flatten copies, at most: those that the snapshot has data in.
    """

    disk: str
    layer: Layer
    parent: str
    moves: int


class FlattenPlan(Struct, frozen=True, kw_only=True, tag="flatten"):
    """Give clones a copy of what they read of their parents; empty where a disk has no parent."""

    machine: str
    clones: tuple[Clone, ...]

    @property
    def bytes(self) -> int:
        """Bytes to copy, at most."""
        return sum(clone.moves for clone in self.clones)
