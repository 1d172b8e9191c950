"""The moment from which a block job's result is the truth: the guest held still for it, the record made in it.

A job can fail in it, too; where it is a header that could not be written, QEMU has changed its chain by then. That is
taken back, as the header is what the next QEMU goes by.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, OperationPending, QemuGone, QmpError, QmpsnapError, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.threads import completed
from qmpsnap.model.operations import steps
from qmpsnap.ops.base.context import guarded
from qmpsnap.ops.jobs.blockjob import BlockJob
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.session import Monitor

FINALIZE_DEADLINE = 60.0
"""Seconds from finalize to the settled store; the guest's vCPUs are stopped for a few milliseconds of it."""


class NotFinalized(QmpError):
    """A job failed at its end: QEMU's chain is as before, and the journal says ``started`` again."""


class Hold(Struct):
    """A guest that is held; ``known``: which side of the job is the truth, so that writing to it is not in vain."""

    known: bool = True


@contextmanager
def in_time(job: BlockJob, *, shield: bool = False) -> Iterator[None]:
    """Give the block :data:`FINALIZE_DEADLINE` seconds."""
    with anyio.move_on_after(FINALIZE_DEADLINE, shield=shield) as scope:
        yield
    if scope.cancelled_caught:
        raise DeadlinePassed(
            f"job {job.id} did not complete within {FINALIZE_DEADLINE:g} s",
            hint=call("recover", job.machine.name) + " completes or undoes it",
            effect="unknown",
            machine=job.machine.name,
        )


@asynccontextmanager
async def watched(job: BlockJob, monitor: Monitor) -> AsyncIterator[None]:
    """For the block, in which the guest may be stopped: it runs on whatever becomes of us.

    What takes time for that is done before the block, as the guest's writes wait from a job's ``pending`` on.
    """
    running = job.step.live and (await commands.query_status(monitor)).live
    async with guarded(job.context, job.machine, when=running) as guard_ready:
        await guard_ready()
        if running:
            await job.mark(steps.STARTED, running=True)
        yield


@asynccontextmanager
async def held_first(job: BlockJob, monitor: Monitor) -> AsyncIterator[bool]:
    """For the block, in which the job drains its disk: whether the guest is held for it, and from then on.

    From ``pending`` on the guest's writes wait, and at the first of them QEMU 7.2 would abort when it is finalized. So
    there the guest is stopped before. If the block fails it runs on.
    """
    moves = job.step.live and job.moves_guest and await jobs.aborts_at_waiting_writes(monitor)
    held = moves and (await commands.query_status(monitor)).live
    try:
        if held:
            await commands.control(monitor, "stop")
        yield held
    except BaseException:
        if held:
            await completed(let_run(monitor))
        raise


@asynccontextmanager
async def going_on(job: BlockJob, monitor: Monitor | None, *, when: bool) -> AsyncIterator[Hold]:
    """After the block, however it ends, the guest that we may have stopped runs.

    But not while it would write to another layer than the one that counts should QEMU end: then it waits for recovery.
    """
    hold = Hold()
    try:
        yield hold
    finally:
        if monitor and when and (hold.known or not job.moves_guest):
            await completed(let_run(monitor))  # QEMU's answers have deadlines of their own


async def let_run(monitor: Monitor) -> None:
    """Let a guest go on, if it does not run."""
    if not (await commands.query_status(monitor)).live:
        await commands.control(monitor, "cont")


async def runs(job: BlockJob, monitor: Monitor | None, *, before: bool) -> bool:
    """Whether a guest is to run after recovery: it runs, or ran ``before`` somebody stopped it for this job."""
    if monitor is None or not job.step.live:
        return False
    return before or (await commands.query_status(monitor)).live


async def go_over(job: BlockJob, monitor: Monitor, *, held: bool = False) -> None:
    """Stop the vCPUs, mark ``finalizing``, finalize, settle, and let the vCPUs go on."""
    running = job.step.live and (held or (await commands.query_status(monitor)).live)
    async with going_on(job, monitor, when=running) as hold:
        # Also where nothing runs: `stop` writes every node's cached tables out. A commit into a middle layer and a
        # stream come to `pending` without that, and a QEMU killed now would take what they moved with it.
        await commands.control(monitor, "stop")
        await job.mark(steps.FINALIZING, running=running)
        await make_true(job, monitor, hold, running=running)


async def make_true(job: BlockJob, monitor: Monitor, hold: Hold, *, running: bool) -> None:
    """Go on from a durable ``finalizing``: finalize what waits for it, and settle what has become of it."""
    hold.known = False
    info = await jobs.find(monitor, job.id)
    if info and info.status == "pending":
        try:
            await job.require_files()
        except StoreMismatch:
            await job.mark(steps.STARTED, running=running)
            hold.known = True
            raise
    try:
        if info:
            # Concluded may be failed, too: an earlier process may have heard of it, or died before.
            await (jobs.finalize(monitor, job.id) if info.status == "pending" else _concluded(job, monitor))
    except QmpError as error:
        await _give_up(job, monitor, error, running=running)
        hold.known = True
        raise NotFinalized(error.message, effect=error.effect, qmp_class=error.qmp_class) from error
    hold.known = True
    await commands.control(monitor, "stop")  # now the headers that finalize has changed
    await job.settle(monitor, running=running)


async def _concluded(job: BlockJob, monitor: Monitor) -> None:
    await jobs.follow(monitor, job.id, "concluded")


async def _give_up(job: BlockJob, monitor: Monitor, why: QmpError, *, running: bool) -> None:
    """What counted until now counts again, in QEMU and in the journal, before a guest writes to it."""
    try:
        await job.take_back(monitor)
        await job.mark(steps.STARTED, running=running)
    except QemuGone:
        raise
    except QmpsnapError as error:
        name = job.machine.name
        raise OperationPending(
            f"{why.message}; the chain cannot be restored: {error.message}",
            hint="fix that, then "
            + call("recover", name)
            + "; or end QEMU first, which loses no data: "
            + call("stop", name, force=True),
            effect="unknown",
            machine=name,
        ) from error
