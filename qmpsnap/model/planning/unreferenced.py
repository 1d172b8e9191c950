"""Layers that a machine leaves behind when it goes back: which nobody needs, and which may go if empty; pure."""

from collections.abc import Iterable

from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.planning.merging import unneeded
from qmpsnap.model.planning.state import Situation


def nobodys(after: Situation, chains: Iterable[Chain]) -> tuple[Layer, ...]:
    """Of the chains that were active, the layers that nobody needs now, top first."""
    forest = after.forest
    gone: list[Layer] = []
    for chain in chains:
        found = unneeded(forest, reversed(chain.layers))
        forest = forest.apply(after.machine, Change(removed_layers=tuple(layer.id for layer in found)))
        gone += found
    return tuple(gone)


def may_go(after: Situation, layer: Layer) -> bool:
    """Whether an empty layer can go and nothing is lost: ours, read by nobody, on a point that is listed."""
    # A point inside a layer is not what that layer holds now.
    listed = {
        point.layer
        for snapshot in after.snapshots
        if snapshot.state == "ok"
        for point in snapshot.points
        if not point.tag
    }
    return layer.owned and layer.backing in listed and not after.forest.readers(layer.id)
