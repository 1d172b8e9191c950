"""Ending a broken commit, stream or delete: the journal's step, the job QEMU still has, and the headers decide."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from qmpsnap.errors import OperationPending
from qmpsnap.machine import worker
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import job_id
from qmpsnap.model.operation import Change, Merge, MergePlan, MirrorPlan, Operation, Removal
from qmpsnap.ops import merge
from qmpsnap.ops.context import Context, blocking
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor

Unfinished = Literal["refuse", "carry on", "cancel"]
"""What to do with a job that still works: leave it to its work, see it to its end, or end it."""


async def end(
    context: Context,
    machine: Machine,
    qemu: Monitor | None,
    operation: Operation,
    *,
    unfinished: Unfinished = "refuse",
    error: str = "interrupted",
    report: Report = unreported,
) -> Literal["forward", "back"]:
    """End the operation; ``forward`` when something of it took effect.

    Raises:
        OperationPending: its job still works and ``unfinished`` says to leave it.
        QmpsnapError: QEMU or the files say something the rules do not cover.
    """
    plan = operation.plan
    assert isinstance(plan, MergePlan)
    if operation.step == "planned":
        return await _fail(context, machine, operation, plan, undo=True, error=error)
    number, phase, was_running = _read_step(operation.step)
    step = plan.steps[number] if number < len(plan.steps) else None
    if isinstance(step, Merge):
        async with domain(context, machine, qemu, step) as monitor:
            took = await _end_step(
                context, machine, monitor, operation, step, phase=phase, unfinished=unfinished, report=report
            )
            if monitor and step.live and was_running and not (await commands.query_status(monitor)).running:
                await commands.control(monitor, "cont")
        if not took:
            # A commit that may have written has overwritten what its snapshots held: they stay marked.
            undo = not any(isinstance(other, Merge) and other.kind == "commit" for other in plan.steps)
            return await _fail(context, machine, operation, plan, undo=undo, error=error)
    if isinstance(step, Merge | Removal):
        await merge.remove_files(step.removed)
    if unfinished == "carry on":
        await merge.run(context, machine, qemu, operation, first=number + 1, report=report)
    else:
        await blocking(lambda: context.store.mark(operation.id, "settled", step="settled"))
    return "forward"


async def _end_step(
    context: Context,
    machine: Machine,
    monitor: Monitor | None,
    operation: Operation,
    step: Merge,
    *,
    phase: str,
    unfinished: Unfinished,
    report: Report,
) -> bool:
    """Bring one step to one of its two ends; True when it took effect."""
    plan = operation.plan
    assert isinstance(plan, MergePlan)
    number = plan.steps.index(step)
    job = job_id(operation.id, step.disk)
    info = await jobs.find(monitor, job) if monitor else None
    if phase == "started":
        if monitor is None or info is None:
            return False
        if info.status == "concluded" or unfinished == "cancel":
            await jobs.cancel(monitor, job)
            await merge.freeze_again(monitor, machine, step)
            return False
        if unfinished == "refuse":
            raise still_works(operation, info.status)
        if info.status == "paused":
            await jobs.resume(monitor, job)
        await merge.carry_on(context, machine, monitor, operation.id, step, number=number, report=report)
        return True
    if phase == "finalizing":
        if monitor is None:
            await merge.settle_without_qemu(context, machine, operation.id, step, number=number)
            return True
        if info is not None and info.status == "pending":
            await jobs.finalize(monitor, job)
        await merge.settle(context, machine, monitor, operation.id, step, number=number)
    if monitor is not None:
        await jobs.dismiss(monitor, job)
        await merge.close_gone(monitor, step)
        await merge.freeze_again(monitor, machine, step)
    return True


async def _fail(
    context: Context, machine: Machine, operation: Operation, plan: MergePlan, *, undo: bool, error: str
) -> Literal["forward", "back"]:
    """The chain is as before; ``forward`` when what was true from the opening on stays so."""
    if undo:
        await blocking(lambda: context.store.settle(operation.id, machine.name, plan.undo, step="undone"))
    await blocking(lambda: context.store.mark(operation.id, "failed", error=error))
    return "back" if plan.opening == Change() or (undo and plan.undo != Change()) else "forward"


@asynccontextmanager
async def domain(
    context: Context, machine: Machine, qemu: Monitor | None, step: Merge | MirrorPlan
) -> AsyncIterator[Monitor | None]:
    """The QEMU that the job runs in, if that lives."""
    if step.live:
        yield qemu
        return
    async with worker.left_behind(machine, context.home.run_dir(machine.name)) as monitor:
        yield monitor


def _read_step(step: str) -> tuple[int, str, bool]:
    number, phase, *flags = step.split(":")
    return int(number), phase, "running" in flags


def still_works(operation: Operation, status: str) -> OperationPending:
    """Its job goes on, and nobody has said what to do with it."""
    return OperationPending(
        f"the job of operation {operation.id} ({operation.verb}) on machine {operation.machine} is {status};"
        " nothing was changed",
        hint=f"qmpsnap job wait {operation.machine}, or: qmpsnap job cancel {operation.machine}",
        machine=operation.machine,
        operation=str(operation.id),
    )
