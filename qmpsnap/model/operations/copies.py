"""New layers that are copies of others; and an old one that gets its snapshot's content back."""

from msgspec import Struct

from qmpsnap.model.layers.chain import Layer


class Copy(Struct, frozen=True, kw_only=True):
    """A new layer with what a snapshot inside ``source`` holds; that image is only read."""

    disk: str
    layer: Layer
    source: Layer
    tag: str


class VolumeCopy(Struct, frozen=True, kw_only=True):
    """A copy of a disk's image that its storage makes: a snapshot, or a clone of one.

    ``source`` is only read; nobody writes to it meanwhile. ``layer`` is the copy, on the same backing. ``thick``: how
    large a thick LVM snapshot is to be, where that was said; ``reserve``: the bytes that it takes at once.
    """

    disk: str
    layer: Layer
    source: Layer
    thick: str = ""
    reserve: int = 0


class VolumeMerge(Struct, frozen=True, kw_only=True):
    """A disk's active layer whose storage gives it the content of one of its snapshots again, in place.

    The ``snapshot`` is taken anew then, with ``reserve`` bytes, and has another identity. ``moves``: bytes to copy, at
    most.
    """

    disk: str
    layer: Layer
    snapshot: Layer
    reserve: int
    moves: int
