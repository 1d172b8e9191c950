"""Frozen images: what their files were when they were frozen is recorded, and what has been written to since is told.

An owner's script that starts an adopted machine on the images of before a snapshot writes into what that snapshot
holds. No lock tells of it once that QEMU has ended; the file's time and size do.
"""

import contextlib
from collections.abc import Iterable
from typing import NoReturn

from msgspec.structs import replace

from qmpsnap.block import images
from qmpsnap.block.images import Asked
from qmpsnap.errors import QmpsnapError, StoreMismatch
from qmpsnap.model.chain import Layer
from qmpsnap.model.forest import Forest
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import LayerId
from qmpsnap.model.operation import Change
from qmpsnap.model.snapshot import Snapshot
from qmpsnap.ops.reading import read_by
from qmpsnap.store.store import Store


def asked(store: Store, machine: Machine, pid: int | None, *, active_too: bool = False) -> Asked:
    """What there is to ask of a machine's images; ``pid`` is its QEMU's.

    Who else has an active image open that this QEMU has, too, takes a look through all processes: for ``active_too``.
    """
    chains, forest = store.chains(machine.name), store.forest()
    layers = {layer.id: layer for layer in read_by(chains, store.snapshots(machine.name), forest)}
    active = frozenset(chain.active.id for chain in chains)
    stamps = {key: stamp for key, stamp in store.frozen.stamps().items() if key in layers and key not in active}
    return Asked(
        paths={layer.id: layer.path for layer in layers.values() if active_too or not (pid and layer.id in active)},
        active=frozenset() if pid else active,
        frozen=[layers[key] for key in stamps],
        stamps=stamps,
        ours=() if pid is None else (pid,),
    )


def keep(store: Store, machine: str) -> None:
    """Record what the machine's frozen images are now, of those that nothing is recorded of."""
    with contextlib.suppress(QmpsnapError):  # whoever cannot write the store cannot change an image either
        if store.operations(machine, only_open=True):
            return
        chains, forest, snapshots = store.chains(machine), store.forest(), store.snapshots(machine)
        known, active = store.frozen.stamps(), {writer.layer for writer in forest.writers}
        spoilt = [found for found in snapshots if found.state == "overwritten"]
        left = {layer.id for layer in read_by((), spoilt, forest)} if spoilt else set()
        new = {
            layer.id: stamp
            for layer in read_by(chains, snapshots, forest)
            if layer.id not in known and layer.id not in active and layer.id not in left
            if (stamp := images.stamp(layer))
        }
        if new:
            store.frozen.record(new)


def notice(store: Store, machine: str) -> None:
    """Mark the snapshots that read a frozen image which something has written to since.

    Raises:
        StoreMismatch: there are some that were not marked before.
    """
    chains, forest, snapshots = store.chains(machine), store.forest(), store.snapshots(machine)
    known = store.frozen.stamps()
    layers = {layer.id: layer for layer in read_by(chains, snapshots, forest)}
    active = {chain.active.id for chain in chains}
    changed = set(images.changed((layer for layer in layers.values() if layer.id not in active), known))
    if not changed and all(snapshot.state != "overwritten" for snapshot in snapshots):
        return  # what each snapshot reads costs the square of the depth
    # What was taken after that was told is of the images as they were then.
    told = {layer for snapshot in snapshots if snapshot.state == "overwritten" for layer in _reads(snapshot, forest)}
    marked = [
        replace(snapshot, state="overwritten")
        for snapshot in snapshots
        if snapshot.state == "ok" and _reads(snapshot, forest) & (changed - told)
    ]
    right = [
        replace(snapshot, state="ok")
        for snapshot in snapshots
        if snapshot.state == "overwritten" and (reads := _reads(snapshot, forest)) <= {*known} and not reads & changed
    ]
    if marked or right:
        store.apply(machine, Change(snapshots=(*marked, *right)))
    if marked:
        _tell(machine, [layers[key] for key in sorted(changed)], marked)


def require_unwritten(store: Store, layers: Iterable[Layer], machine: str) -> None:
    """Refuse to go on where something has written to one of these since the operation began: the last look for it.

    Raises:
        StoreMismatch: something has; the next verb marks the snapshots that read it.
    """
    found = {layer.id: layer for layer in layers}
    if changed := images.changed(found.values(), store.frozen.stamps()):
        raise StoreMismatch(
            f"{', '.join(found[key].path for key in changed)} of machine {machine} was written to meanwhile, by"
            " somebody else",
            hint="start the machine on its active images from now on (qmpsnap chain shows them); do it again to go on",
            machine=machine,
        )


def _tell(machine: str, layers: list[Layer], marked: list[Snapshot]) -> NoReturn:
    raise StoreMismatch(
        f"{', '.join(layer.path for layer in layers)} of machine {machine} was written to since it was frozen: snapshot"
        f" {', '.join(snapshot.name for snapshot in marked)} does not read as at its moment any more and is marked"
        " overwritten; nothing else was changed",
        hint="start the machine on its active images from now on (qmpsnap chain shows them); do it again to go on",
        effect="applied",
        machine=machine,
    )


def _reads(snapshot: Snapshot, forest: Forest) -> set[LayerId]:
    return {layer.id for layer in read_by((), (snapshot,), forest)}
