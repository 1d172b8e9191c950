"""Block jobs in QEMU's own states: started so that nothing happens behind our back, followed, finished or cancelled.

Every job is started with ``auto-finalize: false``, ``auto-dismiss: false`` and an id that a later process can work out
again. Events only wake us; ``query-jobs`` decides.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import anyio
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, QemuGone, QmpError
from qmpsnap.hint import call
from qmpsnap.model.layers.vmstate import version_of
from qmpsnap.model.names import JobId, NodeName
from qmpsnap.qmp import commands
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.session import COMMAND_DEADLINE, Monitor

JobState = Literal[
    "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting", "concluded", "null"
]
"""QAPI ``JobStatus``. A commit of the active layer and a mirror come by ``ready``; ``pending`` waits for finalize."""

WAKE = 0.25
"""Seconds after which a job is queried even without an event: nothing else reports progress."""

BEGUN = 0.001
"""Seconds until we look again whether a mirror tracks writes, at first: the guest may be paused for that."""

MISSING = (((8, 0), (10, 0, 9)), ((10, 1), (11, 0)))
"""QEMU versions whose mirrors miss writes while they begin, from and before; docs/explanation/qemu-facts.md."""

ABORTS_BEFORE = (8, 0)
"""QEMU before this ends itself at a write of the guest that waits while its disk is moved to another layer."""

PAUSED = 2.0
"""Seconds after which a job that is paused does not go on by itself: ``cont`` makes QEMU forget that a write failed."""

MEMORY_DEADLINE = 1800.0
"""Seconds QEMU may be silent while it saves or loads memory inside images: it answers nobody meanwhile."""

_CANCELLED = "Operation canceled"
"""The error of a job that somebody has cancelled: strerror(ECANCELED)."""

PATIENCE = 10.0
"""Seconds without progress after which a mirror counts as outrun by its guest."""


Report = Callable[[JobInfo], None]
"""Told about a job again and again: bytes done and in all are QEMU's estimates, and both can move either way."""


class JobStuck(HostCannot):
    """A write of a job failed, and the job waits for what is to be done about it."""

    def __init__(self, job: JobId, why: str) -> None:
        super().__init__(f"job {job} is paused: {why}; the chain is unchanged", effect="unknown")
        self._what = f"{why}; the chain is unchanged"
        self._job = job

    def tell(self, machine: str, *, waits: bool) -> None:
        """Say what to do next: the job waits in the guest's QEMU, or has ended with the worker that it ran in."""
        if waits:
            self.message = f"job {self._job} is paused: {self._what} and the guest keeps running"
            self.hint = "fix that, then " + call("wait", machine) + "; or give up with " + call("cancel", machine)
        else:
            self.message = f"job {self._job} failed: {self._what}"
            self.hint = "fix that, then try again"
        self.machine = machine


def unreported(_: JobInfo) -> None:
    """For callers who do not care about progress."""


_COMMON: dict[str, Any] = {"auto-finalize": False, "auto-dismiss": False, "on-error": "stop"}


def commit_arguments(
    job: JobId, *, root: NodeName, top: NodeName, base: NodeName, base_path: str
) -> tuple[str, dict[str, Any]]:
    """``block-commit``: ``base`` takes over what the layers above it up to ``top`` hold; the guest writes to ``root``.

    ``base_path`` goes into the header of the layer above ``top``; there is none where ``top`` is the root itself.
    """
    arguments = {"job-id": job, "device": root, "top-node": top, "base-node": base, **_COMMON}
    if top != root:
        arguments["backing-file"] = base_path
    return "block-commit", arguments


def stream_arguments(
    job: JobId, *, into: NodeName, base: NodeName | None, base_path: str | None
) -> tuple[str, dict[str, Any]]:
    """``block-stream``: ``into`` takes over what the layers between it and ``base``, its backing from then on, hold."""
    arguments: dict[str, Any] = {"job-id": job, "device": into, **_COMMON}
    if base is not None:
        arguments |= {"base-node": base, "backing-file": base_path}
    return "block-stream", arguments


def mirror_arguments(
    job: JobId,
    *,
    source: NodeName,
    target: NodeName,
    shallow: bool,
    write_blocking: bool,
    limit: int = 0,
    root: NodeName | None = None,
) -> tuple[str, dict[str, Any]]:
    """``blockdev-mirror``: ``target``, exactly as large, becomes a copy of ``source``, which it may replace.

    ``root`` is a filter above ``source`` through which the guest writes and which stays ("Need a root block node").
    """
    arguments: dict[str, Any] = {"job-id": job, "device": root or source, "target": target}
    arguments |= {"sync": "top" if shallow else "full", "auto-finalize": False, "auto-dismiss": False}
    arguments |= {"on-source-error": "stop", "on-target-error": "stop"}
    if root:
        arguments["replaces"] = source
    if write_blocking:
        arguments["copy-mode"] = "write-blocking"
    if limit:
        arguments["speed"] = limit
    return "blockdev-mirror", arguments


def drive_mirror(
    arguments: dict[str, Any], *, target: NodeName, path: str, image_format: str
) -> tuple[str, dict[str, Any]]:
    """``drive-mirror`` with the arguments of ``blockdev-mirror``, to an image that QEMU opens itself."""
    opened = {"target": path, "node-name": target, "format": image_format, "mode": "existing"}
    return "drive-mirror", {**arguments, **opened}


def memory_arguments(job: JobId, *, tag: str, vmstate: NodeName, nodes: Sequence[NodeName]) -> dict[str, Any]:
    """Arguments of ``snapshot-save`` and ``snapshot-load``: memory and disks under one tag inside the images.

    They conclude by themselves and still wait to be dismissed; the guest is paused meanwhile. The image of
    ``vmstate`` holds the memory; it is one of ``nodes``, and no others are touched.
    """
    return {"job-id": job, "tag": tag, "vmstate": vmstate, "devices": list(nodes)}


async def find(monitor: Monitor, job: JobId, *, deadline: float = COMMAND_DEADLINE) -> JobInfo | None:
    """The job as it is now, or None when QEMU has none of that id; ``deadline`` seconds for QEMU's answer."""
    return next((info for info in await commands.query_jobs(monitor, deadline=deadline) if info.id == job), None)


async def require(monitor: Monitor, job: JobId, *, deadline: float = COMMAND_DEADLINE) -> JobInfo:
    """As :func:`find`, of a job that must be there.

    Raises:
        QemuGone: QEMU ended, or the job is not there any more.
    """
    info = await find(monitor, job, deadline=deadline)
    if info is None:
        raise QemuGone(f"job {job} disappeared from QEMU; its outcome is unknown", effect="unknown")
    return info


async def follow(
    monitor: Monitor,
    job: JobId,
    *until: JobState,
    report: Report = unreported,
    look: Callable[[JobInfo], Awaitable[JobInfo]] | None = None,
    deadline: float = COMMAND_DEADLINE,
) -> JobInfo:
    """Wait until the job is in one of these states; a job that has concluded ends every wait.

    ``look`` may act on what it sees and says what is to be reported of it.

    Raises:
        QmpError: it concluded with an error, which the message holds; it is not dismissed yet.
        JobStuck: it is paused because a write failed; it goes on with ``block-job-resume``.
        QemuGone: QEMU ended, or the job is not there any more.
    """
    async with monitor.listen("JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR") as bell:
        paused = 0.0
        while True:
            info = await require(monitor, job, deadline=deadline)
            report(await look(info) if look else info)
            if info.status == "concluded":
                if info.error == _CANCELLED:
                    raise QmpError(f"job {job} was cancelled", effect="applied")
                if info.error:
                    raise QmpError(f"job {job} failed: {info.error}", effect="applied")
                return info
            if info.status in until:
                return info
            if info.status == "paused":
                await _raise_if_stuck(monitor, job)
                paused = paused or time.monotonic()
                if time.monotonic() - paused > PAUSED:
                    raise JobStuck(job, "a write failed before the guest was resumed, or a job-pause")
            else:
                paused = 0.0
            await bell.wait(WAKE)


async def _raise_if_stuck(monitor: Monitor, job: JobId) -> None:
    for block_job in await commands.query_block_jobs(monitor):
        if block_job.device == job and block_job.io_status != "ok":
            why = "no space is left" if block_job.io_status == "nospace" else "a write failed"
            raise JobStuck(job, why)


async def misses_first_writes(monitor: Monitor) -> bool:
    """Whether a mirror in this QEMU may miss what its guest writes before :func:`tracks_writes`."""
    version = version_of(await commands.query_version(monitor))
    return any(since <= version < until for since, until in MISSING)


async def aborts_at_waiting_writes(monitor: Monitor) -> bool:
    """Whether no write of the guest may wait when a job that moves its disk is finalized in this QEMU."""
    return version_of(await commands.query_version(monitor)) < ABORTS_BEFORE


def tracks_writes(info: JobInfo) -> bool:
    """Whether a mirror knows of every write of its guest, in every QEMU: how much there is it says only after that."""
    return info.total_progress > 0 or info.status not in {"created", "running", "paused"}


async def begin(monitor: Monitor, job: JobId) -> None:
    """Wait until a mirror tracks its guest's writes, or has failed.

    Raises:
        JobStuck: it is paused because a write failed.
        QemuGone: QEMU ended, or the job is not there any more.
    """
    wait = BEGUN
    while not tracks_writes(info := await require(monitor, job)):
        if info.status == "paused":
            await _raise_if_stuck(monitor, job)
        await anyio.sleep(wait)  # no event tells of it
        wait = min(2 * wait, WAKE)


async def set_speed(monitor: Monitor, job: JobId, limit: int) -> None:
    """Let a job copy ``limit`` bytes per second, 0 without limit (``block-job-set-speed``)."""
    await monitor.execute("block-job-set-speed", {"device": job, "speed": limit})


async def hurry(monitor: Monitor, job: JobId) -> None:
    """Take a job's limit away, if it has one: the rest is copied while the guest's writes wait for it."""
    if any(at.device == job and at.speed for at in await commands.query_block_jobs(monitor)):
        await set_speed(monitor, job, 0)


async def complete(monitor: Monitor, job: JobId) -> None:
    """Let a job that is ``ready`` go over (``job-complete``)."""
    await monitor.execute("job-complete", {"id": job})


async def detach(monitor: Monitor, job: JobId) -> None:
    """Let a mirror that is ``ready`` end as a copy of this moment, the graph staying as it is.

    ``block-job-cancel`` without ``force`` goes to ``pending`` and success; ``job-cancel`` would abort (7.2 to 11.1).
    """
    await monitor.execute("block-job-cancel", {"device": job})


async def block_writes(monitor: Monitor, job: JobId) -> bool:
    """Let the guest's writes wait for a mirror that works already (``block-job-change``); False before QEMU 8.2."""
    arguments = {"id": job, "type": "mirror", "copy-mode": "write-blocking"}
    try:
        await monitor.execute("block-job-change", arguments)
    except QmpError as error:
        if error.qmp_class == "CommandNotFound":
            return False
        raise
    return True


async def follow_mirror(
    monitor: Monitor, job: JobId, *until: JobState, patience: float = PATIENCE, report: Report = unreported
) -> JobInfo:
    """As :func:`follow`, for a mirror that its guest may outrun.

    If the remaining bytes do not decrease for ``patience`` seconds, the guest's writes are made to wait, and ``report``
    gets the state ``blocking``; a QEMU that cannot switch to that continues, with the state ``outrun``.
    """
    least, since, state = 1 << 63, time.monotonic(), ""

    async def look(info: JobInfo) -> JobInfo:
        nonlocal least, since, state
        left, now = info.total_progress - info.current_progress, time.monotonic()
        if info.status != "running" or not info.total_progress:  # at first QEMU does not know how much there is
            since = now
        elif left < least:
            least, since = left, now
        elif not state and now - since > patience:
            state = "blocking" if await block_writes(monitor, job) else "outrun"
        return replace(info, status=state) if state and info.status == "running" else info

    return await follow(monitor, job, *until, report=report, look=look)


async def finalize(monitor: Monitor, job: JobId) -> JobInfo:
    """Let a job that is ``pending`` make its change to the graph (``job-finalize``) and wait until it has.

    ``QmpError``: it failed; a stream may have changed the graph all the same (docs/explanation/qemu-facts.md).
    """
    await monitor.execute("job-finalize", {"id": job})
    return await follow(monitor, job, "concluded")


async def abort(monitor: Monitor, job: JobId) -> bool:
    """See that a job cannot succeed any more, if it still is there; returns whether it is.

    A mirror that is ready would take ``job-cancel`` for success; ``force`` makes it an abort.
    """
    info = await find(monitor, job)
    if info and info.status not in ("concluded", "aborting"):
        await monitor.execute("block-job-cancel", {"device": job, "force": True})
    return info is not None


async def cancel(monitor: Monitor, job: JobId, *, dismiss: bool = True) -> None:
    """End a job without its change to the graph, if it still is there."""
    if not await abort(monitor, job):
        return
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
