"""Tags inside images: put in, looked for, gone back to; by the machine's QEMU, or by a worker while it is stopped."""

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

from msgspec.structs import replace

from qmpsnap.block.image import snapshot_table
from qmpsnap.errors import StateError, StoreMismatch
from qmpsnap.hint import option
from qmpsnap.host.threads import bounded, to_end
from qmpsnap.machine import worker
from qmpsnap.machine.config.firmware_files import copy_variables
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import JobId, LayerId, OperationId, job_id
from qmpsnap.model.operations.operation import Change, InternalPlan, LoadPlan
from qmpsnap.ops.base import luks
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.memory.save import RESUME_DEADLINE
from qmpsnap.ops.session.quiesce import Freezer
from qmpsnap.qmp import commands, human, jobs, runstate, transactions
from qmpsnap.qmp.commands import Tag
from qmpsnap.qmp.jobs import Report
from qmpsnap.qmp.session import Monitor


async def tag_live(qemu: Monitor, job: JobId, planned: InternalPlan, freezer: Freezer, report: Report) -> float | None:
    """Create the tags; returns how long the guest was paused, in milliseconds. The job, if any, is not dismissed."""
    async with freezer.frozen():
        return await _tag_held(qemu, job, planned, freezer, report)


async def _tag_held(qemu: Monitor, job: JobId, planned: InternalPlan, freezer: Freezer, report: Report) -> float:
    before = time.monotonic()
    try:
        if planned.resume:
            await commands.control(qemu, "stop")
        if planned.vmstate and planned.resume:
            await require_held(qemu)
        await keep_variables(planned)
        if planned.vmstate:
            await _save(qemu, job, planned, report)
        else:
            nodes = [node_name(layer) for layer in planned.layers.values()]
            with freezer.within():
                await commands.transaction(qemu, transactions.internal_transaction(nodes, planned.tag))
    finally:
        if planned.resume:
            await bounded(RESUME_DEADLINE, commands.control(qemu, "cont"))
    return (time.monotonic() - before) * 1000


async def _save(qemu: Monitor, job: JobId, planned: InternalPlan, report: Report) -> None:
    if planned.by == "savevm":
        await human.execute(qemu, f"savevm {planned.tag}", deadline=jobs.MEMORY_DEADLINE)
        return
    arguments = memory_arguments(job, tag=planned.tag, layers=planned.layers, vmstate=planned.vmstate)
    await qemu.execute("snapshot-save", arguments)
    await jobs.follow(qemu, job, report=report, deadline=jobs.MEMORY_DEADLINE)


async def require_held(qemu: Monitor) -> None:
    """Make sure that the guest is paused after ``stop``: QEMU before 9.0 does not stop a suspended one."""
    if await commands.run_state(qemu) == runstate.SUSPENDED:
        raise StateError("the guest suspended itself just now", hint="try again")


async def keep_variables(planned: InternalPlan) -> None:
    """Copy the UEFI variable store, if there is one."""
    if planned.variables:
        await to_end(copy_variables, *planned.variables)


async def tag_stopped(
    context: Context, machine: Machine, planned: InternalPlan, chains: Sequence[Chain]
) -> dict[str, tuple[Tag, ...]]:
    """Put the tags into the images of a stopped machine; returns all there are."""
    found: dict[str, tuple[Tag, ...]] = {}
    for chain in chains:
        if chain.disk not in planned.layers:
            continue
        async with open_in(context, machine, None, chain) as qemu:
            arguments = transactions.internal_transaction([node_name(chain.active)], planned.tag)
            await commands.transaction(qemu, arguments)
            found |= await commands.query_tags(qemu)
    return found


@asynccontextmanager
async def open_in(context: Context, machine: Machine, monitor: Monitor | None, chain: Chain) -> AsyncIterator[Monitor]:
    """The QEMU that has a chain open: the machine's own, or a worker where that has not."""
    if monitor and node_name(chain.active) in await commands.query_tags(monitor):
        yield monitor
        return
    run_dir = context.home.run_dir(machine.name)
    await worker.end_leftover(machine, run_dir)
    async with luks.worker_on(context, machine, chain) as qemu:
        yield qemu


async def remove_tag(
    context: Context, machine: Machine, monitor: Monitor | None, *, disk: str, layer: LayerId, tag: str
) -> None:
    """Remove a tag from a layer: the machine's QEMU from one that its guest writes to, a worker from any."""
    forest = await context.astore.forest_around(machine.name, layer)
    if layer not in forest.layers:
        return
    node = node_name(forest.layer(layer))
    async with open_in(context, machine, monitor, forest.chain(disk, layer)) as qemu:
        if has_tag(await commands.query_tags(qemu), node, tag):
            await commands.delete_tag(qemu, node, tag)


def has_tag(found: Mapping[str, Sequence[Tag]], node: str, tag: str) -> bool:
    """Whether the image of a node has it."""
    return any(one.name == tag for one in found.get(node, ()))


def require_tags(layers: Iterable[Layer], tag: str, found: Mapping[str, Sequence[Tag]]) -> None:
    """Make sure that every image has the tag."""
    for layer in layers:
        if not has_tag(found, node_name(layer), tag):
            raise StoreMismatch(f"layer {layer.id} ({layer.path}) has no internal snapshot {tag}")


def settled(
    planned: InternalPlan,
    found: Mapping[str, Sequence[Tag]],
    *,
    pause_ms: float | None = None,
    freezer: Freezer | None = None,
) -> Change:
    """The plan's change with what was measured."""
    snapshot = planned.change.snapshots[0]
    require_tags(planned.layers.values(), planned.tag, found)
    if snapshot.inside:
        layer, size = _memory_in(planned, snapshot.inside.layer, found)
        snapshot = replace(snapshot, inside=replace(snapshot.inside, layer=layer, bytes=size), level="ram")
    if freezer:
        level = "fs" if freezer.reached else snapshot.level
        snapshot = replace(snapshot, level=level, unquiesced=freezer.why, frozen_ms=freezer.frozen_ms)
    return replace(planned.change, snapshots=(replace(snapshot, pause_ms=pause_ms),))


def _memory_in(planned: InternalPlan, layer: LayerId, found: Mapping[str, Sequence[Tag]]) -> tuple[LayerId, int]:
    """The layer that has the memory, and how many bytes: for ``savevm`` QEMU has chosen it."""
    sizes = {
        at.id: next(one.vm_state_size for one in found[node_name(at)] if one.name == planned.tag)
        for at in planned.layers.values()
    }
    chosen = layer if planned.by == "snapshot-save" else max(sizes, key=lambda at: sizes[at])
    return chosen, sizes[chosen]


def sizes(snapshot: Snapshot, chains: Iterable[Chain]) -> dict[str, int]:
    """The size in bytes that disks had with the snapshot inside the active layers of these chains, where it is told."""
    tags = {(point.disk, point.layer): point.tag for point in snapshot.points}
    found = {chain.disk: (chain.active, tags.get((chain.disk, chain.active.id))) for chain in chains}
    read = {disk: snapshot_table.size(layer, tag) for disk, (layer, tag) in found.items() if tag}
    return {disk: size for disk, size in read.items() if size is not None}


def settled_load(planned: LoadPlan, found: Mapping[str, Sequence[Tag]]) -> Change:
    """The same of a return to a snapshot, which may have kept what ran before."""
    if planned.kept is None:
        return planned.change
    return replace(planned.change, snapshots=settled(planned.kept, found).snapshots)


def job_of(operation: OperationId) -> JobId:
    """The job that saves or loads memory inside images."""
    return job_id(operation, "memory")


def keeping_job_of(operation: OperationId) -> JobId:
    """The job that saves, before the other loads, the memory of what ran until then."""
    return job_id(operation, "kept")


def memory_arguments(
    job: JobId, *, tag: str, layers: Mapping[str, Layer], vmstate: LayerId | None
) -> dict[str, object]:
    """The arguments of ``snapshot-save`` and ``snapshot-load``; ``vmstate`` is the layer that has the memory."""
    nodes = {layer.id: node_name(layer) for layer in layers.values()}
    assert vmstate
    return jobs.memory_arguments(job, tag=tag, vmstate=nodes[vmstate], nodes=list(nodes.values()))


async def require_free_tag(qemu: Monitor, tag: str) -> None:
    """Make sure that ``savevm`` replaces nothing: it deletes a snapshot of that name from every image, and never says.

    Raises:
        StateError: there is such a snapshot.
    """
    for node, inside in (await commands.query_tags(qemu)).items():
        if any(tag == one.name for one in inside):
            raise StateError(
                f"savevm would replace the snapshot {tag} inside the image of node {node}",
                hint="use " + option("by", "snapshot-save"),
            )


async def require_first(qemu: Monitor, planned: LoadPlan) -> None:
    """Make sure that ``loadvm`` finds the memory: it looks for it in QEMU's first writable image alone."""
    nodes = (backend.inserted for backend in await commands.query_block(qemu))
    first = next((node.node_name for node in nodes if node and not node.ro), None)
    if first != planned.vmstate:
        raise StateError(
            f"loadvm looks for the memory in {first}, but that of snapshot {planned.snapshot} is in {planned.vmstate}",
            hint="use " + option("by", "snapshot-load"),
            machine=planned.machine,
        )


async def delete_everywhere(qemu: Monitor, names: Iterable[str]) -> None:
    """Remove snapshots from all images of a QEMU by ``delvm``, where any has them."""
    found = await commands.query_tags(qemu)
    for tag in dict.fromkeys(names):
        if any(has_tag(found, node, tag) for node in found):
            await human.execute(qemu, f"delvm {tag}")


async def load_into(qemu: Monitor, job: JobId, *, tag: str, layers: Mapping[str, Layer], vmstate: LayerId) -> None:
    """Run the job that loads memory and disks; the vCPUs stay stopped, and the job is not dismissed."""
    await qemu.execute("snapshot-load", memory_arguments(job, tag=tag, layers=layers, vmstate=vmstate))
    await jobs.follow(qemu, job, deadline=jobs.MEMORY_DEADLINE)
