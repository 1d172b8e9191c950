"""Ending a broken commit, stream or delete: the journal's step, the job QEMU still has, and the headers decide."""

from msgspec.structs import replace

from qmpsnap.block.image.backing import durable_size
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.host.threads import to_end
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Change, Merge, MergePlan, Removal
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.jobs.blockjob import qemu_of
from qmpsnap.ops.jobs.ending import end_job
from qmpsnap.ops.merge import job as merge
from qmpsnap.ops.merge.job import MergeJob
from qmpsnap.ops.session import external_writers
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.qmp import jobs
from qmpsnap.qmp.session import Monitor


async def end(broken: Broken[MergePlan], qemu: Monitor | None) -> Direction:
    """End the operation; ``forward`` when something of it took effect."""
    session = MachineSession(broken.context, broken.machine, qemu)
    operation, plan = broken.operation, broken.operation.plan
    for removal in plan.steps:
        if isinstance(removal, Removal):
            await merge.remove_kept(session, removal)  # their snapshots went with the opening
    if operation.step in {steps.PLANNED, steps.UNDONE}:
        return await _undo(broken, plan, opening=True)
    number, phase, was_running = _read_step(operation.step)
    step = plan.steps[number] if number < len(plan.steps) else None
    if isinstance(step, Merge):
        job = MergeJob(
            context=broken.context,
            machine=broken.machine,
            operation=operation.id,
            step=step,
            number=number,
            report=broken.report,
        )
        async with qemu_of(job, qemu) as monitor:
            refused = phase == steps.STARTED and await _never_began(broken, job, monitor)
            took, broken = await end_job(broken, job, monitor, phase=phase, running=was_running)
        if not took:
            await _keep_written(job)
            # A commit that may have written has overwritten what its snapshots held: they stay marked.
            overwritten = any(isinstance(other, Merge) and other.kind == "commit" for other in plan.steps)
            return await _undo(broken, plan, opening=refused or not overwritten)
    if isinstance(step, Merge | Removal):
        if qemu is None:
            await external_writers.require_unused(broken, step.removed)
        await merge.remove_files(broken.context, step.removed)
    if broken.unfinished == "carry on":
        await merge.run(session, operation, first=number + 1, report=broken.report)
    else:
        await broken.mark_settled()
    return "forward"


async def _never_began(broken: Broken, job: MergeJob, monitor: Monitor | None) -> bool:
    """Whether it is certain that QEMU refused the job, the plan's first, so that nothing was written.

    A job that was started stays in the guest's QEMU until it is dismissed. But an earlier recovery that died, or the
    user, may have dismissed it, and the owner may have launched QEMU again. So the file is compared as well: its state
    must be the one recorded in the step. A worker ends with its jobs, so nothing is certain about those.
    """
    if monitor is None or not job.step.live or job.number != 0 or await jobs.find(monitor, job.id):
        return False
    if not await merge.is_frozen(monitor, job.step):  # what has changed need not be in the file yet
        return False
    state = await to_end(merge.state_of, job.step.into.path)
    marks = {steps.of_job(job.number, steps.STARTED, running=held, state=state) for held in (False, True)}
    return bool(state) and broken.operation.step in marks


async def _keep_written(job: MergeJob) -> None:
    """Make durable what a job that has no effect wrote, before its layer is compared with what it is now.

    A base that a commit has lengthened, which QEMU does first, is recorded as such: nothing shortens it again. Readers
    through the layers above read the same as before: zeros beyond the former end.
    """
    into, size = job.step.into, max(job.step.into.virtual_size, job.step.top.virtual_size)
    lengthened = job.step.kind == "commit" and size > into.virtual_size
    try:
        found = await to_end(durable_size, into)
    except (HostCannot, StoreMismatch):
        if lengthened:
            raise
        return  # `check` tells what is wrong with it
    if lengthened and found == size:
        change = Change(layers=(replace(into, virtual_size=size),))
        await job.context.astore.apply(job.machine.name, change)


async def _undo(broken: Broken, plan: MergePlan, *, opening: bool) -> Direction:
    """The chain is as before; ``forward`` when what was true from the opening on stays so."""
    if opening and plan.undo != Change():
        operation = broken.operation
        await broken.context.astore.settle(operation.id, broken.machine.name, plan.undo, step=steps.UNDONE)
    await broken.mark_failed()
    return "back" if plan.opening == Change() or (opening and plan.undo != Change()) else "forward"


def _read_step(step: str) -> tuple[int, str, bool]:
    number, phase, *flags = step.split(":")
    return int(number), phase, "running" in flags
