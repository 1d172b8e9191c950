"""Ending a broken internal snapshot, and a broken return to one: the job in QEMU and the tags in the images decide."""

import contextlib

from qmpsnap.block.image import internal_snapshots
from qmpsnap.errors import QmpError
from qmpsnap.host.threads import to_end
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.qemu import end
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.names import JobId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import InternalPlan, LoadPlan
from qmpsnap.ops.internal import tags as tagging
from qmpsnap.ops.session import quiesce
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.commands import Tag
from qmpsnap.qmp.session import Monitor


async def end_create(broken: Broken[InternalPlan], monitor: Monitor | None) -> Direction:
    """End an internal snapshot: forward when every image has its tag, else none keeps one.

    Its job is over in the time it takes to write the memory, and cannot be cancelled: it is waited for.
    """
    planned = broken.operation.plan
    job = tagging.job_of(broken.operation.id)
    if broken.operation.step == steps.RECORDED:
        if monitor:
            await _dismiss(monitor, job)
        await broken.mark_settled()
        return "forward"
    found: dict[str, tuple[Tag, ...]] = {}
    if broken.operation.step != steps.PLANNED:
        if monitor:
            await _job_over(broken, monitor, job)
            if planned.resume:
                await _run_on(monitor)
        found = await _tags(broken, monitor, planned)
    whole = found and all(tagging.has_tag(found, node_name(at), planned.tag) for at in planned.layers.values())
    whole = whole and not quiesce.unproven(broken.operation)
    if whole and broken.unfinished != "cancel":
        change = tagging.settled(planned, found)
        await broken.context.astore.settle(broken.operation.id, planned.machine, change)
    else:
        await _remove(broken, monitor, planned, found)
        await broken.mark_failed()
    if monitor:
        await _dismiss(monitor, job)
    return "forward" if whole and broken.unfinished != "cancel" else "back"


async def _tags(broken: Broken, monitor: Monitor | None, planned: InternalPlan) -> dict[str, tuple[Tag, ...]]:
    if monitor:
        return await commands.query_tags(monitor)
    found: dict[str, tuple[Tag, ...]] = {}
    context, machine = broken.context, broken.machine
    for chain in await context.astore.chains(machine.name):
        if chain.disk in planned.layers:
            async with tagging.open_in(context, machine, None, chain) as qemu:
                found |= await commands.query_tags(qemu)
    return found


async def _remove(
    broken: Broken, monitor: Monitor | None, planned: InternalPlan, found: dict[str, tuple[Tag, ...]]
) -> None:
    context, machine = broken.context, broken.machine
    for chain in await context.astore.chains(machine.name):
        node = node_name(chain.active)
        if chain.disk in planned.layers and tagging.has_tag(found, node, planned.tag):
            async with tagging.open_in(context, machine, monitor, chain) as qemu:
                await commands.delete_tag(qemu, node, planned.tag)
    if planned.variables:
        await to_end(firmware_files.forget_variables, planned.variables[1])


async def end_load(broken: Broken[LoadPlan], monitor: Monitor | None) -> Direction:
    """End a return to a snapshot inside the active layers: once its job was started, forward is the only way.

    ``loadvm`` is no job, and nothing tells whether it was sent or how it ended: QEMU is ended.

    Where QEMU has ended or could not load the memory, the disks are rolled back here, which changes nothing where they
    are already, and the machine is stopped.
    """
    planned = broken.operation.plan
    context, operation, job = broken.context, broken.operation, tagging.job_of(broken.operation.id)
    if operation.step in {steps.PLANNED, steps.KEEPING}:
        return await _back(broken, monitor, planned)
    loaded = operation.step == steps.LOADED
    if monitor and not loaded and planned.by == "snapshot-load":
        if await jobs.find(monitor, job, deadline=jobs.MEMORY_DEADLINE) is None:
            return await _back(broken, monitor, planned)  # it never came to that
        loaded = await _job_over(broken, monitor, job)
    if not loaded:
        await _roll_back(broken, monitor, planned)
        monitor = None
    if operation.step == steps.LOADING:
        found = await _tags(broken, monitor, planned.kept) if planned.kept else {}
        change = tagging.settled_load(planned, found)
        await context.astore.settle(operation.id, planned.machine, change, step=steps.LOADED)
    if monitor:
        await _dismiss(monitor, job)
        if not planned.paused:
            await _run_on(monitor)
    note = f"{broken.error}; the machine was not started again"
    await broken.mark_settled(error=None if monitor else note)
    return "forward"


async def _back(broken: Broken, monitor: Monitor | None, planned: LoadPlan) -> Direction:
    """Leave the guest as it was, running if it ran, and nothing of what was kept of it."""
    keeping = tagging.keeping_job_of(broken.operation.id)
    started = broken.operation.step != "planned"
    if monitor and started:
        await _job_over(broken, monitor, keeping)
        if planned.resume:
            await _run_on(monitor)
    if planned.kept and started:
        await _remove(broken, monitor, planned.kept, await _tags(broken, monitor, planned.kept))
    if monitor:
        await _dismiss(monitor, keeping)
    await broken.mark_failed()
    return "back"


async def _run_on(monitor: Monitor) -> None:
    if not (await commands.query_status(monitor)).live:
        await commands.control(monitor, "cont")


async def _roll_back(broken: Broken, monitor: Monitor | None, planned: LoadPlan) -> None:
    """Bring the disks to the snapshot without QEMU, which is ended if it lives, and the UEFI variable store.

    It may have rolled them back already and then have loaded half of its devices: such a guest must not run on.
    """
    if monitor and (process := broken.context.process(broken.machine)):
        await end(process, monitor)
    await broken.context.astore.set_process(planned.machine, None)
    for layer in planned.layers.values():
        await internal_snapshots.go_to(layer, planned.tag, qemu_img=broken.context.image.binary)
    if planned.variables:
        mine, kept = planned.variables
        await to_end(firmware_files.copy_variables, kept, mine)


async def _job_over(broken: Broken, monitor: Monitor, job: JobId) -> bool:
    """Wait for the job's end; whether there was one and it did what it should."""
    if await jobs.find(monitor, job, deadline=jobs.MEMORY_DEADLINE) is None:
        return False
    try:
        await jobs.follow(monitor, job, report=broken.report, deadline=jobs.MEMORY_DEADLINE)
    except QmpError:
        return False
    return True


async def _dismiss(monitor: Monitor, job: JobId) -> None:
    with contextlib.suppress(QmpError):
        if await jobs.find(monitor, job):
            await jobs.dismiss(monitor, job)
