"""Ending a broken job: the journal's phase, the job that QEMU still has, and the files decide."""

from msgspec.structs import replace

from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import P
from qmpsnap.ops.jobs import beginning, cutover
from qmpsnap.ops.jobs.blockjob import BlockJob
from qmpsnap.ops.session import external_writers
from qmpsnap.ops.session.pending import Broken
from qmpsnap.qmp import jobs
from qmpsnap.qmp.session import Monitor


async def end_job(
    broken: Broken[P], job: BlockJob, monitor: Monitor | None, *, phase: str, running: bool
) -> tuple[bool, Broken[P]]:
    """Complete or undo a job; returns whether it took effect, and the operation with the reason if it did not.

    1. It never started, or it is ``started`` and no QEMU has it: it has no effect.
    2. It is ``started`` and has failed, is not wanted any more, or would miss writes of the guest: it is cancelled.
    3. It is ``started`` and still runs: it is left running, or completed if that is wanted.
    4. It is ``finalizing`` without a QEMU: both sides were equal, so its effect is written to the files, unless the
       owner of an adopted machine has continued with the old side.
    5. It is ``finalizing``: it is finalized and recorded, or undone if that fails.
    6. It is ``settled``: the job and the nodes that QEMU still has are removed.

    Raises:
        OperationPending: it still runs, or another process uses a layer that would be removed.
        QmpsnapError: QEMU or the files are in a state that the rules do not cover.
    """
    running = await cutover.runs(job, monitor, before=running)
    async with cutover.going_on(job, monitor, when=running) as hold:  # also where its job is left to its work
        try:
            took = await _takes_effect(broken, job, monitor, hold, phase=phase, running=running)
        except cutover.NotFinalized as error:
            took, broken = False, replace(broken, error=error.message)
        if monitor:
            await (job.close(monitor) if took else job.let_go(monitor))
    return took, broken


async def _takes_effect(
    broken: Broken, job: BlockJob, monitor: Monitor | None, hold: cutover.Hold, *, phase: str, running: bool
) -> bool:
    if phase == steps.STARTED:
        info = await jobs.find(monitor, job.id) if monitor else None
        if monitor is None or info is None or info.status in {"aborting", "concluded"}:
            return False
        if broken.unfinished == "cancel" or (running and await beginning.may_miss_writes(job, monitor, info)):
            return False
        if broken.unfinished == "refuse":
            raise broken.still_works(info.status)
        if info.status == "paused":
            await jobs.resume(monitor, job.id)
        await job.carry_on(monitor)
    elif phase == steps.FINALIZING and monitor:
        await cutover.make_true(job, monitor, hold, running=running)
    elif phase == steps.FINALIZING:
        old = job.step.chain[-1]
        if job.moves_guest and not await external_writers.new_counts(broken, old=[old], new=[job.result]):
            return False
        await external_writers.require_unused(broken, job.step.removed)
        await job.settle(None)
    return phase not in {steps.PLANNED, steps.MADE}
