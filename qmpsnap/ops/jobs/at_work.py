"""A machine's jobs wherever they run, without its lock: listed, awaited, cancelled and throttled.

A command that waits for them has our monitor, so the user's is asked: one client at a time, as with any monitor. What
a job's end means is left to that command, or to recovery.
"""

import contextlib
import math
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Literal

import anyio

from qmpsnap.errors import DeadlinePassed, NotFoundError, QemuGone, QmpsnapError, StateError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_read
from qmpsnap.machine import worker
from qmpsnap.machine.qemu import monitor
from qmpsnap.machine.starting.run_files import QMP_SOCKET, USER_SOCKET
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import JobId, OperationId
from qmpsnap.model.operations.operation import Operation
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor
from qmpsnap.store import lock

Place = Literal["guest", "worker"]
"""The QEMU that a job runs in: the guest's own, or the worker of a stopped machine."""

TAKEN: Final = 1.5
"""Seconds in which a monitor that nobody else has greets us."""
ENDED: Final = 60.0
"""Seconds in which a command whose job was cancelled has ended its operation."""

_LOOK: Final = 0.1
_REPORT: Final = 1.0
"""Seconds between two reports of a job that another command is at: each takes the user's monitor for a moment."""
_BLOCK_JOBS: Final = frozenset({"commit", "stream", "mirror"})
_AT_WORK: Final = frozenset({"created", "running", "paused", "ready", "standby"})
"""States (QAPI ``JobStatus``) of a job that still copies."""


class MachineJob(JobInfo, frozen=True, kw_only=True):
    """A job of QEMU, and what qmpsnap knows of it.

    Attributes:
        place: ``guest`` or ``worker``: the QEMU that it runs in.
        operation: number of the operation it belongs to; None where another program started it.
        verb: that operation's verb.
        waiting: the command that waits for it, with its pid and since when; None where nobody does.
        limit: bytes per second it may copy (QAPI ``BlockJobInfo.speed``); 0 is without limit.
        rate: bytes per second since it began.
        left: seconds until it has copied all, at that rate.
    """

    place: Place = "guest"
    operation: OperationId | None = None
    verb: str = ""
    waiting: str | None = None
    limit: int = 0
    rate: float | None = None
    left: float | None = None


async def listed(context: Context, machine: Machine) -> tuple[MachineJob, ...]:
    """Every job that the guest's QEMU and a worker have.

    Raises:
        QemuGone, DeadlinePassed: QEMU runs and does not answer.
    """
    pending = await context.astore.operations(machine.name, only_open=True)
    waiting = await to_read(lock.holder, context.home.lock(machine.name))
    found: list[MachineJob] = []
    async with _reached(context, machine) as places:
        for place, qemu in places:
            infos = await commands.query_jobs(qemu)
            limits = {job.device: job.speed for job in await commands.query_block_jobs(qemu)} if infos else {}
            found += (_known(info, place, limits.get(info.id, 0), pending, waiting) for info in infos)
    return tuple(found)


async def cancel(context: Context, machine: Machine, pending: Sequence[Operation]) -> list[Operation] | None:
    """Cancel the block jobs of operations that another command is at; returns those as they have ended.

    None where there is no such command, or it has no job now.

    Raises:
        StateError: a job has copied all, and is about to take effect.
        QemuGone: another client has the user's monitor.
        DeadlinePassed: the command has not ended its operation.
    """
    if not pending or await to_read(lock.holder, context.home.lock(machine.name)) is None:
        return None
    cancelled: set[OperationId] = set()
    async with _reached(context, machine) as places:
        for qemu, info, operation in await _ours(places, pending):
            _require_at_work(machine, info)
            await jobs.abort(qemu, JobId(info.id))
            cancelled.add(operation.id)
    return await _ended(context, machine, cancelled) if cancelled else None


async def wait(
    context: Context, machine: Machine, pending: Sequence[Operation], *, report: Report
) -> list[Operation] | None:
    """Wait for operations that another command is at; returns them as they have ended.

    None where there is no such command, or it has ended without them: then they are as any that were interrupted.
    """
    numbers = {operation.id for operation in pending}
    told = -math.inf
    while pending and await to_read(lock.holder, context.home.lock(machine.name)) is not None:
        if ended := await _all_ended(context, machine, numbers):
            return ended
        if report is not unreported and anyio.current_time() - told >= _REPORT:
            told = anyio.current_time()
            with contextlib.suppress(QmpsnapError):  # another client has the monitor, or QEMU is ending
                for job in await listed(context, machine):
                    if job.operation in numbers:
                        report(job)
        await anyio.sleep(_LOOK)
    return await _all_ended(context, machine, numbers)


async def set_speed(context: Context, machine: Machine, limit: int) -> list[str]:
    """Let the jobs of open operations copy ``limit`` bytes per second, 0 without limit; returns their ids.

    Raises:
        NotFoundError: there is no such job.
        StateError: a job has copied all.
        QemuGone: another client has the user's monitor.
    """
    pending = await context.astore.operations(machine.name, only_open=True)
    async with _reached(context, machine) as places:
        found = await _ours(places, pending)
        for qemu, info, _ in found:
            _require_at_work(machine, info)
            await jobs.set_speed(qemu, JobId(info.id), limit)
    if not found:
        raise NotFoundError(
            f"no operation of machine {machine.name} has a job now",
            hint=call("jobs", machine.name) + " lists all jobs",
            machine=machine.name,
        )
    return [info.id for _, info, _ in found]


@asynccontextmanager
async def _reached(context: Context, machine: Machine) -> AsyncIterator[list[tuple[Place, Monitor]]]:
    """Monitors of the QEMUs that the machine has now: our own, or the user's while a command has ours."""
    run_dir = context.home.run_dir(machine.name)
    busy = await to_read(lock.holder, context.home.lock(machine.name))
    found: list[tuple[Place, Monitor]] = []
    async with AsyncExitStack() as stack:
        with anyio.move_on_after(TAKEN if busy else None) as waiting:
            if qemu := await stack.enter_async_context(context.monitor(machine, look=True)):
                found.append(("guest", qemu))
            if await to_read(worker.find, machine, run_dir):
                socket = USER_SOCKET if busy else QMP_SOCKET
                at = monitor(machine, run_dir / worker.FOLDER, socket=socket)
                found.append(("worker", await stack.enter_async_context(at)))
        if waiting.cancelled_caught:
            raise QemuGone(
                f"machine {machine.name} is in use by {busy}, and the user's monitor does not answer: another client"
                " has it",
                hint="end that client, or cancel the command with Ctrl-C or kill -INT",
                machine=machine.name,
            )
        yield found


async def _ours(
    places: Sequence[tuple[Place, Monitor]], pending: Collection[Operation]
) -> list[tuple[Monitor, JobInfo, Operation]]:
    return [
        (qemu, info, operation)
        for _, qemu in places
        for info in await commands.query_jobs(qemu)
        if info.type in _BLOCK_JOBS and info.status != "concluded" and (operation := _operation(info, pending))
    ]


def _operation(info: JobInfo, pending: Collection[Operation]) -> Operation | None:
    return next((one for one in pending if info.id.startswith(f"qs.{one.id}.")), None)


def _known(info: JobInfo, place: Place, limit: int, pending: Collection[Operation], waiting: str | None) -> MachineJob:
    operation = _operation(info, pending)
    rate = left = None
    if operation and info.status == "running":
        rate = info.current_progress / max(time.time() - operation.updated, 0.001)
        left = (info.total_progress - info.current_progress) / rate if rate else None
    return MachineJob(
        id=info.id,
        type=info.type,
        status=info.status,
        current_progress=info.current_progress,
        total_progress=info.total_progress,
        error=info.error,
        place=place,
        operation=operation.id if operation else None,
        verb=operation.verb if operation else "",
        waiting=waiting if operation else None,
        limit=limit,
        rate=rate,
        left=left,
    )


def _require_at_work(machine: Machine, info: JobInfo) -> None:
    if info.status not in _AT_WORK:
        raise StateError(
            f"job {info.id} of machine {machine.name} is {info.status}: it has copied all and takes effect now",
            machine=machine.name,
        )


async def _ended(context: Context, machine: Machine, numbers: Collection[OperationId]) -> list[Operation]:
    with anyio.move_on_after(ENDED):
        while (found := await _all_ended(context, machine, numbers)) is None:
            await anyio.sleep(_LOOK)
        return found
    raise DeadlinePassed(
        f"the job is cancelled, but its command did not end the operation within {ENDED:g} s",
        hint=call("recover", machine.name) + " once the command has ended",
        effect="unknown",
        machine=machine.name,
    )


async def _all_ended(context: Context, machine: Machine, numbers: Collection[OperationId]) -> list[Operation] | None:
    """The operations of these numbers; None while one of them is open, or there are none."""
    if any(one.id in numbers for one in await context.astore.operations(machine.name, only_open=True)):
        return None  # asked again and again, of a journal that may be long
    return [one for one in await context.astore.operations(machine.name) if one.id in numbers] or None
