"""Frozen images: the state of their files at the freeze is recorded, and later writes are reported.

An owner's script that starts an adopted machine on the images from before a snapshot overwrites that snapshot. Once
that QEMU has ended, no lock shows it; the file's time and size do.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import NoReturn

from msgspec.structs import replace

from qmpsnap.block.usage import stamps
from qmpsnap.errors import QmpsnapError, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.value import replaced
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.stamp import Stamp, baseline
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.ops.base.reading import read_by
from qmpsnap.store.store import Store


def sizes(store: Store, layers: Iterable[LayerId]) -> dict[LayerId, int]:
    """Bytes of each image's file at its freeze, which identify it if the file system keeps no birth times."""
    return {layer: history[0].size for layer, history in store.frozen.stamps(layers).items()}


def frozen(layers: Iterable[Layer]) -> dict[LayerId, Stamp]:
    """What layers that have just been frozen are, of which nothing is recorded yet."""
    found = {layer.id: (stamps.stamp(layer), stamps.digest(layer)) for layer in layers}
    return {layer: replaced(stamp, digest=digest) for layer, (stamp, digest) in found.items() if stamp}


def keep(store: Store, machine: str) -> None:
    """Record what the machine's frozen images are now, of those that nothing is recorded of."""
    with contextlib.suppress(QmpsnapError):  # a user who cannot write to the store cannot change an image either
        bare = store.frozen.unrecorded(machine)
        if not bare or store.operations(machine, only_open=True):
            return
        spoilt = [found for found in store.snapshots(machine) if found.state == "overwritten"]
        left = _reads(spoilt, store.forest_below(machine)) if spoilt else set()
        later = store.next_serial() if left else 0
        new = {
            layer.id: replaced(stamp, digest=stamps.digest(layer), since=later if layer.id in left else 0)
            for layer in bare
            if (stamp := stamps.stamp(layer))
        }
        if new:
            store.frozen.record(new)


def notice(store: Store, at: Basis) -> None:
    """Mark the snapshots that read a frozen image which something has written to since they were taken.

    Raises:
        StoreMismatch: some were marked.
    """
    machine, chains, forest, snapshots = at.name, at.chains, at.forest, at.snapshots
    active = {chain.active.id for chain in chains}
    layers = {layer.id: layer for layer in read_by(chains, snapshots, forest) if layer.id not in active}
    known = store.frozen.stamps(layers)
    wrong = stamps.changed(layers.values(), known)
    if not wrong and all(snapshot.state != "overwritten" for snapshot in snapshots):
        return  # what each snapshot reads costs the square of the depth
    there = {layer for layer in known if layer in layers and stamps.stamp(layers[layer])}
    marked, right = [], []
    for snapshot in snapshots:
        then = {layer: baseline(known.get(layer, ()), snapshot.operation) for layer in _reads((snapshot,), forest)}
        spoilt = any(stamp and stamp.since in wrong.get(layer, ()) for layer, stamp in then.items())
        if snapshot.state == "ok" and spoilt:
            marked.append(replace(snapshot, state="overwritten"))
        if snapshot.state == "overwritten" and not spoilt and all(then.values()) and then.keys() <= there:
            right.append(replace(snapshot, state="ok"))
    if marked or right:
        store.apply(machine, Change(snapshots=(*marked, *right)))
    if fresh := [layers[layer] for layer, since in wrong.items() if known[layer][-1].since in since]:
        _begin_anew(store, fresh, store.forest_around(machine))
    if marked:
        _tell(machine, [layers[key] for key in sorted(wrong)], marked)


def _begin_anew(store: Store, layers: Sequence[Layer], forest: Forest) -> None:
    """Compare later snapshots with these images as they are now; stamps that no snapshot uses are removed."""
    later, known = store.next_serial(), store.frozen.stamps(layer.id for layer in layers)
    readers = {machine for layer in layers for machine in forest.machines_above(layer.id)}
    now = {layer.id: (stamps.stamp(layer), stamps.digest(layer)) for layer in layers}
    used: set[tuple[LayerId, int]] = set()
    for snapshot in (found for machine in readers for found in store.snapshots(machine)):
        then = {layer: baseline(known.get(layer, ()), snapshot.operation) for layer in _reads((snapshot,), forest)}
        used |= {(layer, stamp.since) for layer, stamp in then.items() if stamp}
    old = {(layer, stamp.since) for layer in now for stamp in known[layer][1:]}
    store.frozen.record(
        {key: replaced(at, digest=digest, since=later) for key, (at, digest) in now.items() if at}, gone=old - used
    )


def require_unwritten(store: Store, layers: Iterable[Layer], machine: str) -> None:
    """Refuse to go on where something has written to one of these since the operation began: the last look for it."""
    found = {layer.id: layer for layer in layers}
    known = store.frozen.stamps(found)
    wrong = stamps.changed(found.values(), known)
    if changed := [key for key, since in wrong.items() if known[key][-1].since in since]:
        raise StoreMismatch(
            f"{', '.join(found[key].path for key in changed)} of machine {machine} was written to by another program"
            " meanwhile",
            hint=_remedy(machine),
            machine=machine,
        )


def _tell(machine: str, layers: list[Layer], marked: list[Snapshot]) -> NoReturn:
    raise StoreMismatch(
        f"{', '.join(layer.path for layer in layers)} of machine {machine} was written to after it was frozen, which"
        f" overwrites snapshot {', '.join(snapshot.name for snapshot in marked)}",
        hint=_remedy(machine),
        effect="applied",
        machine=machine,
    )


def _reads(snapshots: Iterable[Snapshot], forest: Forest) -> set[LayerId]:
    return {layer.id for layer in read_by((), snapshots, forest)}


def _remedy(machine: str) -> str:
    return "try again, and start the machine only on the active images that " + call("chains", machine) + " shows"
