"""What happens to a machine, as it is seen by looking at its QEMU again and again.

A monitor has one client at a time, so nobody can keep one: what comes and goes between two looks is not seen.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Final

import anyio
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, NotFoundError, QemuGone
from qmpsnap.model.machines.state import State
from qmpsnap.ops.outside import compare
from qmpsnap.qmp import commands
from qmpsnap.qmp.commands import JobInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpsnap.api.machine_life import MachineLife
    from qmpsnap.model.machines.record import Machine, Process
    from qmpsnap.ops.base.free_space import Shortage

SHORTAGE: Final = 5.0
"""Seconds between two looks at the free space."""


class StateChanged(Struct, frozen=True, kw_only=True):
    """The machine is in another run state; the first event tells the present one, with ``before`` None."""

    state: State
    before: State | None


class JobChanged(Struct, frozen=True, kw_only=True):
    """A QEMU job is new, or its state or progress has changed; ``ended``: it is gone, and ``job`` is as it was last."""

    job: JobInfo
    ended: bool = False


class ShortageChanged(Struct, frozen=True, kw_only=True):
    """Other file systems than before may fill up under the guest; an empty ``shortage`` means none any more."""

    shortage: tuple[Shortage, ...]


Event = StateChanged | JobChanged | ShortageChanged


class _Seen:
    """What has been told, to be compared with what there is."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.jobs: dict[str, JobInfo] = {}
        self.shortage: tuple[Shortage, ...] = ()

    def now(self, state: State) -> Iterator[Event]:
        if state != self.state:
            yield StateChanged(state=state, before=self.state)
        self.state = state

    def at_work(self, jobs: tuple[JobInfo, ...]) -> Iterator[Event]:
        found = {job.id: job for job in jobs}
        for job in jobs:
            if self.jobs.get(job.id) != job:
                yield JobChanged(job=job)
        for name, job in self.jobs.items():
            if name not in found:
                yield JobChanged(job=job, ended=True)
        self.jobs = found

    def short(self, shortage: tuple[Shortage, ...]) -> Iterator[Event]:
        if {(one.kind, one.folder) for one in shortage} != {(one.kind, one.folder) for one in self.shortage}:
            yield ShortageChanged(shortage=shortage)
        self.shortage = shortage


async def of(vm: MachineLife, interval: float) -> AsyncGenerator[Event, None]:
    """The events of a machine until its QEMU ends."""
    seen, first, next_room = _Seen(), await _process(vm), 0.0
    while True:
        record = await _record(vm)
        if record is None or first is None or _other(vm, record, first):
            for event in (*seen.now(await _gone(vm, record, had=first)), *seen.at_work(())):
                yield event
            return
        for event in await _look(vm, record, seen):
            yield event
        if time.monotonic() >= next_room:
            for event in seen.short(await vm.shortage()):
                yield event
            next_room = time.monotonic() + SHORTAGE
        await anyio.sleep(interval)


async def _look(vm: MachineLife, record: Machine, seen: _Seen) -> list[Event]:
    """One look; where the monitor is busy, or QEMU is just ending, the next one will tell."""
    with contextlib.suppress(DeadlinePassed, QemuGone):
        async with vm._context.monitor(record, look=True) as qemu:  # noqa: SLF001 - a part of the handle
            if qemu:
                state, jobs = State(await commands.run_state(qemu)), await commands.query_jobs(qemu)
                return [*seen.now(state), *seen.at_work(jobs)]
    return []


async def _record(vm: MachineLife) -> Machine | None:
    with contextlib.suppress(NotFoundError):
        return await vm.record()
    return None


async def _process(vm: MachineLife) -> Process | None:
    return vm._context.process(await vm.record())  # noqa: SLF001


def _other(vm: MachineLife, record: Machine, first: Process) -> bool:
    """Whether the QEMU that was seen first has ended, also if the machine has another by now."""
    now = vm._context.process(record)  # noqa: SLF001
    return now is None or (now.pid, now.start_ticks) != (first.pid, first.start_ticks)


async def _gone(vm: MachineLife, record: Machine | None, *, had: Process | None) -> State:
    """The last state that is told: that QEMU is no more; without one before, whatever can be said."""
    if record is None or had:
        return State.STOPPED
    return await compare.state(vm._context, record)  # noqa: SLF001
