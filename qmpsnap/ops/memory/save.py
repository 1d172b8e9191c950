"""A guest's memory: saved at the very instant of its disks, and loaded into a new QEMU.

``background`` is the mode with the short pause: the guest is paused, all disks get their overlays, QEMU begins to track
writes to RAM, the guest is resumed, and RAM is written while it runs. If that is not supported, the guest is paused for
the whole save, and the snapshot says why.
"""

import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
from msgspec import Struct

from qmpsnap.errors import DeadlinePassed, HostCannot, QmpError, StateError
from qmpsnap.hint import call
from qmpsnap.host.threads import bounded, to_end
from qmpsnap.machine import statefile
from qmpsnap.model.layers.vmstate import Manifest, SaveMode, Vmstate
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations.memory import Memory
from qmpsnap.model.operations.operation import CreatePlan, Operation
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp import commands, migration, runstate
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report
from qmpsnap.qmp.session import Monitor

RESUME_DEADLINE = 10.0
"""Seconds for letting the guest run again."""

HELD = frozenset({"paused", "finish-migrate", "postmigrate"})
"""``RunState`` names of a guest that is paused for its memory."""


class Held(Struct, frozen=True):
    """How long the guest was paused, by QEMU's own clock, and how long each step took; milliseconds."""

    pause_ms: float | None
    steps: Mapping[str, float]


class Channel:
    """The file as QEMU has it, from :func:`channel`.

    Attributes:
        arguments: those of ``migrate``.
        digest: of what was written so far, where QEMU writes from the beginning to the end.
    """

    def __init__(self, arguments: dict[str, Any], digest: statefile.Digest | None) -> None:
        self.arguments, self.digest = arguments, digest


@asynccontextmanager
async def channel(qemu: Monitor, memory: Memory) -> AsyncIterator[Channel]:
    """Make the file and ready QEMU to write to it; afterwards QEMU is as it was, the file stays.

    There has to be space for all of it: a save that has begun must not run out of it.
    """
    descriptors = [await to_end(statefile.create, memory.part)]
    digest = None
    try:
        await to_end(statefile.reserve, descriptors[0], memory.reserve, memory.part)
        direct = await to_end(statefile.also_direct, descriptors[0]) if memory.layout == "mapped-ram" else None
        descriptors += [] if direct is None else [direct]
        await migration.set_up(
            qemu,
            background=memory.mode == "background",
            mapped=memory.layout == "mapped-ram",
            direct=direct is not None,
        )
        arguments = await migration.hand_over(qemu, *descriptors)
        if memory.layout == "stream" and memory.compression == "none":
            digest = statefile.Digest(descriptors[0])
        yield Channel(arguments, digest)
        await migration.put_back(qemu)
    finally:
        if digest:
            digest.stop()
        for descriptor in descriptors:
            os.close(descriptor)


async def shorten(context: Context, machine: Machine, memory: Memory) -> None:
    """Do what makes the pause shorter and can be done while the guest runs."""
    process = context.process(machine)
    if process and memory.mode == "background" and memory.resume:
        from qmpsnap.machine import hugepages

        await to_end(hugepages.gather, process.pid)


async def hold(
    qemu: Monitor, memory: Memory, channel: dict[str, Any], transact: Callable[[], Awaitable[None]], *, machine: str
) -> Held:
    """Pause the guest, move the disks to their overlays, capture the memory, resume the guest: one instant for all.

    If QEMU will end afterwards the guest stays paused, unless this fails.

    Raises:
        DeadlinePassed: it took longer than allowed; the memory was given up, the disks have moved. If QEMU cannot give
            it up, the guest stays paused until it is written.
        StateError: QEMU has paused the guest by itself before we could; the disks have not moved, and it stays paused.
        QmpError: QEMU refused a step.
    """
    clock = _Clock()
    resume = memory.resume
    async with qemu.listen("STOP", "RESUME") as bell:
        try:
            with anyio.fail_after(memory.max_pause_ms / 1000 if memory.max_pause_ms and memory.cancellable else None):
                if memory.resume:
                    await commands.control(qemu, "stop")
                if memory.resume or memory.mode == "background":
                    state = await commands.run_state(qemu)
                    resume = memory.resume and state == "paused"  # otherwise something else has paused it
                    _require_paused(machine, state)
                if memory.resume:
                    clock.step("stop")
                await transact()
                clock.step("transaction")
                await migration.start(qemu, "migrate", channel)
                clock.step("migrate")
                _require_success(await fixed(qemu, memory.mode))
                clock.step("tracking")
            resume = memory.resume and not memory.quit
        except BaseException as error:
            # Let run before its memory is fixed, the guest would change what is saved: then it must not count.
            await give_up(qemu, memory)
            if isinstance(error, TimeoutError):
                raise DeadlinePassed(
                    f"pausing the guest took longer than {memory.max_pause_ms:g} ms; its memory was not saved"
                ) from error
            raise
        finally:
            if resume:
                await bounded(RESUME_DEADLINE, _let_run(qemu, clock))
        if resume:
            await bell.wait(1.0)
    times = dict(reversed(bell.times))
    pause = (times.get("RESUME", math.nan) - times.get("STOP", math.nan)) * 1000
    # Somebody else's stop or cont may have come between: then the two are no pair.
    return Held(pause if pause >= 0 else None, clock.steps)


async def _let_run(qemu: Monitor, clock: "_Clock") -> None:
    try:
        await commands.control(qemu, "cont")  # an earlier QEMU has done so by itself; then this changes nothing
    except QmpError:
        await run_on(qemu)  # QEMU had not quite ended its migration
    clock.step("cont")


def _require_paused(machine: str, state: str) -> None:
    """Make sure that a command has paused the guest: if QEMU paused it by itself, the save would make QEMU abort."""
    if state != "paused":
        raise StateError(
            f"the guest of machine {machine} cannot be paused for its memory: it is {state}",
            hint=runstate.remedy(state, machine) or call("state", machine) + " shows why",
            machine=machine,
        )


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self.steps: dict[str, float] = {}

    def step(self, name: str) -> None:
        now = time.monotonic()
        self.steps[name] = round((now - self._last) * 1000, 3)
        self._last = now


async def fixed(qemu: Monitor, mode: SaveMode) -> migration.Migration:
    """Wait until no write of the guest can reach the state any more, or the save has failed."""
    while True:
        found = await migration.query(qemu)
        if found.status in migration.ENDED or (mode == "background" and found.tracks_writes):
            return found
        await anyio.sleep(0 if mode == "background" else 0.002)


def _require_success(found: migration.Migration) -> None:
    if found.status in ("failed", "cancelled"):
        reason = found.error_desc or ("it was cancelled" if found.status == "cancelled" else "QEMU gave no reason")
        raise HostCannot(f"QEMU could not write the memory: {reason}", hint="check the free space at the state file")


async def run_on(qemu: Monitor) -> None:
    """Resume a guest that was paused for its memory; one that is paused for another reason stays paused."""
    while (status := (await commands.query_status(qemu)).status) == "finish-migrate":
        await anyio.sleep(0.002)  # QEMU refuses meanwhile
    if status in HELD:
        await commands.control(qemu, "cont")


async def take_disks_back(qemu: Monitor) -> None:
    """Bring a paused guest out of the state that a save leaves it in: QEMU has released its disks.

    It takes them back only for a running guest, so the guest runs for an instant.
    """
    if (await commands.query_status(qemu)).status == "postmigrate":
        await commands.control(qemu, "cont")
        await commands.control(qemu, "stop")


async def give_up(qemu: Monitor, memory: Memory) -> None:
    """Cancel a save, also one of an earlier process; if that is impossible, wait until the guest may run again."""
    await bounded(RESUME_DEADLINE, _give_up(qemu, memory))


async def _give_up(qemu: Monitor, memory: Memory) -> None:
    if (await migration.query(qemu)).status in migration.IDLE:
        return
    if memory.cancellable:
        await migration.cancel(qemu)
    else:
        await fixed(qemu, memory.mode)


async def written(qemu: Monitor, operation: Operation, *, report: Report) -> None:
    """Wait until QEMU has written all of it."""
    _require_success(await ended(qemu, operation, report=report))


async def ended(qemu: Monitor, operation: Operation, *, report: Report) -> migration.Migration:
    """Wait for the end of a save, however it ends."""
    async with qemu.listen("MIGRATION") as bell:
        while True:
            found = await migration.query(qemu)
            ram = found.ram
            done = found.status in migration.ENDED
            report(
                JobInfo(
                    id=f"qs.{operation.id}.memory",
                    type="save",
                    status="concluded" if done else "running",
                    current_progress=max(0, ram.total - ram.remaining),
                    total_progress=ram.total,
                )
            )
            if done:
                return found
            await bell.wait(0.1)


async def forget(qemu: Monitor) -> None:
    """Wait for the end of a save that was given up, and let QEMU forget it."""
    while (await migration.query(qemu)).status not in migration.IDLE:
        await anyio.sleep(0.01)
    await migration.put_back(qemu)


async def finish(
    operation: Operation[CreatePlan],
    memory: Memory,
    *,
    snapshot: str,
    digest: statefile.Digest | None = None,
    steps: Mapping[str, float] | None = None,
    frozen: bool = False,
) -> Vmstate:
    """Give the written state its manifest and its name, durably; ``digest``: what was digested of it meanwhile."""
    manifest = Manifest(
        operation=operation.id,
        points={overlay.disk: overlay.backing.id for overlay in operation.plan.overlays},
        snapshot=snapshot,
        created=time.time(),
        bytes=0,
        digest="",
        mode=memory.mode,
        layout=memory.layout,
        compression=memory.compression,
        hardware=memory.hardware,
        steps_ms=dict(steps or {}),
        frozen=frozen,
    )
    return await to_end(statefile.finish, memory.part, memory.path, manifest, digest)
