"""The moment from which a block job's result is the truth: the guest held still for it, the record made in it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from qmpsnap.errors import QmpError
from qmpsnap.model import steps
from qmpsnap.ops.blockjob import BlockJob
from qmpsnap.ops.context import guarded
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.session import Monitor

FINALIZE_DEADLINE = 60.0
"""Seconds from finalize to the settled store; the guest's vCPUs are stopped for a few milliseconds of it."""


@asynccontextmanager
async def watched(job: BlockJob, monitor: Monitor) -> AsyncIterator[None]:
    """For the block, in which the guest may be stopped: it runs on whatever becomes of us.

    What takes time for that is done before the block, as the guest's writes wait from a job's ``pending`` on.

    Raises:
        HostCannot: no guard can be started.
    """
    running = job.step.live and (await commands.query_status(monitor)).running
    async with guarded(job.context, job.machine, when=running) as guard_ready:
        await guard_ready()
        if running:
            await job.mark(steps.STARTED, running=True)
        yield


async def go_over(
    job: BlockJob, monitor: Monitor, *, pending: bool, settle: Callable[[], Awaitable[None]], held: bool = False
) -> None:
    """Stop the vCPUs, mark ``finalizing``, finalize, settle, and let the vCPUs go on.

    Args:
        job: the job.
        monitor: the QEMU that it runs in.
        pending: it waits for ``job-finalize``.
        settle: verifies what has become of the graph and records it.
        held: the guest ran, and was stopped by us already.

    Raises:
        QmpError: the job cannot be finalized; the graph is as before, and the journal says ``started`` again.
    """
    running = job.step.live and (held or (await commands.query_status(monitor)).running)
    # Also where nothing runs: `stop` writes every node's cached tables out. A commit into a middle layer and a stream
    # come to `pending` without that, and a QEMU killed now would take what they moved with it.
    await commands.control(monitor, "stop")
    try:
        await job.mark(steps.FINALIZING, running=running)
        if pending:
            try:
                await jobs.finalize(monitor, job.id)
            except QmpError:
                # The graph is as before and the guest stands still: what it wrote to so far is the truth again.
                await job.mark(steps.STARTED, running=running)
                raise
        await commands.control(monitor, "stop")  # now the headers that finalize has changed
        await settle()
    finally:
        if running:
            await commands.control(monitor, "cont")
