"""What a damaged record may say of snapshots and layers that no operation makes: other disks' layers, wrong ancestors.

Pure. By numbers of operations, which only grow: a clock may have been set back between two snapshots.
"""

from collections.abc import Iterator

from qmpsnap.model.finding import Finding
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import layer_disk
from qmpsnap.ops.check.facts import Facts


def look(at: Facts, folder: str) -> Iterator[Finding]:
    """Of one machine, whose own layers lie in ``folder``: others may have been named after disks of other machines."""
    yield from _points(at, folder)
    yield from _layers(at, folder)
    yield from _ancestors(at)


def _strays(at: Facts, folder: str, layer: Layer | None, disk: str) -> bool:
    """Whether a layer was made for another disk of the machine than the one that it is to hold."""
    if layer is None or not layer.path.startswith(f"{folder}/"):
        return False
    made_for = layer_disk(layer.id)
    return made_for != disk and any(made_for == found.name for found in at.record.machine.spec.disks)


def _points(at: Facts, folder: str) -> Iterator[Finding]:
    layers = at.record.forest.layers
    named = [
        (f"snapshot {snapshot.name} has disk {point.disk}", point.disk, point.layer)
        for snapshot in at.record.snapshots
        for point in snapshot.points
        if snapshot.state != "consumed"
    ]
    named += [(f"the guest has disk {chain.disk}", chain.disk, chain.active.id) for chain in at.record.chains]
    for who, disk, layer in named:
        if _strays(at, folder, layers.get(layer), disk):
            yield at.finding("layer-misplaced", f"{who} on layer {layer}", disk=disk, layer=layers[layer])


def _layers(at: Facts, folder: str) -> Iterator[Finding]:
    layers = at.record.forest.layers
    for layer in layers.values():
        disk = layer_disk(layer.id)
        below = layers.get(layer.backing) if layer.backing else None
        if disk and layer.path.startswith(f"{folder}/") and _strays(at, folder, below, disk):
            text = f"layer {layer.id} of disk {disk} has layer {layer.backing} as its backing file"
            yield at.finding("layer-misplaced", text, disk=disk, layer=layer)


def _ancestors(at: Facts) -> Iterator[Finding]:
    known = {snapshot.name: snapshot for snapshot in at.record.snapshots}
    for snapshot in at.record.snapshots:
        parent = known.get(snapshot.parent) if snapshot.parent else None
        if parent and parent.operation > snapshot.operation:
            text = f"snapshot {snapshot.name} has the younger snapshot {parent.name} as its parent"
            yield at.finding("parent-younger", text)
        elif parent is snapshot:
            yield at.finding("parent-younger", f"snapshot {snapshot.name} has itself as its parent")
