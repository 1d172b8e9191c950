"""The start of a block job: its step made durable, its command sent, and the guest held where QEMU would miss writes.

A mirror (``blockdev-mirror``, and a commit of the active layer is one) first looks for what is allocated. QEMU 8.0 to
10.2, except 10.0.9 and later, tracks no write of the guest until that is over, so a block that was looked at before the
guest allocates it is never copied (docs/explanation/qemu-facts.md). There the vCPUs are stopped until the job tracks
writes. A job that does not come to that is cancelled before the guest goes on, here and in recovery.
"""

import contextlib
from typing import Protocol

import anyio

from qmpsnap.errors import DeadlinePassed, QmpError
from qmpsnap.host.threads import completed
from qmpsnap.ops.base.context import guarded
from qmpsnap.ops.jobs.blockjob import BlockJob
from qmpsnap.ops.jobs.cutover import let_run
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.session import Monitor

BEGIN_DEADLINE = 30.0
"""Seconds that a guest is held for the start of a job; a disk of usual size takes milliseconds."""


class Mark(Protocol):
    """What makes durable that a job may be started."""

    async def __call__(self, *, running: bool) -> None:
        """Do so; ``running``: the guest runs, and we may have stopped its vCPUs."""


async def start(job: BlockJob, monitor: Monitor, command: tuple[str, dict[str, object]], *, mark: Mark) -> None:
    """Start the job by its QMP command, after ``mark``; a guest that was held runs again.

    Raises:
        QmpError: QEMU refuses the job.
        DeadlinePassed: it does not track writes in time; it is cancelled.
    """
    held = await _misses_writes(job, monitor) and (await commands.query_status(monitor)).live
    async with guarded(job.context, job.machine, when=held) as guard_ready:
        await guard_ready()
        await mark(running=held)
        await job.require_files()  # the disk may have been slow
        if held:
            await _start_held(job, monitor, command)
        else:
            await monitor.execute(*command)
    if held:
        await mark(running=False)


async def may_miss_writes(job: BlockJob, monitor: Monitor, info: JobInfo) -> bool:
    """Whether a job that somebody has started does not track writes yet, so that the guest must not go on with it."""
    return not jobs.tracks_writes(info) and await _misses_writes(job, monitor)


async def _misses_writes(job: BlockJob, monitor: Monitor) -> bool:
    return job.step.live and job.is_mirror and await jobs.misses_first_writes(monitor)


async def _start_held(job: BlockJob, monitor: Monitor, command: tuple[str, dict[str, object]]) -> None:
    try:
        with anyio.fail_after(BEGIN_DEADLINE):
            await commands.control(monitor, "stop")
            await monitor.execute(*command)
            await jobs.begin(monitor, job.id)
    except BaseException as error:
        # Its end may take longer, but it cannot succeed any more. If this fails the guest waits for recovery.
        await completed(jobs.abort(monitor, job.id))
        await completed(let_run(monitor))
        if isinstance(error, TimeoutError):
            raise DeadlinePassed(
                f"job {job.id} did not track the guest's writes within {BEGIN_DEADLINE:g} s, for which the guest was"
                " paused",
                hint="QEMU 10.0.9 and 11.0 need no pause; or stop the machine first",
                effect="unknown",
                machine=job.machine.name,
            ) from error
        raise
    await completed(let_run(monitor))
    # A write of the job may have failed before `cont`, which clears the job's io-status: nobody would ever see why the
    # job is paused. Resumed, it fails once more; a job that is not paused refuses that.
    with contextlib.suppress(QmpError):
        await jobs.resume(monitor, job.id)
