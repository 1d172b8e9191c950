"""What plans for commit, stream and delete are made from, read from store and files."""

import contextlib
from collections.abc import Collection
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.image import allocated
from qmpsnap.block.image.header import printable
from qmpsnap.errors import HostCannot, NotFoundError, StateError
from qmpsnap.hint import call
from qmpsnap.host.files import inode_of
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Merge, Removal
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.model.planning.state import TABLE_COVERS, Held, Situation
from qmpsnap.model.text import nearest
from qmpsnap.ops.base import free_space
from qmpsnap.ops.base.machine_session import MachineSession


async def look(session: MachineSession, *, disks: Collection[str] | None = None, counted: bool = True) -> Situation:
    """The situation of a machine whose lock we hold, after QEMU has agreed that its chains are the store's.

    ``counted``: count what its layers hold, for what merges or copies them: every table is read for it. Disks that QEMU
    need not have (not in ``disks``) may be unplugged.
    """
    name = session.machine.name
    basis = await session.context.astore.basis(name)
    lacking = frozenset[str]()
    if session.qemu:
        now = await graph.read(session.qemu)
        if disks is not None:
            lacking = (await graph.beside(session.qemu, now, basis.chains)).unplugged.difference(disks)
        await graph.require_chains(session.qemu, now, basis.chains, machine=name, lacking=lacking)
    running = session.qemu is not None
    sizes = await to_read(_bytes, basis, session.context.home)
    written = {chain.active.id for chain in basis.chains if running}
    return Situation(
        basis=basis,
        running=running,
        bytes=sizes,
        held=await to_end(_held, [basis.forest.layer(layer) for layer in sizes], written) if counted else {},
        unplugged=lacking,
    )


def resolve(at: Situation, chain: Chain, wanted: str) -> LayerId:
    """The layer of a chain that a user means: by its id, or by the name of a snapshot whose point it is."""
    snapshot = next((found for found in at.snapshots if found.name == wanted), None)
    point = snapshot.point(chain.disk) if snapshot else None
    consumed = snapshot is not None and snapshot.state == "consumed"
    if wanted in chain.ids:
        if snapshot and (consumed or point is None or point.layer != wanted):
            lies = "which is invalidated" if consumed else f"at layer {point.layer}" if point else "without this disk"
            raise StateError(
                f"{wanted} is both a layer of disk {chain.disk} and a snapshot, {lies}",
                hint="rename the snapshot: " + call("rename_snapshot", at.machine, wanted, "NAME"),
                machine=at.machine,
            )
        return LayerId(wanted)
    if consumed:
        raise StateError(
            f"snapshot {wanted} of machine {at.machine} was invalidated by a commit",
            hint="name a layer instead, from " + call("chains", at.machine, chain.disk),
            machine=at.machine,
        )
    if point and point.layer in chain.ids:
        return point.layer
    raise NotFoundError(
        f"the live chain of disk {chain.disk} of machine {at.machine} has no layer or snapshot {wanted!r}"
        + nearest(wanted, [*chain.ids, *(found.name for found in at.snapshots)]),
        hint=call("chains", at.machine, chain.disk) + " lists its layers",
        machine=at.machine,
    )


def require_space(at: Situation, steps: tuple[Merge | Removal, ...], store: Path) -> None:
    """Refuse before anything begins when a job could run out of space; what an earlier step frees counts."""
    left: dict[int, int] = {}
    grows = [step for step in steps if isinstance(step, Merge)]
    if grows:
        free_space.require([free_space.Need(str(store), free_space.STORE, "the store")], machine=at.machine)
    for step in steps:
        if isinstance(step, Merge) and step.into.storage == "file":  # what is none has all its room already
            folder = Path(step.into.path).parent
            found = free_space.room(folder)
            free = left.setdefault(found.device, found.free)
            growth = min(step.moves, _may_grow(at, step))
            if free < growth:
                raise HostCannot(
                    f"layer {step.into.id} may grow by {growth} bytes, but only {free} are free at"
                    f" {printable(str(folder))}",
                    hint="free some space there, or merge in smaller steps",
                    machine=at.machine,
                )
            left[found.device] = free - growth
        for layer in step.removed:
            with contextlib.suppress(HostCannot):
                device = free_space.room(Path(layer.path).parent).device
                if device in left:
                    left[device] += at.bytes.get(layer.id, 0)


def _may_grow(at: Situation, step: Merge) -> int:
    """Bytes that the layer may grow by, whatever is written to it: what it holds already is written over in place.

    Not where that is compressed, or read by a snapshot inside it.
    """
    into, size = step.into, max(step.into.virtual_size, step.top.virtual_size)
    occupied = at.bytes.get(into.id, 0)
    if into.id not in at.held:
        return max(0, into.virtual_size - occupied)
    if any(reference.tag for reference in at.forest.references_to(into.id)):
        return step.moves
    most = size if into.format == "raw" else free_space.of_image(size, size)
    return max(0, most - min(occupied, at.held[into.id].data))


def _held(layers: list[Layer], written: set[LayerId]) -> dict[LayerId, Held]:
    """What each layer holds; one that a QEMU writes to has grown by what its file has, and its tables need not say."""
    found = {layer.id: allocated.held(layer) for layer in layers}
    for layer in layers:
        if layer.id in written:
            counted = found[layer.id]
            with contextlib.suppress(OSError):
                length = min(layer.virtual_size, Path(layer.path).stat().st_size)
                tables = max(counted.tables, -(-length // TABLE_COVERS))
                found[layer.id] = replace(counted, data=max(counted.data, length), tables=tables)
    return found


def _bytes(basis: Basis, home: Home) -> dict[LayerId, int]:
    """What the files occupy of every layer that the machine reads, wherever it lies, and of what is left of its own."""
    machine, forest = basis.name, basis.forest
    wanted = {layer.id: layer for chain in basis.chains for layer in chain.layers}
    tops = [writer.layer for writer in forest.writers if writer.machine == machine]
    tops += [reference.layer for reference in forest.references if reference.machine == machine]
    for top in tops:
        wanted |= {layer.id: layer for layer in forest.chain("", top).layers}
    inside = f"{home.machine_dir(machine)}/"
    wanted |= {layer.id: layer for layer in forest.layers.values() if layer.path.startswith(inside)}
    # A cluster does not tell quickly, and what a merge would move of it must not seem to be nothing.
    sizes = {layer.id: layer.virtual_size for layer in wanted.values() if layer.storage == "rbd"}
    for layer in (*wanted.values(), *_nobodys(forest, home)):
        try:
            status = Path(layer.path).stat()
        except OSError:
            continue
        # Another host may have another file of that name.
        if layer.id in wanted or inode_of(status) == (layer.device, layer.inode):
            sizes[layer.id] = status.st_blocks * 512
    return sizes


def _nobodys(forest: Forest, home: Home) -> list[Layer]:
    """Layers at chosen places that no machine reads: nothing tells whose they were, so any delete takes them."""
    outside = (layer for layer in forest.layers.values() if not layer.path.startswith(f"{home.machines}/"))
    return [layer for layer in outside if not forest.machines_above(layer.id)]
