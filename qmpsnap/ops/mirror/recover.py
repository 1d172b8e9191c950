"""Ending a broken mirror: until ``finalizing`` the old active layer is the truth, from then on the copy is good."""

from qmpsnap.block.image import staged
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import MirrorPlan
from qmpsnap.ops.jobs.blockjob import qemu_of
from qmpsnap.ops.jobs.ending import end_job
from qmpsnap.ops.mirror import job as copying
from qmpsnap.ops.mirror.job import MirrorJob, Phase
from qmpsnap.ops.session import external_writers
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp.session import Monitor


async def end(broken: Broken[MirrorPlan], qemu: Monitor | None) -> Direction:
    """End the operation; ``forward`` when the copy is made."""
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
        forward, broken = await end_job(broken, job, monitor, phase=phase.name, running=phase.running)
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
