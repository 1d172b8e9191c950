"""Recovery of an interrupted fork: before its machine exists there is only back, from then on only forward."""

import contextlib

from qmpsnap.machine import templates
from qmpsnap.machine.qemu import end as end_qemu
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import ForkPlan
from qmpsnap.ops.base.context import Context, in_thread
from qmpsnap.ops.fork import bake
from qmpsnap.ops.lifecycle import recover as lifecycle
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor


async def end(broken: Broken[ForkPlan], _: Monitor | None) -> Direction:
    """Undo a fork that has no machine yet; else its QEMU runs on if it has its memory, and ends if it has not."""
    if broken.operation.step != steps.STARTING:
        if broken.operation.step == steps.BAKING:
            await clean_templates(broken.context)
        return await lifecycle.end(broken, None)
    runs = await _end_loading(broken)
    await broken.mark_settled(error=None if runs else f"{broken.error}; the machine was not started")
    return "forward"


async def _end_loading(broken: Broken[ForkPlan]) -> bool:
    context, plan = broken.context, broken.operation.plan
    machine = await context.astore.machine(plan.machine)
    process = context.process(machine)
    if process is None:
        return False
    async with context.monitor(machine) as qemu:
        if qemu:
            status = await commands.query_status(qemu)
            if status.status == "paused" and not plan.paused:
                await commands.control(qemu, "cont")
            elif status.running and plan.paused:  # it was to get its identity first
                await commands.control(qemu, "stop")
            if status.status in ("paused", "running", "suspended"):
                await context.astore.set_process(machine.name, process)
                return True
        await end_qemu(process, qemu)
    await context.astore.set_process(machine.name, None)
    return False


async def clean_templates(context: Context) -> None:
    """Remove what dead processes have left of templates that they were making, where nobody makes one."""
    for shelf in templates.shelves(context.home):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            async with in_thread(shelf.locked()):
                await bake.clean(shelf)
