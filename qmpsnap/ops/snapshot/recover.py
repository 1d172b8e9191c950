"""Ending a broken ``snapshot create``: the journal's step, QEMU's graph and, for a full one, its migration decide."""

import os
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.image.create import remove
from qmpsnap.block.image.staged import require_folder
from qmpsnap.errors import HostCannot, StateError, StoreMismatch
from qmpsnap.host.threads import to_end
from qmpsnap.machine import statefile
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.qemu import require_ended
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import NodeName
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.memory import Memory
from qmpsnap.model.operations.operation import Change, CreatePlan, Ended, Operation
from qmpsnap.ops.base import overlay_paths, vmgenid, volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.overlays import headers_of, identified, remove_new
from qmpsnap.ops.memory import save as saving
from qmpsnap.ops.outside import layer_changes
from qmpsnap.ops.session import external_writers, file_nodes, quiesce
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.snapshot import nvram
from qmpsnap.qmp import commands, migration
from qmpsnap.qmp.session import Monitor


def direction(step: str, *, active: int | None, total: int) -> Direction | None:
    """Whether a broken ``snapshot create`` is finished or undone; pure.

    None when the rules do not cover what was found: someone else has changed the chain.
    """
    if step not in {steps.TRANSACTION, steps.SAVING, steps.CLONING, steps.LOST}:
        return "back"
    if active is None or active == total:
        # Without QEMU nobody can tell whether the transaction ran; either way the overlays read the same.
        return "forward"
    return "back" if active == 0 else None


async def end(broken: Broken[CreatePlan], monitor: Monitor | None) -> Direction:
    """End the operation; ``forward`` when there is a snapshot (or were to be only layers), ``back`` when there is none.

    Disks that have moved stay where they are, whatever became of the memory: a guest may have written there.
    """
    plan = broken.operation.plan
    if broken.operation.step == steps.ENDING:
        await quit_saved(broken.context, broken.machine, monitor, broken.operation)
        return "forward"
    proven = await to_end(nvram.proven, broken.operation)  # before a held guest runs on, and writes there
    if plan.hold and monitor and broken.operation.step == steps.TRANSACTION:
        await saving.run_on(monitor)
    names = frozenset(node_name(overlay.layer) for overlay in plan.overlays)
    found = await graph.read(monitor) if monitor else None
    active = None
    if found:
        active = sum(bool(disk.nodes) for disk in graph.by_disk(found, names).values())
    way = direction(broken.operation.step, active=active, total=len(names))
    if way is None:
        raise broken.pending("only some of its overlays are active in QEMU")
    if way == "forward" and monitor is None:
        old, new = [overlay.backing for overlay in plan.overlays], [overlay.layer for overlay in plan.overlays]
        way = way if await external_writers.new_counts(broken, old=old, new=new, fresh=True) else "back"
    if way == "forward":
        await _learn_names(broken, monitor, plan)
        return await _forward(broken, monitor, plan, proven=proven)
    if plan.memory:
        await _drop(broken, monitor, plan.memory)
    if monitor and found:
        for name in sorted(names & graph.node_names(found)):
            await commands.blockdev_del(monitor, NodeName(name))
    await _forget_copy(plan)
    await volumes.undo(broken.machine, broken.operation.id, plan.volumes)
    await overlay_paths.undo(plan.overlays)
    await remove_new([overlay for overlay in plan.overlays if not overlay.part])
    await broken.mark_failed()
    return way


async def _learn_names(broken: Broken[CreatePlan], monitor: Monitor | None, plan: CreatePlan) -> None:
    if monitor and plan.by == "blockdev-snapshot-sync":
        layers = [overlay.layer for overlay in plan.overlays]
        await file_nodes.note(broken.context, broken.machine, monitor, layers)


async def _forget_copy(plan: CreatePlan) -> None:
    if plan.variables:
        await to_end(firmware_files.forget_variables, plan.variables[1])


async def _forward(broken: Broken[CreatePlan], monitor: Monitor | None, plan: CreatePlan, *, proven: bool) -> Direction:
    """``proven``: the copy of the UEFI variables is that of the disks' instant; memory has them anyway."""
    context, machine, operation, memory = broken.context, broken.machine, broken.operation, plan.memory
    change = identified(plan.change, headers_of(overlay.layer for overlay in plan.overlays))
    unproven = quiesce.unproven(operation)
    if plan.volumes:
        found = await volumes.whole(machine, operation.id, plan.volumes) if operation.step == steps.CLONING else None
        if found is None:
            if memory:
                await _drop(broken, monitor, memory)
            return await _lost(broken, plan, change)
        change = identified(change, found)
    if memory is None and proven and not unproven:
        await settle(context, machine, operation, change)
        return "forward"
    if memory and not unproven and (state := await _state(broken, monitor, plan, memory)):
        step = steps.ENDING if memory.quit else None
        if not proven:
            await _forget_copy(plan)
            change = replace(change, snapshots=tuple(replace(found, variables=None) for found in change.snapshots))
        await settle(context, machine, operation, with_memory(change, state), step=step)
        if memory.quit:
            await quit_saved(context, machine, monitor, operation)
        return "forward"
    if memory:
        await _drop(broken, monitor, memory)
    if memory and memory.degrade and proven and not unproven:
        disks = tuple(replace(snapshot, kind="disk", level="crash") for snapshot in change.snapshots)
        await settle(context, machine, operation, replace(change, snapshots=disks), error=broken.error)
        return "forward"
    return await _lost(broken, plan, change)


async def _lost(broken: Broken[CreatePlan], plan: CreatePlan, change: Change) -> Direction:
    """There is no snapshot; the disks stay on their overlays, if they have any."""
    await _forget_copy(plan)
    await volumes.undo(broken.machine, broken.operation.id, plan.volumes)
    copies = {copy.layer.id for copy in plan.volumes}
    layers = Change(layers=tuple(one for one in change.layers if one.id not in copies), active=change.active)
    await settle(broken.context, broken.machine, broken.operation, layers, state="failed", error=broken.error)
    return "back"


async def _state(
    broken: Broken[CreatePlan], monitor: Monitor | None, plan: CreatePlan, memory: Memory
) -> Vmstate | None:
    """The memory, if it was or can be saved whole; the guest runs on if it should, and is still held if it was not."""
    if broken.operation.step == steps.LOST:
        return None
    if finished := await to_end(_finished, broken.operation, memory):
        if monitor and memory.quit and broken.unfinished == "cancel":  # a cancelled save: let the guest run
            await remove(finished.path, device=finished.device, inode=finished.inode, birth=finished.birth)
            return None
        await _run_on(broken, monitor, memory)
        await to_end(statefile.discard, memory.part)  # its other name, if that is still there
        return finished
    if monitor is None or not await to_end(_has_content, memory.part):
        return None
    return await _kept(broken, plan, memory) if await _is_written(broken, monitor, memory) else None


async def _is_written(broken: Broken[CreatePlan], monitor: Monitor, memory: Memory) -> bool:
    """Whether QEMU has written all of it in the end."""
    if (await migration.query(monitor)).status not in migration.ENDED:
        if broken.unfinished == "cancel":
            await saving.give_up(monitor, memory)
        else:
            await saving.fixed(monitor, memory.mode)
    await _run_on(broken, monitor, memory)
    if broken.unfinished == "cancel":
        return False
    if (found := await migration.query(monitor)).status not in migration.ENDED and broken.unfinished == "refuse":
        raise broken.still_works(found.status)
    if (await saving.ended(monitor, broken.operation, report=broken.report)).status != "completed":
        return False
    await migration.put_back(monitor)
    return True


async def _kept(broken: Broken[CreatePlan], plan: CreatePlan, memory: Memory) -> Vmstate | None:
    """The written memory under its own name; None when it cannot have that."""
    try:
        name, frozen = plan.change.snapshots[0].name, plan.quiesce != "skip"
        return await saving.finish(broken.operation, memory, snapshot=name, frozen=frozen)
    except (HostCannot, StateError, StoreMismatch):
        # A guest is not held, nor a machine kept busy, until somebody makes room or moves a file away.
        await broken.context.astore.mark(broken.operation.id, "running", step=steps.LOST)
        return None


async def _run_on(broken: Broken[CreatePlan], monitor: Monitor | None, memory: Memory) -> None:
    # A guest whose QEMU is to end must not do anything that is in neither memory nor disks.
    if not memory.quit:
        await _resume(broken, monitor, memory)


async def _resume(broken: Broken[CreatePlan], monitor: Monitor | None, memory: Memory) -> None:
    if monitor is None:
        return
    if not memory.resume:
        await saving.take_disks_back(monitor)
        return
    # Only at this step can it be us who paused the guest, before QEMU's end until then; a migration is always ours.
    paused_by_us = broken.operation.step in {steps.TRANSACTION, steps.LOST} or memory.quit
    if paused_by_us or (await commands.query_status(monitor)).status in {"finish-migrate", "postmigrate"}:
        await saving.run_on(monitor)


async def _drop(broken: Broken[CreatePlan], monitor: Monitor | None, memory: Memory) -> None:
    """Give the memory up: stop QEMU's save, resume the guest if it should run, remove the unfinished file."""
    if monitor and broken.operation.step == steps.PLANNED:
        # Nothing was stopped or begun yet: a migration is somebody else's.
        if (await migration.query(monitor)).status in migration.IDLE:
            await migration.put_back(monitor)
    elif monitor:
        try:
            await saving.give_up(monitor, memory)
        finally:
            await _resume(broken, monitor, memory)
        await saving.forget(monitor)
        await _resume(broken, monitor, memory)  # a migration that came to its end all the same stops the guest again
    await to_end(require_folder, memory.part)
    if named := await to_end(_finished, broken.operation, memory):  # it was finished, but for its other name
        await remove(named.path, device=named.device, inode=named.inode, birth=named.birth)
    await to_end(statefile.discard, memory.part)


def with_memory(
    change: Change,
    state: Vmstate,
    *,
    pause_ms: float | None = None,
    unquiesced: str = "",
    frozen_ms: float | None = None,
) -> Change:
    """The change with the memory's path, how long the guest was paused and frozen, and why it was not frozen."""
    snapshots = tuple(
        replace(
            found,
            vmstate=state,
            level="ram",
            pause_ms=found.pause_ms if pause_ms is None else pause_ms,
            unquiesced=unquiesced or found.unquiesced,
            frozen_ms=found.frozen_ms if frozen_ms is None else frozen_ms,
        )
        for found in change.snapshots
    )
    return replace(change, snapshots=snapshots)


async def settle(
    context: Context,
    machine: Machine,
    operation: Operation[CreatePlan],
    change: Change,
    *,
    step: str | None = None,
    state: Ended = "settled",
    error: str | None = None,
) -> None:
    """Record what is true from now on; the new layers keep the places that were chosen for them alone.

    With ``step`` the operation goes on from there, else it ends in ``state``; ``error`` is what went wrong.
    """
    overlays = operation.plan.overlays
    await overlay_paths.let_go(overlays)

    def settled() -> None:
        frozen = layer_changes.frozen(overlay.backing for overlay in overlays)
        context.store.settle(operation.id, machine.name, change, step=step, state=state, error=error, frozen=frozen)

    await blocking(settled)


async def quit_saved(
    context: Context, machine: Machine, qemu: Monitor | None, operation: Operation[CreatePlan]
) -> None:
    """End the QEMU of a machine that was saved."""
    await require_ended(context.process(machine), qemu, machine=machine.name, effect="applied")
    await context.astore.set_process(machine.name, None)
    if resting := vmgenid.saved(machine, operation.id):
        await context.astore.settle(operation.id, machine.name, Change(vmgenid=resting))
    else:
        await context.astore.mark(operation.id, "settled", step=steps.SETTLED)


def _finished(operation: Operation, memory: Memory) -> Vmstate | None:
    if not os.path.lexists(memory.path):
        return None
    try:
        state, manifest = statefile.find(memory.path)  # one that cannot be read now is not taken for another's
    except StoreMismatch:
        return None
    return state if manifest.operation == operation.id and manifest.hardware == memory.hardware else None


def _has_content(path: str) -> bool:
    """Whether this operation's migration ever wrote: QEMU's last one may be an earlier one."""
    try:
        return Path(path).stat().st_size > 0
    except OSError:
        return False
