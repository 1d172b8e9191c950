"""Ending a broken internal snapshot, and a broken return to one: the job in QEMU and the tags in the images decide."""

import contextlib

from anyio import to_thread

from qmpsnap.block import tags
from qmpsnap.errors import QmpError
from qmpsnap.machine import worker
from qmpsnap.model.blockdev import node_name
from qmpsnap.model.operation import InternalPlan, LoadPlan
from qmpsnap.ops import tagging
from qmpsnap.ops.broken import Broken, Direction
from qmpsnap.ops.context import blocking
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.commands import Tag
from qmpsnap.qmp.session import Monitor


async def end_create(broken: Broken, monitor: Monitor | None) -> Direction:
    """End an internal snapshot: forward when every image has its tag, else none keeps one.

    Its job is over in the time it takes to write the memory, and cannot be cancelled: it is waited for.
    """
    planned = broken.operation.plan
    assert isinstance(planned, InternalPlan)
    if broken.operation.step == "recorded":
        if monitor:
            await _dismiss(broken, monitor)
        await broken.mark_settled()
        return "forward"
    found: dict[str, tuple[Tag, ...]] = {}
    if broken.operation.step != "planned":
        if monitor:
            await _job_over(broken, monitor)
            if planned.resume and not (await commands.query_status(monitor)).running:
                await commands.control(monitor, "cont")
        found = await _tags(broken, monitor, planned)
    whole = found and all(tagging.has_tag(found, node_name(at), planned.tag) for at in planned.layers.values())
    if whole and broken.unfinished != "cancel":
        change = tagging.settled(planned, found)
        await blocking(broken.context.store.settle, broken.operation.id, planned.machine, change)
    else:
        await _remove(broken, monitor, planned, found)
    if monitor:
        await _dismiss(broken, monitor)
    return "forward" if whole and broken.unfinished != "cancel" else "back"


async def _tags(broken: Broken, monitor: Monitor | None, planned: InternalPlan) -> dict[str, tuple[Tag, ...]]:
    if monitor:
        return await commands.query_tags(monitor)
    found: dict[str, tuple[Tag, ...]] = {}
    context, machine = broken.context, broken.machine
    for chain in await blocking(context.store.chains, machine.name):
        if chain.disk in planned.layers:
            run_dir = context.home.run_dir(machine.name)
            async with worker.working_on(chain, machine, qemu=context.qemu, run_dir=run_dir) as qemu:
                found |= await commands.query_tags(qemu)
    return found


async def _remove(
    broken: Broken, monitor: Monitor | None, planned: InternalPlan, found: dict[str, tuple[Tag, ...]]
) -> None:
    context, machine = broken.context, broken.machine
    for chain in await blocking(context.store.chains, machine.name):
        node = node_name(chain.active)
        if chain.disk in planned.layers and tagging.has_tag(found, node, planned.tag):
            async with tagging.open_in(context, machine, monitor, chain) as qemu:
                await commands.delete_tag(qemu, node, planned.tag)
    if planned.variables:
        await to_thread.run_sync(tagging.forget_variables, planned.variables[1])
    await broken.mark_failed()


async def end_load(broken: Broken, monitor: Monitor | None) -> Direction:
    """End a return to a snapshot inside the active layers: once its job was started, forward is the only way.

    Without a QEMU the disks are rolled back here, which changes nothing where they are already; the machine is stopped.
    """
    planned = broken.operation.plan
    assert isinstance(planned, LoadPlan)
    context, operation = broken.context, broken.operation
    if operation.step == "planned":
        await broken.mark_failed()
        return "back"
    if monitor is None:
        if operation.step == "loading":
            for layer in planned.layers.values():
                await tags.go_to(layer.path, planned.tag, qemu_img=context.image.binary)
            await blocking(lambda: context.store.settle(operation.id, planned.machine, planned.change, step="loaded"))
        note = f"{broken.error}; the machine was not started again: qmpsnap start {planned.machine}"
        await broken.mark_settled(error=note)
        return "forward"
    loaded = operation.step == "loaded" or await _job_over(broken, monitor)
    if operation.step == "loading" and loaded:
        await blocking(lambda: context.store.settle(operation.id, planned.machine, planned.change, step="loaded"))
    await _dismiss(broken, monitor)
    if not planned.paused and not (await commands.query_status(monitor)).running:
        await commands.control(monitor, "cont")
    if not loaded:
        await broken.mark_failed()
        return "back"
    await broken.mark_settled()
    return "forward"


async def _job_over(broken: Broken, monitor: Monitor) -> bool:
    """Wait for the job's end; whether there was one and it did what it should."""
    job = tagging.job_of(broken.operation.id)
    if await jobs.find(monitor, job) is None:
        return False
    try:
        await jobs.follow(monitor, job, report=broken.report)
    except QmpError:
        return False
    return True


async def _dismiss(broken: Broken, monitor: Monitor) -> None:
    job = tagging.job_of(broken.operation.id)
    with contextlib.suppress(QmpError):
        if await jobs.find(monitor, job):
            await jobs.dismiss(monitor, job)
