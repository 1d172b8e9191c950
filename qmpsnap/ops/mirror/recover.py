"""Ending a broken mirror: until ``finalizing`` the old active layer is the truth, from then on the copy is good."""

from msgspec.structs import replace

from qmpsnap.block.image import staged
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import MirrorPlan
from qmpsnap.ops.jobs import cutover
from qmpsnap.ops.jobs.blockjob import qemu_of
from qmpsnap.ops.merge import job as merge
from qmpsnap.ops.mirror import job as copying
from qmpsnap.ops.mirror.job import MirrorJob, Phase
from qmpsnap.ops.session import external_writers
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp import jobs
from qmpsnap.qmp.session import Monitor


async def end(broken: Broken[MirrorPlan], qemu: Monitor | None) -> Direction:
    """End the operation; ``forward`` when the copy is made.

    Raises:
        OperationPending: its job still works and is to be left alone.
        QmpsnapError: QEMU or the files say something the rules do not cover.
    """
    operation = broken.operation
    plan = operation.plan
    phase = Phase.read(operation.step)
    job = MirrorJob(
        context=broken.context,
        machine=broken.machine,
        operation=operation.id,
        step=plan,
        identity=phase.identity,
        report=broken.report,
    )
    async with qemu_of(job, qemu) as monitor:
        running = await cutover.runs(job, monitor, before=phase.running)
        async with cutover.going_on(job, monitor, when=running) as hold:  # also where its job is left to its work
            try:
                forward = await _end_job(broken, job, monitor, hold, phase=phase.name, running=running)
            except cutover.NotFinalized as error:
                forward, broken = False, replace(broken, error=error.message)
                if monitor:
                    await jobs.cancel(monitor, job.id)
            if monitor and not forward:
                await merge.close_nodes(monitor, (plan.target,))
    if forward:
        try:
            await copying.write_out(job)
        except (StoreMismatch, HostCannot) as error:  # a finished copy is the user's, who may have taken it away
            await broken.mark_settled(error=f"the copy was finished, but {error.message}")
        else:
            if qemu is None:
                await external_writers.require_unused(broken, plan.removed)
            await copying.tidy(job)
        return "forward"
    await _remove_made(job, phase=phase.name)
    await broken.mark_failed()
    return "back"


async def _end_job(
    broken: Broken, job: MirrorJob, monitor: Monitor | None, hold: cutover.Hold, *, phase: str, running: bool
) -> bool:
    """Bring the job to one of its two ends; True when the copy is made."""
    info = await jobs.find(monitor, job.id) if monitor else None
    if phase in (steps.PLANNED, steps.MADE):
        return False
    if phase == steps.STARTED:
        if monitor is None or info is None:
            return False
        if info.status == "concluded" or broken.unfinished == "cancel":
            await jobs.cancel(monitor, job.id)
            return False
        if broken.unfinished == "refuse":
            raise broken.still_works(info.status)
        if info.status == "paused":
            await jobs.resume(monitor, job.id)
        await copying.carry_on(job, monitor)
        return True
    if phase == steps.FINALIZING:
        if monitor is None:
            return await _settled_without_qemu(broken, job)
        await cutover.make_true(job, monitor, hold, running=running, settle=lambda: copying.settle(job, monitor))
    if monitor is not None:
        await jobs.dismiss(monitor, job.id)
        await merge.close_nodes(monitor, copying.gone(job.step))
    return True


async def _settled_without_qemu(broken: Broken, job: MirrorJob) -> bool:
    """Record a copy whose QEMU has ended, unless the old active layer still counts; True when the copy does."""
    old, new = job.step.chain[-1], job.step.target
    if job.moves_guest and not await external_writers.new_counts(broken, old=[old], new=[new]):
        return False
    await copying.settle(job, None)
    return True


async def _remove_made(job: MirrorJob, *, phase: str) -> None:
    """Remove the unfinished copy if we made it; an image or export of the user's stays, overwritten in part."""
    if not job.step.made:
        return
    part = copying.part_of(job)
    if phase == steps.PLANNED:  # nobody else makes files of that name
        if found := await staged.identity_of(part):
            await staged.discard(part, found)
        return
    for path in (part, job.step.target.path):
        await staged.discard(path, job.identity)
