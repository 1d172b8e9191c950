"""The moment from which a block job's result is the truth: the guest held still for it, the record made in it."""

from collections.abc import Awaitable, Callable

from qmpsnap.errors import QmpError
from qmpsnap.model.names import JobId, OperationId
from qmpsnap.ops.context import Context, blocking
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.session import Monitor


async def go_over(
    context: Context,
    monitor: Monitor,
    operation: OperationId,
    job: JobId,
    *,
    live: bool,
    pending: bool,
    step: Callable[[str], str],
    settle: Callable[[], Awaitable[None]],
) -> None:
    """Stop the vCPUs, mark ``finalizing``, finalize, settle, and let the vCPUs go on.

    Args:
        context: where.
        monitor: the QEMU that the job runs in.
        operation: the operation it belongs to.
        job: the job.
        live: that QEMU runs the guest.
        pending: the job waits for ``job-finalize``.
        step: the journal's words for a phase (``started``, ``finalizing``); ``:running`` follows where a guest runs.
        settle: verifies what has become of the graph and records it.

    Raises:
        QmpError: the job cannot be finalized; the graph is as before, and the journal says ``started`` again.
    """
    running = live and (await commands.query_status(monitor)).running
    # Also where nothing runs: `stop` writes every node's cached tables out. A commit into a middle layer and a stream
    # come to `pending` without that, and a QEMU killed now would take what they moved with it.
    await commands.control(monitor, "stop")
    try:
        words = f"{step('finalizing')}{':running' if running else ''}"
        await blocking(lambda: context.store.mark(operation, "running", step=words))
        if pending:
            try:
                await jobs.finalize(monitor, job)
            except QmpError:
                # The graph is as before and the guest stands still: what it wrote to so far is the truth again.
                await blocking(lambda: context.store.mark(operation, "running", step=step("started")))
                raise
        await commands.control(monitor, "stop")  # now the headers that finalize has changed
        await settle()
    finally:
        if running:
            await commands.control(monitor, "cont")
