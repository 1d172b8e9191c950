"""Block jobs in QEMU's own states: started so that nothing happens behind our back, followed, finished or cancelled.

Every job is started with ``auto-finalize: false``, ``auto-dismiss: false`` and an id that a later process can work out
again. Events only wake us; ``query-jobs`` decides.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

from qmpsnap.errors import HostCannot, QemuGone, QmpError
from qmpsnap.model.names import JobId, NodeName
from qmpsnap.qmp import commands
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.session import Monitor

JobState = Literal[
    "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting", "concluded", "null"
]
"""QAPI ``JobStatus``. A commit of the active layer and a mirror come by ``ready``; ``pending`` waits for finalize."""

WAKE = 0.25
"""Seconds after which we look at a job even if no event came: progress is told by nothing else."""


Report = Callable[[JobInfo], None]
"""Told about a job again and again: bytes done and in all are QEMU's estimates, and both can move either way."""


def unreported(_: JobInfo) -> None:
    """For callers who do not care about progress."""


_COMMON: dict[str, Any] = {"auto-finalize": False, "auto-dismiss": False, "on-error": "stop"}


def commit_arguments(
    job: JobId, *, root: NodeName, top: NodeName, base: NodeName, base_path: str
) -> tuple[str, dict[str, Any]]:
    """``block-commit``: ``base`` takes over what the layers above it up to ``top`` hold.

    Args:
        job: the job's id.
        root: the node the guest writes to.
        top: the highest layer that is merged; the root itself makes it a commit of the active layer.
        base: the layer that is written to.
        base_path: the string for the header of the layer above ``top``; not allowed for the active layer.
    """
    arguments = {"job-id": job, "device": root, "top-node": top, "base-node": base, **_COMMON}
    if top != root:
        arguments["backing-file"] = base_path
    return "block-commit", arguments


def stream_arguments(
    job: JobId, *, into: NodeName, base: NodeName | None, base_path: str | None
) -> tuple[str, dict[str, Any]]:
    """``block-stream``: ``into`` takes over what the layers between it and ``base`` hold.

    Args:
        job: the job's id.
        into: the layer that is written to.
        base: its backing afterwards, None for none.
        base_path: the string for its header.
    """
    arguments: dict[str, Any] = {"job-id": job, "device": into, **_COMMON}
    if base is not None:
        arguments |= {"base-node": base, "backing-file": base_path}
    return "block-stream", arguments


async def find(monitor: Monitor, job: JobId) -> JobInfo | None:
    """The job as it is now, or None when QEMU has none of that id."""
    return next((info for info in await commands.query_jobs(monitor) if info.id == job), None)


async def follow(monitor: Monitor, job: JobId, *until: JobState, report: Report = unreported) -> JobInfo:
    """Wait until the job is in one of these states; a job that has concluded ends every wait.

    Raises:
        QmpError: it concluded with an error, which the message holds; it is not dismissed yet.
        HostCannot: it is paused because a write failed; it goes on with ``block-job-resume``.
        QemuGone: QEMU ended, or the job is not there any more.
    """
    async with monitor.listen("JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR") as bell:
        while True:
            info = await find(monitor, job)
            if info is None:
                raise QemuGone(f"job {job} is not in QEMU any more; what became of it is not known", effect="unknown")
            report(info)
            if info.status == "concluded":
                if info.error:
                    raise QmpError(f"job {job} failed: {info.error}", effect="applied")
                return info
            if info.status in until:
                return info
            if info.status == "paused":
                await _raise_if_stuck(monitor, job)
            await bell.wait(WAKE)


async def _raise_if_stuck(monitor: Monitor, job: JobId) -> None:
    for block_job in await commands.query_block_jobs(monitor):
        if block_job.device == job and block_job.io_status != "ok":
            why = "there is no space left" if block_job.io_status == "nospace" else "a write failed"
            raise HostCannot(
                f"job {job} is paused: {why}; the chain is as before and the guest runs on",
                hint="put that right, then: qmpsnap job wait VM",
                effect="unknown",
            )


async def complete(monitor: Monitor, job: JobId) -> None:
    """Let a job that is ``ready`` go over (``job-complete``)."""
    await monitor.execute("job-complete", {"id": job})


async def finalize(monitor: Monitor, job: JobId) -> JobInfo:
    """Let a job that is ``pending`` make its change to the graph (``job-finalize``) and wait until it has.

    Raises:
        QmpError: it failed; the graph is as before.
    """
    await monitor.execute("job-finalize", {"id": job})
    return await follow(monitor, job, "concluded")


async def cancel(monitor: Monitor, job: JobId, *, dismiss: bool = True) -> None:
    """End a job without its change to the graph, if it still is there.

    A mirror that is ready would take ``job-cancel`` for success; ``force`` makes it an abort.
    """
    info = await find(monitor, job)
    if info is None:
        return
    if info.status not in ("concluded", "aborting"):
        await monitor.execute("block-job-cancel", {"device": job, "force": True})
    with contextlib.suppress(QmpError):  # cancelled is what we wanted; QEMU calls it an error
        await follow(monitor, job, "concluded")
    if dismiss:
        await monitor.execute("job-dismiss", {"id": job})


async def resume(monitor: Monitor, job: JobId) -> None:
    """Let a job that was paused by a failed write try again (``block-job-resume``)."""
    await monitor.execute("block-job-resume", {"device": job})


async def dismiss(monitor: Monitor, job: JobId) -> None:
    """Let QEMU forget a concluded job (``job-dismiss``); fine when it has already."""
    if await find(monitor, job):
        await monitor.execute("job-dismiss", {"id": job})
