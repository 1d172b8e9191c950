"""Running merges: one block job after the other, each journalled so that a death at any point has one right end.

Per job: ``N:started`` (it may have written) -> ready, complete -> pending -> vCPUs stopped, all caches written out ->
``N:finalizing`` (both sides are equal; from here the result is the truth) -> finalize, graph verified -> ``N:settled``
with the change, in one SQL transaction -> vCPUs go on -> job dismissed, nodes closed, files removed.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import anyio
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.backing import set_backing
from qmpsnap.block.image import remove
from qmpsnap.errors import QemuGone, QmpError, StoreMismatch
from qmpsnap.machine import worker
from qmpsnap.model.blockdev import layer_options, node_name
from qmpsnap.model.chain import Chain, Layer
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import JobId, NodeName, OperationId, job_id
from qmpsnap.model.operation import Merge, MergePlan, MirrorPlan, Operation, Removal
from qmpsnap.ops import finalize
from qmpsnap.ops.context import Context, blocking
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor

FINALIZE_DEADLINE = 60.0
"""Seconds from finalize to the settled store; the guest's vCPUs are stopped for a few milliseconds of it."""


async def run(
    context: Context,
    machine: Machine,
    qemu: Monitor | None,
    operation: Operation,
    *,
    first: int = 0,
    report: Report = unreported,
) -> None:
    """Carry out a plan's steps from number ``first`` on and settle the operation.

    Raises:
        QmpsnapError: a job failed, was refused or lost; the caller asks :func:`end` what became of it.
    """
    plan = operation.plan
    assert isinstance(plan, MergePlan)
    for number, step in enumerate(plan.steps[first:], start=first):
        if isinstance(step, Removal):
            await blocking(
                lambda s=step, n=number: context.store.settle(operation.id, machine.name, s.change, step=f"{n}:settled")
            )
            await remove_files(step.removed)
        else:
            async with monitor_for(context, machine, qemu, step) as monitor:
                await _merge(context, machine, monitor, operation.id, step, number=number, report=report)
            await remove_files(step.removed)
    await blocking(lambda: context.store.mark(operation.id, "settled", step="settled"))


async def _merge(
    context: Context,
    machine: Machine,
    monitor: Monitor,
    operation: OperationId,
    step: Merge,
    *,
    number: int,
    report: Report,
) -> None:
    job = job_id(operation, step.disk)
    await blocking(lambda: context.store.mark(operation, "running", step=f"{number}:started"))
    await monitor.execute(*start_command(job, step, root=await root_of(monitor, step)))
    await carry_on(context, machine, monitor, operation, step, number=number, report=report)


async def carry_on(
    context: Context,
    machine: Machine,
    monitor: Monitor,
    operation: OperationId,
    step: Merge,
    *,
    number: int,
    report: Report = unreported,
) -> None:
    """Take a job that exists, in whatever state, to its end; also where another process of ours started it."""
    job = job_id(operation, step.disk)
    info = await jobs.follow(monitor, job, "ready", "pending", report=report)
    if info.status == "ready":
        await jobs.complete(monitor, job)
        info = await jobs.follow(monitor, job, "pending", report=report)
    with anyio.CancelScope(shield=True):  # past this point there is only forward, and it takes milliseconds
        with anyio.fail_after(FINALIZE_DEADLINE):
            await _go_over(context, machine, monitor, operation, step, number=number, pending=info.status == "pending")
    report(replace(info, status="concluded"))


async def _go_over(
    context: Context,
    machine: Machine,
    monitor: Monitor,
    operation: OperationId,
    step: Merge,
    *,
    number: int,
    pending: bool,
) -> None:
    job = job_id(operation, step.disk)
    await finalize.go_over(
        context,
        monitor,
        operation,
        job,
        live=step.live,
        pending=pending,
        step=lambda phase: f"{number}:{phase}",
        settle=lambda: settle(context, machine, monitor, operation, step, number=number),
    )
    await jobs.dismiss(monitor, job)
    await close_gone(monitor, step)
    await freeze_again(monitor, machine, step)


async def settle(
    context: Context, machine: Machine, monitor: Monitor | None, operation: OperationId, step: Merge, *, number: int
) -> None:
    """Verify that the graph or the headers say what the change says, then record it.

    Raises:
        StoreMismatch: they do not; the operation stays open.
    """
    if monitor is not None:
        await _verify(monitor, machine, step)
    for layer in step.rebased:
        await set_backing(layer, step.into, qemu_img=context.image.binary)
    change = step.change
    await blocking(lambda: context.store.settle(operation, machine.name, change, step=f"{number}:settled"))


async def _verify(monitor: Monitor, machine: Machine, step: Merge) -> None:
    gone = {layer.id for layer in _gone(step)}
    expected = tuple(layer.id for layer in step.chain if layer.id not in gone)
    disks = graph.by_disk(await graph.read(monitor), frozenset(layer.id for layer in step.chain))
    found = disks.get(step.disk)
    if found is None or found.nodes != expected:
        raise StoreMismatch(
            f"after the job, QEMU's chain of disk {step.disk} is {' <- '.join(found.nodes) if found else 'empty'},"
            f" expected {' <- '.join(expected)}",
            hint=f"qmpsnap chain {machine.name} {step.disk} shows both sides",
            effect="unknown",
            machine=machine.name,
        )


async def settle_without_qemu(
    context: Context, machine: Machine, operation: OperationId, step: Merge, *, number: int
) -> None:
    """QEMU died between finalize and our record: both sides were equal, so the result is made true in the headers."""
    above = [layer for layer in step.chain if layer.backing == step.top.id]
    for layer in (*above, *step.rebased) if step.kind == "commit" else ():
        await set_backing(layer, step.into, qemu_img=context.image.binary)
    if step.kind == "stream":
        await set_backing(step.into, step.base, qemu_img=context.image.binary)
    change = step.change
    await blocking(lambda: context.store.settle(operation, machine.name, change, step=f"{number}:settled"))


async def remove_files(layers: Iterable[Layer]) -> None:
    """Remove files of layers that the store has forgotten; gone already is fine, another file is left alone."""
    for layer in layers:
        if layer.owned:
            await remove(layer.path, device=layer.device, inode=layer.inode)


async def close_gone(monitor: Monitor, step: Merge) -> None:
    """Close the nodes that left the chain: QEMU keeps them, and the next snapshot would find them busy."""
    await close_nodes(monitor, _gone(step))


async def close_nodes(monitor: Monitor, layers: Iterable[Layer]) -> None:
    """Close the nodes of these layers, given top first, where QEMU has them."""
    for layer in layers:
        # Asked each time: a node that QEMU opened by itself, for somebody else's -drive, goes with the one above it.
        if (name := node_name(layer)) in graph.node_names(await graph.read(monitor)):
            try:
                await commands.blockdev_del(monitor, name)
            except QmpError:
                if layer.owned:  # else it is the node of whoever launched QEMU, who may use it for something else
                    raise


async def root_of(monitor: Monitor, step: Merge) -> NodeName:
    """The node that the device reads: a filter on top of the chain, where there is one, else the root itself."""
    known = frozenset(layer.id for layer in step.chain)
    found = graph.by_disk(await graph.read(monitor), known).get(step.disk)
    return NodeName(found.above[0] if found and found.nodes and found.above else step.root)


async def freeze_again(monitor: Monitor, machine: Machine, step: Merge) -> None:
    """Open the layer that was written to read-only again, where the guest does not write to it.

    QEMU leaves it writable when a commit of the active layer is cancelled and, from 10.0 on, after a stream.
    """
    name = node_name(step.into)
    found = graph.by_disk(await graph.read(monitor), frozenset(layer.id for layer in step.chain)).get(step.disk)
    if found is None or name not in found.nodes[:-1]:
        return
    if all(node.ro for node in await commands.query_nodes(monitor) if node.node_name == name):
        return
    place = found.nodes.index(name)
    below = NodeName(found.nodes[place - 1]) if place else None
    options = layer_options(step.into, machine.require_disk(step.disk), backing=below, read_only=True)
    await commands.blockdev_reopen(monitor, options | {"file": f"{name}.file"})


def start_command(job: JobId, step: Merge, *, root: NodeName | None = None) -> tuple[str, dict[str, object]]:
    """The QMP command that starts a step's job; pure.

    Args:
        job: the job's id.
        step: what it does.
        root: from :func:`root_of`: ``block-commit`` takes no other node ("Need a root block node"), a stream any.
    """
    if step.kind == "commit":
        command, arguments = jobs.commit_arguments(
            job,
            root=NodeName(step.root),
            top=node_name(step.top),
            base=node_name(step.into),
            base_path=step.into.path,
        )
        return command, arguments | ({"device": root} if root else {})
    return jobs.stream_arguments(
        job,
        into=node_name(step.into),
        base=node_name(step.base) if step.base else None,
        base_path=step.base.path if step.base else None,
    )


def _gone(step: Merge) -> tuple[Layer, ...]:
    """The layers that leave the chain the job runs in, top first: each is the other's reader."""
    ids = [layer.id for layer in step.chain]
    if step.kind == "commit":
        low, high = ids.index(step.into.id) + 1, ids.index(step.top.id) + 1
    else:
        low, high = (ids.index(step.base.id) + 1 if step.base else 0), ids.index(step.into.id)
    return tuple(reversed(step.chain[low:high]))


@asynccontextmanager
async def monitor_for(
    context: Context, machine: Machine, qemu: Monitor | None, step: Merge | MirrorPlan
) -> AsyncIterator[Monitor]:
    """The machine's QEMU for its live chain, a worker for any other."""
    if step.live:
        if qemu is None:
            raise QemuGone(f"QEMU of machine {machine.name} has ended", machine=machine.name)
        yield qemu
        return
    run_dir = context.home.run_dir(machine.name)
    chain = Chain(step.disk, step.chain)
    async with worker.working_on(chain, machine, qemu=context.qemu, run_dir=run_dir) as monitor:
        yield monitor
