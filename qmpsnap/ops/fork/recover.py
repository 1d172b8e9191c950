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


async def end(broken: Broken[ForkPlan], monitor: Monitor | None) -> Direction:
    """Undo a fork that has no machine yet; else its QEMU runs on if it has its memory, and ends if it has not."""
    if broken.operation.step != steps.STARTING:
        if broken.operation.step == steps.BAKING:
            await clean_templates(broken.context)
        return await lifecycle.end(broken, None)
    runs = monitor is not None and await _runs(broken, monitor)
    await broken.mark_settled(error=None if runs else f"{broken.error}; the machine was not started")
    return "forward"


async def _runs(broken: Broken[ForkPlan], monitor: Monitor) -> bool:
    """Whether its QEMU has its memory, and goes on as was asked; else it is ended."""
    context, plan = broken.context, broken.operation.plan
    machine = await context.astore.machine(plan.machine)
    process = context.process(machine)
    status = await commands.query_status(monitor)
    loaded = status.status in ("paused", "running", "suspended")
    if not loaded:
        if process:
            await end_qemu(process, monitor)
        await context.astore.set_process(machine.name, None)
        return False
    if status.status == "paused" and not plan.paused:
        await commands.control(monitor, "cont")
    elif status.running and plan.paused:  # it was to get its identity first
        await commands.control(monitor, "stop")
    await context.astore.set_process(machine.name, process)
    return True


async def clean_templates(context: Context) -> None:
    """Remove what dead processes have left of templates that they were making, where nobody makes one."""
    for shelf in templates.shelves(context.home):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            async with in_thread(shelf.locked()):
                await bake.clean(shelf)
