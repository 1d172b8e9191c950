"""Recovery of a broken revert: from the cutover on there is only forward."""

from qmpsnap.block.image import internal_snapshots
from qmpsnap.host.threads import to_end
from qmpsnap.machine.qemu import end as end_qemu
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import RevertPlan
from qmpsnap.ops.base import volumes
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import remove_new
from qmpsnap.ops.internal import tags
from qmpsnap.ops.revert.cutover import remove_files, switch
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor


async def end(broken: Broken[RevertPlan], monitor: Monitor | None) -> Direction:
    """End a broken revert: undone before QEMU was told to stop, completed from there on."""
    operation, plan = broken.operation, broken.operation.plan
    if operation.step == steps.PLANNED:
        await remove_new(plan.overlays)
        for copy in plan.copies:
            await to_end(internal_snapshots.discard, copy.layer, copy.source)
        await volumes.undo(broken.machine, operation.id, plan.clones)
        await broken.mark_failed()
        return "back"
    if operation.step in (steps.STOPPING, steps.MERGING):
        await switch(MachineSession(broken.context, broken.machine, monitor), operation)
        monitor = None
    elif operation.step == steps.SWITCHED:
        await remove_files(broken.context, plan)
    elif (plan.vmstate or plan.inside) and monitor:
        monitor = await _end_loading(broken, monitor, plan)
    for copy in plan.copies if plan.inside and monitor is None else ():
        # The memory that was to be loaded from there is not: a later revert takes it out again.
        await tags.remove_tag(broken.context, broken.machine, None, disk=copy.disk, layer=copy.layer.id, tag=copy.tag)
    stopped = plan.restart and monitor is None
    note = f"{broken.error}; the machine was not started again"
    await broken.mark_settled(error=note if stopped else None)
    return "forward"


async def _end_loading(broken: Broken, monitor: Monitor, plan: RevertPlan) -> Monitor | None:
    """A QEMU that was to go on with memory: it runs on when that is loaded, and ends when it is not."""
    status = await commands.query_status(monitor)
    if status.status == "inmigrate" or (plan.inside and not status.live):
        if process := broken.context.process(broken.machine):
            await end_qemu(process, monitor)
        await broken.context.astore.set_process(broken.machine.name, None)
        return None
    if status.status == "paused" and not plan.paused:
        await commands.control(monitor, "cont")
    return monitor
