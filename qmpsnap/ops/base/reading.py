"""Which images a machine reads. Pure; without asyncio, as ``list`` asks here."""

from collections.abc import Iterable

from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.names import LayerId
from qmpsnap.model.planning.layer_graph import Forest


def read_by(chains: Iterable[Chain], snapshots: Iterable[Snapshot], forest: Forest) -> tuple[Layer, ...]:
    """Every image that a machine's disks and snapshots read, each once; pure."""
    pending: list[LayerId] = [chain.active.id for chain in chains]
    pending += [point.layer for snapshot in snapshots for point in snapshot.points]
    found: dict[LayerId, Layer] = {}
    while pending:
        layer = forest.layers.get(pending.pop())
        if layer is not None and layer.id not in found:
            found[layer.id] = layer
            pending += [layer.backing] if layer.backing else []
    return tuple(found.values())
