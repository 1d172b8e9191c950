"""Ending a broken mirror: until ``finalizing`` the old active layer is the truth, from then on the copy is good."""

from typing import Literal

from qmpsnap.block import place
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import job_id
from qmpsnap.model.operation import MirrorPlan, Operation
from qmpsnap.ops import copying, merge
from qmpsnap.ops.context import Context, blocking
from qmpsnap.ops.copying import Phase
from qmpsnap.ops.recover_merge import Unfinished, domain, still_works
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor


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
    """End the operation; ``forward`` when the copy is made.

    Raises:
        OperationPending: its job still works and ``unfinished`` says to leave it.
        QmpsnapError: QEMU or the files say something the rules do not cover.
    """
    plan = operation.plan
    assert isinstance(plan, MirrorPlan)
    phase = Phase.read(operation.step)
    async with domain(context, machine, qemu, plan) as monitor:
        forward = await _end_job(
            context, machine, monitor, operation, plan, phase=phase, unfinished=unfinished, report=report
        )
        if monitor and not forward:
            await merge.close_nodes(monitor, (plan.target,))
        if monitor and plan.live and phase.running and not (await commands.query_status(monitor)).running:
            await commands.control(monitor, "cont")
    if forward:
        await copying.tidy(context, operation.id, plan, identity=phase.identity)
        return "forward"
    await _remove_made(machine, operation, plan, phase)
    await blocking(lambda: context.store.mark(operation.id, "failed", error=error))
    return "back"


async def _end_job(
    context: Context,
    machine: Machine,
    monitor: Monitor | None,
    operation: Operation,
    plan: MirrorPlan,
    *,
    phase: Phase,
    unfinished: Unfinished,
    report: Report,
) -> bool:
    """Bring the job to one of its two ends; True when the copy is made."""
    job = job_id(operation.id, plan.disk)
    info = await jobs.find(monitor, job) if monitor else None
    if phase.name in ("planned", "made"):
        return False
    if phase.name == "started":
        if monitor is None or info is None:
            return False
        if info.status == "concluded" or unfinished == "cancel":
            await jobs.cancel(monitor, job)
            return False
        if unfinished == "refuse":
            raise still_works(operation, info.status)
        if info.status == "paused":
            await jobs.resume(monitor, job)
        await copying.carry_on(context, machine, monitor, operation.id, plan, identity=phase.identity, report=report)
        return True
    if phase.name == "finalizing":
        if monitor and info and info.status == "pending":
            await jobs.finalize(monitor, job)
        await copying.settle(context, machine, monitor, operation.id, plan, identity=phase.identity)
    if monitor is not None:
        await jobs.dismiss(monitor, job)
        await merge.close_nodes(monitor, copying.gone(plan))
    return True


async def _remove_made(machine: Machine, operation: Operation, plan: MirrorPlan, phase: Phase) -> None:
    """Remove the unfinished copy if we made it; an image or export of the user's stays, overwritten in part."""
    if not plan.made:
        return
    part = copying.part_of(machine, operation.id, plan)
    if phase.name == "planned":  # nobody else makes files of that name
        if found := await place.identity_of(part):
            await place.discard(part, found)
        return
    for path in (part, plan.target.path):
        await place.discard(path, phase.identity)
