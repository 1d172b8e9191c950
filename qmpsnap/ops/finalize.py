"""The moment from which a block job's result is the truth: the guest held still for it, the record made in it."""

from collections.abc import Awaitable, Callable

from qmpsnap.errors import QmpError
from qmpsnap.model import steps
from qmpsnap.ops.blockjob import BlockJob
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.session import Monitor

FINALIZE_DEADLINE = 60.0
"""Seconds from finalize to the settled store; the guest's vCPUs are stopped for a few milliseconds of it."""


async def go_over(job: BlockJob, monitor: Monitor, *, pending: bool, settle: Callable[[], Awaitable[None]]) -> None:
    """Stop the vCPUs, mark ``finalizing``, finalize, settle, and let the vCPUs go on.

    Args:
        job: the job.
        monitor: the QEMU that it runs in.
        pending: it waits for ``job-finalize``.
        settle: verifies what has become of the graph and records it.

    Raises:
        QmpError: the job cannot be finalized; the graph is as before, and the journal says ``started`` again.
    """
    running = job.step.live and (await commands.query_status(monitor)).running
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
                await job.mark(steps.STARTED)
                raise
        await commands.control(monitor, "stop")  # now the headers that finalize has changed
        await settle()
    finally:
        if running:
            await commands.control(monitor, "cont")
